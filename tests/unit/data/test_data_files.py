"""Rows of files: random samples, and the published form of Eurus-2-RL-Data."""

import json

import pytest

from megatron_s2d.config.base import parse
from megatron_s2d.config.data import FileSource
from megatron_s2d.data.problems import read_problems
from megatron_s2d.errors import UserError

CASES = json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [[2]]})


def source(path, **settings):
    return parse(FileSource, {"type": "file", "path": path, **settings}, "test")


def problems(path, rows, **settings):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_problems(source(path, **settings), {}))


def test_limit_with_a_seed_is_a_random_sample(tmp_path):
    def ids(rows, **settings):
        changed = {"columns": {"id": "id"}, "min_values": {"difficulty": 6}, "limit": 100} | settings
        return [problem.id for problem in problems(tmp_path / "train.jsonl", rows, **changed)]

    rows = [{"id": f"r{n}", "question": f"q{n}", "answer": "1", "difficulty": 5 + n % 2} for n in range(800)]
    kept = [f"train/r{n}" for n in range(1, 800, 2)]
    assert ids(rows) == kept[:100]
    sample = ids(rows, limit_seed=0)
    assert len(set(sample)) == 100 and sample == [id for id in kept if id in set(sample)]
    # About half of the sample is from the first half of the rows, with a standard deviation of 4.
    assert 35 < len(set(sample) & set(kept[:200])) < 65
    assert ids(rows, limit_seed=0) == sample and ids(rows, limit_seed=1) != sample
    assert set(ids(rows[::-1], limit_seed=0)) == set(sample)
    assert ids(rows, limit=400, limit_seed=0) == ids(rows, limit=1000, limit_seed=0) == kept


def test_a_sample_contains_no_row_twice(tmp_path):
    rows = [{"id": f"r{n % 10}", "question": f"q{n % 10}", "answer": "1"} for n in range(40)]
    settings = {"columns": {"id": "id"}, "on_duplicate_id": "drop", "limit": 6, "limit_seed": 3}
    assert len({problem.id for problem in problems(tmp_path / "a.jsonl", rows, **settings)}) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit_seed": 0}, "limit_seed is the seed of a sample of `limit` rows: set limit"),
        ({"limit": 5, "limit_seed": -1}, "limit_seed: Input should be greater than or equal to 0"),
        ({"limit": 5, "limit_seed": True}, "limit_seed: expected a number, got true"),
        ({"limit": 5, "limit_seed": 1.5}, "limit_seed: .*integer"),
        ({"limit": 5, "limit_seed": 10**13}, "limit_seed: .* is more than anything counted here"),
        ({"limit": 0, "limit_seed": 1}, "limit: Input should be greater than or equal to 1"),
    ],
)
def test_impossible_samples(settings, message):
    with pytest.raises(UserError, match=message):
        source("train.jsonl", **settings)


@pytest.mark.parametrize(
    "instruction",
    [
        "Write Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.",
        "Write Python code to solve the problem. Present the code in\n```python\nYour code\n``` at the end.\n",
        "Present the answer in LaTex format: \\boxed{Your answer}",
    ],
)
def test_templates_replace_the_instructions_of_eurus(tmp_path, instruction):
    content = f"Add 1 to `x`.\n\nExample: ```1```\n\n{instruction}"
    system = {"role": "system", "content": "When tackling complex reasoning tasks, you have access to actions."}
    row = {
        "prompt": [system, {"role": "user", "content": content}],
        "reward_model": {"ground_truth": CASES, "style": "rule"},
        "extra_info": {"index": 7, "split": "train"},
    }
    path, settings = tmp_path / "eurus.jsonl", {"schema": "eurus", "verifier": "code"}
    (problem,) = problems(path, [row], **settings, template="code")
    assert (problem.context, problem.question) == ([], "Add 1 to `x`.\n\nExample: ```1```")
    assert (problem.id, problem.answer) == ("eurus/0", CASES)
    (plain,) = problems(path, [row], **settings, template="plain")
    assert (plain.context, plain.question) == ([system], content)


def test_an_instruction_inside_a_question_of_eurus_remains(tmp_path):
    content = "Say: Present the answer in LaTex format: \\boxed{Your answer} and then stop."
    row = {"prompt": [{"role": "user", "content": content}], "reward_model": {"ground_truth": "4"}}
    (problem,) = problems(tmp_path / "a.jsonl", [row], schema="eurus")
    assert problem.question == content


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Add 1.", "row 1: 'prompt' is not a list of messages"),
        ([{"role": "assistant", "content": "Add 1."}], "row 1: the last message of 'prompt' is from the assistant"),
    ],
)
def test_other_rows_are_not_taken_for_eurus(tmp_path, prompt, message):
    with pytest.raises(UserError, match=message):
        problems(tmp_path / "a.jsonl", [{"prompt": prompt, "reward_model": {"ground_truth": "4"}}], schema="eurus")


def test_published_columns_of_programs(tmp_path):
    """LiveCodeBench has its tests in three columns, TACO in one of JSON text; other files have lists and objects."""
    code = {"verifier": "code", "template": "code"}
    case = {"input": "1", "output": "2", "testtype": "functional"}
    row = {
        "question_id": "3519", "question_content": "Add 1.", "starter_code": "class Solution:\n    def f(self, x):",
        "public_test_cases": json.dumps([case]), "private_test_cases": "[]", "metadata": '{"func_name": "f"}',
    }  # fmt: skip
    (problem,) = problems(tmp_path / "lcb.jsonl", [row], schema="livecodebench", **code)
    assert problem.id == "lcb/3519" and "def f(self, x):\n```" in problem.question
    assert json.loads(problem.answer) == {key: row[key] for key in row if "test_cases" in key or key == "metadata"}

    row = {"question": "Add 1.", "input_output": CASES, "solutions": '["def f(x):\\n    return x + 1"]'}
    (problem,) = problems(tmp_path / "taco.jsonl", [row | {"starter_code": None}], schema="apps", **code)
    assert problem.answer == CASES and problem.solution == "```python\ndef f(x):\n    return x + 1\n```"
    assert "standard input" in problem.question
    assert problems(tmp_path / "a.jsonl", [row | {"solutions": ""}], schema="apps", **code)[0].solution is None

    row = {"question": "Add 1.", "answer": [{"input": "1", "output": "2"}]}
    (problem,) = problems(tmp_path / "lists.jsonl", [row], **code)
    assert json.loads(problem.answer) == row["answer"]
    with pytest.raises(UserError, match="'answer' must be text or a number, not list"):
        problems(tmp_path / "lists.jsonl", [row])
    with pytest.raises(UserError, match="schema livecodebench has unit tests as labels: set verifier: code"):
        source(tmp_path / "lcb.jsonl", schema="livecodebench", verifier="math")
