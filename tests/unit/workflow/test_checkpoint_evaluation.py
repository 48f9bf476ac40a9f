"""``s2d eval --model``: the workflow that it makes, and what it says of wrong arguments."""

import json

import pytest

from megatron_s2d.cli import main
from megatron_s2d.errors import UserError
from megatron_s2d.workflow.checkpoint_evaluation import CheckpointEvaluation, checkpoint_workflow


def request(tmp_path, **changes):
    model, data = tmp_path / "My model", tmp_path / "problems.jsonl"
    model.mkdir(exist_ok=True)
    data.write_text(json.dumps({"question": "1 + 1 =", "answer": "2"}) + "\n")
    fields = {
        "model": model, "data": data, "schema": "columns", "tokenizer": "task:modular_arithmetic", "num_samples": 2,
        "temperature": 0.5, "max_response_length": 8, "limit": 3,
    }  # fmt: skip
    return CheckpointEvaluation(**fields | changes)


def test_workflow_of_a_checkpoint(tmp_path):
    config = checkpoint_workflow(request(tmp_path), ["evaluation.sampling.top_p=0.9"])
    assert config.name == "eval-My-model-problems" and config.arms == {"My-model": "My-model"}
    assert config.models["My-model"].path == tmp_path / "My model"
    evaluation = config.evaluation
    assert evaluation.samples_of("math") == 2 and config.data["problems"].limit == 3
    sampling = evaluation.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_response_length) == (0.5, 0.9, 8)
    assert checkpoint_workflow(request(tmp_path, tokenizer=None)).tokenizer == str(tmp_path / "My model")
    (tmp_path / "My model" / "model_spec.json").write_text("{}")  # a Megatron checkpoint
    assert checkpoint_workflow(request(tmp_path, tokenizer=None)).tokenizer == str(tmp_path / "My model" / "hf")
    with pytest.raises(UserError, match="no such directory"):
        checkpoint_workflow(request(tmp_path, model=tmp_path / "none"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "name a run directory, or a checkpoint"), (("--model", "x"), "--model needs --data FILE")],
)
def test_missing_arguments_are_one_line(arguments, message, capsys):
    assert main(["eval", *arguments]) == 1
    assert message in capsys.readouterr().err
