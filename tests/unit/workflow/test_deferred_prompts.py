"""A workflow whose prompts are a table of texts is checked, refused and planned as one with prompts in memory."""

import io
import json

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.data import prompt_cache
from megatron_s2d.errors import UserError
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.workflow.plan_table import print_plan
from megatron_s2d.workflow.preflight import check_workflow


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(on_disk, max_response_length): the configuration and what checks of it return."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*characters, "12", "14", "13"])}
    backend = Tokenizer(models.BPE(vocabulary, [("1", "2"), ("1", "4"), ("1", "3")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    for name, count in (("train", 60), ("problems", 4)):
        rows = [
            {"question": f"{name[0]}{12 + n % 3}" * (1 + n % 7) + f"={n}", "answer": str(n), "solution": f"{n}"}
            for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"type": "file", "template": "plain", "columns": {"solution": "solution"}}
    stage = {"steps": 1, "train_batch_size": 2, "num_generations": 2, "label_reuse": "refuse"}

    def make(on_disk, max_response_length=8):
        monkeypatch.setattr(prompt_cache, "IN_MEMORY_BYTES", 0 if on_disk else 1 << 30)
        sampling = {"max_response_length": max_response_length}
        settings = {
            "name": "deferred", "tokenizer": str(tmp_path / "tokenizer"), "precision": "float32",
            "lengths": {"max_prompt_length": 13}, "data_cache_dir": str(tmp_path / "cache"),
            "models": {"student": {"preset": "tiny-student"}},
            "data": {name: {"path": str(tmp_path / f"{name}.jsonl"), **columns} for name in ("train", "problems")},
            "stages": {
                "base": {"type": "sft", "model": "student", "data": "train/1H", "steps": 2, "global_batch_size": 2},
                "grpo": {"type": "grpo", "init": "base", "prompts": "train/2H", **stage, "sampling": sampling},
            },
            "arms": {"grpo": "grpo"},
            "evaluation": {"prompts": "problems", "samples_per_prompt": 1, "sampling": {"max_response_length": 8}},
        }  # fmt: skip
        (tmp_path / "workflow.yaml").write_text(json.dumps(settings))
        config = load_workflow(tmp_path / "workflow.yaml")
        return config, check_workflow(config, tmp_path / "assets")

    return make


def test_checks_and_halves_are_the_same(check, tmp_path):
    (config, small), (_, large) = check(False), check(True)
    assert [table.is_exact for table in large.prompts.values()] == [False] * 3
    assert small.dropped == large.dropped and small.warnings == large.warnings
    assert small.dropped["train/1H"] > 0
    for name, table in small.prompts.items():
        assert table.values("id") == large.prompts[name].values("id")
        assert [p.token_ids.tolist() for p in table] == [p.token_ids.tolist() for p in large.prompts[name]]
    assert small.ledger.to_json(small.stages) == large.ledger.to_json(large.stages)
    for name, shape in small.shapes.items():
        assert shape.prompt_length <= large.shapes[name].prompt_length <= 13
        assert shape.length <= large.shapes[name].length
    for limit in (5, 100):
        counts = [
            (check(on_disk), StageInputs(config, {}, tmp_path / "assets", "grpo").longest_beyond("grpo", limit))[1]
            for on_disk in (False, True)
        ]
        assert counts == [13 if limit == 5 else 0] * 2


def test_refusals_are_the_same(check):
    messages = []
    for on_disk in (False, True):
        with pytest.raises(
            UserError, match="prompt train/.* and max_response_length .* exceed the .* positions"
        ) as error:
            check(on_disk, 100_000)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_the_plan_says_what_it_does_not_know(check, tmp_path):
    shown = []
    for on_disk in (False, True):
        _, preflight = check(on_disk)
        console = Console(file=io.StringIO(), width=200)
        print_plan(preflight, [], tmp_path, console)
        shown.append(console.file.getvalue())
    assert "<= 13" in shown[1] and "<= 13" not in shown[0] and " 13 " in shown[0]
