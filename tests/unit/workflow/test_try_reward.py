"""``s2d reward``: verdicts of a file of responses before a run; and stages that run again when a function changes."""

import json

import pytest
import yaml

from megatron_s2d.cli import main
from megatron_s2d.config.base import parse
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.workflow.plan import data_digest

FUNCTION = "def score(prompt, response, answer):\n    return (response == answer) * 0.5, 'said ' + response\n"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(FUNCTION)
    document = {
        "name": "try", "tokenizer": "task:modular_arithmetic", "models": {"m": {"preset": "tiny-student"}},
        "lengths": {"max_prompt_length": 16},
        "data": {
            "train": {"type": "task", "split": "pool", "num_operations": 2, "num_prompts": 4},
            "problems": {"type": "task", "split": "eval", "num_operations": 2, "num_prompts": 4},
            "mine": {
                "type": "task", "split": "pool", "num_operations": 2, "num_prompts": 4,
                "verifier": {"type": "function", "function": "rewards:score", "correct_at": 0.5},
            },
        },
        "stages": {"base": {"type": "sft", "model": "m", "data": "train", "steps": 1}},
        "arms": {"a": "base"}, "evaluation": {"prompts": "problems"},
    }  # fmt: skip
    (tmp_path / "try.yaml").write_text(yaml.safe_dump(document))
    return document


def test_verdicts_labels_and_rate_are_printed(config, tmp_path, capsys):
    assert main(["reward", "try.yaml", "--data", "train"]) == 0
    assert "4 responses: no_answer 4 (100.0%)" in capsys.readouterr().out  # a label is no worked answer
    assert main(["reward", "try.yaml", "--data", "mine", "--limit", "3"]) == 0
    printed = capsys.readouterr().out
    assert "3 responses: correct 3 (100.0%)" in printed and "reward: mean 0.5, lowest 0.5, highest 0.5" in printed
    name = next(line.split()[2] for line in printed.splitlines() if "modular_arithmetic/pool" in line)
    rows = [{"id": name, "response": "no"}, {"problem_id": name, "response": "[ 3 ]"}]
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert main(["reward", "try.yaml", "--data", "mine", "--responses", "said.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert "said no" in printed and "2 responses: wrong 2 (100.0%)" in printed


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["--data", "nothing"], None, "no entry of `data` with prompts"),
        (["--data", "mine"], '{"id": "x", "response": "y"}', "1 rows have an id that 'mine' lacks, for example x"),
        (["--data", "mine"], '{"id": "x"}', "line 1: expected"),
        (["--data", "mine"], "[1]", "line 1: expected"),
        (["--data", "mine"], "", "no responses"),
        (["--data", "mine", "--limit", "0"], None, "give at least 1"),
    ],
)
def test_wrong_input_is_one_line(config, tmp_path, capsys, arguments, text, message):
    if text is not None:
        (tmp_path / "said.jsonl").write_text(text)
        arguments = [*arguments, "--responses", "said.jsonl"]
    assert main(["reward", "try.yaml", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_key_of_a_stage_changes_with_the_file_of_a_function(config, tmp_path):
    workflow = parse(WorkflowConfig, config | {"stages": {"base": {"role": "base", **config["stages"]["base"]}}}, "x")
    plain, before = data_digest(workflow, "train"), data_digest(workflow, "mine")
    assert data_digest(workflow, "mine") == before
    (tmp_path / "rewards.py").write_text(FUNCTION + "# changed\n")
    assert data_digest(workflow, "mine") != before and data_digest(workflow, "train") == plain
