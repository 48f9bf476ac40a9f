"""Files of a run directory that someone edited, merged or truncated are refused in one line that names the place."""

import json
import types

import pytest

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.cli import main
from megatron_s2d.errors import UserError
from megatron_s2d.report.evaluation import read_evaluation
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.run_samples import run_samples

DEEP = "[" * 200_000
VALUES = ["", "[]", "{}", "null", '"x"', "3", DEEP, '{"a": ' * 20_000]
LINEAGE = {key: {} for key in ("inputs", "seeds", "code", "libraries")} | {
    "resumed": [],
    "started": "now",
    "finished": None,
}
FINISHED = {"key": "k", "seconds": 1.5, "outputs": {"model": "d"}, "peak_memory": 3}
ROW = {
    "problem_id": "p0",
    "domain": "math",
    "rewards": [1.0, 0.0],
    "response_lengths": [3, 4],
    "finish_reasons": ["stop", "length"],
}
RESPONSE = {
    "step": 1,
    "problem_id": "p0",
    "prompt": "1+1",
    "response": "2",
    "answer": "2",
    "reward": 1.0,
    "verifier_label": "correct",
    "finish_reason": "stop",
    "tokens": [{"text": "2", "advantage": 0.5}],
}


def wrong(document):
    """The document with each field of another type, and without it."""
    for key in document:
        for value in ("x", None, [], {}, [{}], float("inf"), -1):
            if type(value) is not type(document[key]):
                yield {**document, key: value}
        yield {name: value for name, value in document.items() if name != key}


def refuse(action, path, content, *, always=True):
    path.write_text(content)
    try:
        action()
    except UserError as error:
        assert "\n" not in str(error) and path.name in str(error)
        return
    assert not always, f"{content[:100]} was accepted"


@pytest.mark.parametrize("content", VALUES)
@pytest.mark.parametrize("name", ["lineage", "finished"])
def test_records_of_a_stage(tmp_path, name, content):
    refuse(getattr(StageDirectory(tmp_path), name), tmp_path / f"{name}.json", content)


def test_fields_of_the_records_of_a_stage(tmp_path):
    directory = StageDirectory(tmp_path)
    for name, document in (("lineage", LINEAGE), ("finished", FINISHED)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(document))
        assert getattr(directory, name)() == document
        for edited in wrong(document):
            refuse(
                getattr(directory, name),
                path,
                json.dumps(edited),
                always=name == "lineage" and edited.keys() < LINEAGE.keys(),
            )


def test_rows_of_metrics(tmp_path):
    directory = StageDirectory(tmp_path)
    good = {"step": 1, "loss": 0.5, "reward": None}
    directory.metrics_path.write_text(json.dumps(good) + "\n")
    assert directory.metrics() == [good]
    for row in ({"loss": 0.5}, {"step": "x"}, {"step": 1, "loss": "x"}, {"step": 1, "loss": []}, [], 3, None):
        refuse(directory.metrics, directory.metrics_path, f"{json.dumps(good)}\n{json.dumps(row)}\n")


@pytest.mark.parametrize("content", [*VALUES[1:], *map(json.dumps, wrong(ROW))])
def test_rows_of_an_evaluation(tmp_path, content):
    path = tmp_path / "evaluation.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    assert read_evaluation(path).problem_ids == ("p0",)
    refuse(lambda: read_evaluation(path), path, content + "\n", always="problem_id" not in content)


def test_rows_of_responses(tmp_path):
    job = Job("stages/a", "a", None, StageDirectory(tmp_path), {}, {}, 0, "reuse", "finished")
    preflight = types.SimpleNamespace(prompts={})
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps(RESPONSE) + "\n")
    assert run_samples([job], preflight).examples[0].response == "2"
    for row in (*wrong(RESPONSE), {**RESPONSE, "more": 1}, {**RESPONSE, "tokens": [{"text": 1}]}):
        refuse(lambda: run_samples([job], preflight), path, json.dumps(row) + "\n", always=False)


def test_rows_of_graded_responses(tmp_path):
    job = Job("stages/a", "a", None, StageDirectory(tmp_path), {}, {}, 0, "reuse", "finished")
    preflight = types.SimpleNamespace(prompts={})
    row = {key: value for key, value in RESPONSE.items() if key not in ("prompt", "answer", "tokens")} | {"sample": 0}
    path = tmp_path / "validation" / "step_1" / "curve.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(row) + "\n")
    assert run_samples([job], preflight).examples[0].response == "2"
    for edited in wrong(row):
        refuse(lambda: run_samples([job], preflight), path, json.dumps(edited) + "\n", always=False)


@pytest.mark.parametrize("content", [*VALUES, '{"arms": []}', '{"arms": {"a": 3}}', '{"arms": {"a": {}}}'])
@pytest.mark.parametrize("command", ["eval", "report", "generate"])
def test_config_of_a_run(tmp_path, capsys, command, content):
    (tmp_path / "config.json").write_text(content)
    arguments = ["arm", "--prompt", "1"] if command == "generate" else []
    assert main([command, str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "internal error" not in error
