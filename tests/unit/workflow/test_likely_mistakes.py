"""What --dry-run says about settings that can run but are often not meant."""

import io
import types
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.workflow.likely_mistakes import vocabulary_warnings
from megatron_s2d.workflow.plan_estimate import print_estimate
from megatron_s2d.workflow.preflight import check_workflow

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def warnings(cache, *overrides):
    return check_workflow(load_workflow(SMOKE, list(overrides)), cache).likely_mistakes


def test_smoke_has_none(cache):
    assert warnings(cache) == []


def test_contrast_that_the_report_will_refuse(cache):
    contrast = "contrasts=[{a: half_bridge_stage3, b: direct_student_grpo, factor: all, differs: [student_grpo]}]"
    (line,) = warnings(cache, contrast)
    assert line.startswith("contrast half_bridge_stage3 against direct_student_grpo (all): refused, the arms also")


def test_greedy_samples(cache):
    lines = warnings(cache, "stages.stage3.sampling.temperature=0", "evaluation.sampling.temperature=0")
    assert any(line.startswith("stages.stage3.sampling.temperature: 0 makes all") for line in lines)
    assert any("evaluation.sampling.temperature: 0 makes all" in line for line in lines)
    assert len(lines) == 2


def test_stage_that_nothing_needs(cache):
    (line,) = warnings(cache, "arms={direct_student_grpo: student_grpo}", "contrasts=[]")
    assert "needs" in line and "rl_teacher" in line and "they do not run" in line


def test_tokenizer_of_another_family(tmp_path):
    config = load_workflow(SMOKE, [f"models.student={{path: {tmp_path}}}"])
    specs = {"student": types.SimpleNamespace(vocab_size=49152)}
    assert list(vocabulary_warnings(config, specs, {"student": 49152 - 200})) == []  # padding
    (line,) = vocabulary_warnings(config, specs, {"student": 25})
    assert line.startswith("models.student: the model has 49152 ids and its tokenizer task:modular_arithmetic only 25")


def test_memory_beyond_the_machine(cache, monkeypatch):
    preflight, console = check_workflow(load_workflow(SMOKE), cache), Console(file=io.StringIO(), width=200)
    print_estimate(preflight, None, None, console)
    assert "warning" not in console.file.getvalue()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(total=1 << 20))
    print_estimate(preflight, None, None, console)
    assert "CPU ranks need about" in console.file.getvalue() and "this machine has 1.0 MiB" in console.file.getvalue()
