"""The list of what tiny files change is what the script writes, and the script misses nothing."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from megatron_s2d.config.workflow import load_workflow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("differences", ROOT / "docs/differences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_lists_everything_that_tiny_files_change(script):
    document = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.with_list(document, script.differences()) == document, "run: python docs/differences.py"


def pair(folder, tiny):
    """Return (full size, tiny): a workflow, and the same with the keys of ``tiny``."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"defaults": str(ROOT / "configs/smoke.yaml")} | tiny))
    return load_workflow(ROOT / "configs/smoke.yaml"), load_workflow(folder / "tiny.yaml")


def test_every_kind_of_change_has_a_row(script, tmp_path):
    tiny = {
        "seed": 5,
        "precision": "bfloat16",
        "models": {"student": {"preset": "tiny-teacher"}},
        "data": {"more": {"type": "task", "split": "heldout"}},
        "evaluation": {"sampling": {"temperature": 0.5}},
        "stages": {
            "opd": {"optimizer": {"lr": 0.25}, "sampling": {"max_response_length": 7}},
            "stage3": {"optimizer": {"lr": 0.25}, "num_mini_batches": 2},
            "student_base": {"type": "load_checkpoint", "extends": None},
        },
    }  # fmt: skip
    rows = script._paper({"a.yaml": pair(tmp_path, tiny)}).splitlines()[2:]
    text = "\n".join(rows)
    for row in (
        "| `seed` | 1 | 5 | all files |",
        "| `precision` | float32 | bfloat16 | all files |",
        "| `models.student` | {preset: tiny-student} | {preset: tiny-teacher} | all files |",
        "| `data.more` | – | {type: task, split: heldout} | all files |",
        "| `evaluation.sampling.temperature` | 1.0 | 0.5 | all files |",
        "| `opd.optimizer.lr` | 0.001 | 0.25 | opd |",
        "| `grpo.num_mini_batches` | 1 | 2 | stage3 |",
    ):
        assert row in rows, text
    (replaced,) = [row for row in rows if row.startswith("| `type`")]
    assert "type: sft" in replaced and "type: load_checkpoint" in replaced and replaced.endswith("| student_base |")
    assert script._paper({"a.yaml": pair(tmp_path, {})}).count("\n") == 1  # no difference, no row
