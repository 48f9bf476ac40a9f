"""A hundred kills, each just before a file operation of the run: no step is lost or repeated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from s2d import ROOT, SMOKE, environment, metrics, s2d

PROGRAM = Path(__file__).with_name("killed_run.py")


def killed_run(run_dir, seed, kills, timeout, program=PROGRAM, config=SMOKE, part=()):
    result = subprocess.run(
        [sys.executable, program, config, run_dir, str(seed), str(kills), *part],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment(),
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    return int(result.stdout.split()[-1])


def validations(job):
    """The rows of a job without the clock, and its responses by file."""
    path = job / "validation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [{key: value for key, value in row.items() if key not in ("seconds", "at")} for row in rows]
    return rows, {file.relative_to(job): file.read_bytes() for file in job.glob("validation/*/*")}


def assert_equals(run_dir, unbroken):
    finished = s2d("run", SMOKE, "--out", run_dir)  # all jobs are finished: this only writes the report
    assert finished.returncode == 0, finished.stderr
    assert (run_dir / "label_ledger.json").read_bytes() == (unbroken / "label_ledger.json").read_bytes()
    for path in sorted([*unbroken.glob("stages/*/"), *unbroken.glob("evaluations/*/")]):
        job = str(path.relative_to(unbroken))
        rows = metrics(run_dir, job)
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), job
        assert rows == metrics(unbroken, job), job
        assert validations(run_dir / job) == validations(unbroken / job), job
        if job.startswith("evaluations"):
            evaluations = [(folder / job / "evaluation.jsonl").read_bytes() for folder in (run_dir, unbroken)]
            assert evaluations[0] == evaluations[1], job


@pytest.mark.slow
def test_a_hundred_kills(unbroken, tmp_path):
    kills, runs = 0, 0
    while kills < 100:
        runs += 1
        run_dir = tmp_path / f"run{runs}"
        kills += killed_run(run_dir, seed=runs, kills=100 - kills, timeout=1500)
        assert_equals(run_dir, unbroken)
    print(f"{kills} kills over {runs} runs")


@pytest.mark.slow
def test_a_few_kills(unbroken, tmp_path):
    run_dir = tmp_path / "run"
    assert killed_run(run_dir, seed=7, kills=8, timeout=1500) == 8
    assert_equals(run_dir, unbroken)


@pytest.mark.slow
def test_kills_between_the_responses_of_validations(unbroken, tmp_path):
    """The processes are killed in the middle of a validation, and the next ones go on with its next batch."""
    run_dir = tmp_path / "run"
    assert killed_run(run_dir, seed=3, kills=8, timeout=1500, part=["/validation/"]) == 8
    assert_equals(run_dir, unbroken)


@pytest.mark.slow
def test_twenty_kills_of_an_asynchronous_run_with_tools(tmp_path):
    """Every step is trained once, and all steps together on each of the first prompts of the order once."""
    program = PROGRAM.with_name("killed_async_run.py")
    kills, runs = 0, 0
    while kills < 20:
        runs += 1
        run_dir = tmp_path / f"run{runs}"
        config = program.with_name("async_tools.yaml")
        kills += killed_run(run_dir, runs, 20 - kills, 1500, program, config)
        rows = metrics(run_dir, "stages/grpo")
        assert [row["step"] for row in rows] == list(range(1, 13))
        assert max(row["rollout/staleness_max"] for row in rows) <= 2
        lines = (tmp_path / f"run{runs}-steps.jsonl").read_text().splitlines()
        steps = {line["step"]: line for line in map(json.loads, lines)}  # of a repeated step the last one counts
        groups = [name for step in range(1, 13) for name in steps[step]["groups"]]
        assert len(set(groups)) == len(groups) == 12 * 8
        prompts = {name.partition("@")[0] for name in groups}
        assert prompts == set(steps[1]["order"]) and len(prompts) == len(groups)
        assert max(line["turns"] for line in steps.values()) > 1
        assert json.loads((run_dir / "stages/grpo/finished.json").read_text())["outputs"]
    print(f"{kills} kills over {runs} runs, {len(lines)} steps begun in the last")
