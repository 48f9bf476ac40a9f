"""A hundred kills, each just before a file operation of the run: no step is lost or repeated."""

import subprocess
import sys
from pathlib import Path

import pytest
from s2d import ROOT, SMOKE, environment, metrics, s2d

PROGRAM = Path(__file__).with_name("killed_run.py")


def killed_run(run_dir, seed, kills, timeout):
    result = subprocess.run(
        [sys.executable, PROGRAM, SMOKE, run_dir, str(seed), str(kills)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment(),
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    return int(result.stdout.split()[-1])


def assert_equals(run_dir, unbroken):
    finished = s2d("run", SMOKE, "--out", run_dir)  # all jobs are finished: this only writes the report
    assert finished.returncode == 0, finished.stderr
    assert (run_dir / "label_ledger.json").read_bytes() == (unbroken / "label_ledger.json").read_bytes()
    for path in sorted([*unbroken.glob("stages/*/"), *unbroken.glob("evaluations/*/")]):
        job = str(path.relative_to(unbroken))
        rows = metrics(run_dir, job)
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), job
        assert rows == metrics(unbroken, job), job
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
