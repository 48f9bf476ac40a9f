"""Distillation from ``s2d serve-teacher``: the figures of a teacher in the trainer, and kills of either side."""

import signal
import sys
from pathlib import Path

import pytest
from s2d import ROOT, metrics, processes_of, s2d, s2d_here, start, wait_for

sys.path.insert(0, str(ROOT / "tests" / "dist"))
from teacher_server import running, start_server

CONFIG = ROOT / "configs" / "teacher_service.yaml"
SHORT = ("stages.teacher.steps=20", "stages.student.steps=10", "data.problems.num_prompts=16")


def overrides(*settings: str) -> list[str]:
    return [part for setting in (*SHORT, *settings) for part in ("--set", setting)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run with a teacher, a start of the student, and the arm that needs no server."""
    directory = tmp_path_factory.mktemp("service") / "run"
    finished = s2d("run", CONFIG, "--out", directory, *overrides("arms={in_trainer: opd_in_trainer}"))
    assert finished.returncode == 0, finished.stderr
    return directory


def test_a_served_teacher_gives_the_figures_of_one_in_the_trainer(run_dir):
    with running(run_dir / "stages/teacher/model") as server:
        url = f"stages.opd_served.teacher_service.url={server.url}"
        plan = s2d_here("run", CONFIG, "--out", run_dir, "--dry-run", *overrides(url))
        line = next(line for line in plan.stdout.splitlines() if "none of them in the trainer" in line)
        assert "as this stage asks: hidden 384 B; " in line and "sampled 4 B" in line
        finished = s2d("run", CONFIG, "--out", run_dir, *overrides(url))
        assert finished.returncode == 0, finished.stderr
        assert server.close() == 0
    served, expected = (metrics(run_dir, f"stages/opd_{name}") for name in ("served", "in_trainer"))
    assert len(served) == 6
    for mine, other in zip(served, expected, strict=True):
        # A token more or less with a rounding error above 1e-6 makes a histogram's column come or go.
        mine, other = ({key: row[key] for key in row if "mismatch/hist" not in key} for row in (mine, other))
        assert mine == pytest.approx(other, rel=2e-5, abs=2e-5)
    rows = [run_dir / "evaluations" / f"opd_{name}" / "evaluation.jsonl" for name in ("served", "in_trainer")]
    assert rows[0].read_bytes() == rows[1].read_bytes()


@pytest.mark.slow
def test_a_run_outlives_its_server_and_refuses_another_teacher(run_dir, tmp_path):
    steps = ("arms={served: opd_served}", "stages.opd_served.steps=60", "stages.opd_served.train_batch_size=4")
    path = run_dir / "stages/opd_served/metrics.jsonl"

    def num_rows() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    first = start_server(run_dir / "stages/teacher/model")
    port = f"port={first.url.rpartition(':')[2]}"
    settings = overrides(*steps, f"stages.opd_served.teacher_service.url={first.url}")
    run = start("run", CONFIG, "--out", run_dir, *settings)
    wait_for(lambda: num_rows() >= 3, run)
    first.kill()
    rows = num_rows()
    second = start_server(run_dir / "stages/teacher/model", port)  # the same weights: the run goes on
    wait_for(lambda: num_rows() >= rows + 3, run)
    second.kill()
    third = start_server(run_dir / "stages/student/model", port)
    output, _ = run.communicate()
    assert run.returncode == 1 and "does not hold the teacher with which this stage began" in output
    third.kill()
    with running(run_dir / "stages/teacher/model", port):
        run = start("run", CONFIG, "--out", run_dir, *settings)
        rows = num_rows()
        wait_for(lambda: num_rows() >= rows + 3, run)
        run.send_signal(signal.SIGKILL)
        run.wait()
        wait_for(lambda: not processes_of(run_dir))
        finished = s2d("run", CONFIG, "--out", run_dir, *settings)
        assert finished.returncode == 0, finished.stderr
        broken = metrics(run_dir, "stages/opd_served")
        unbroken = tmp_path / "unbroken"
        (unbroken / "stages").mkdir(parents=True)
        finished = s2d("run", CONFIG, "--out", unbroken, *settings)
        assert finished.returncode == 0, finished.stderr
    assert broken == metrics(unbroken, "stages/opd_served") and len(broken) == 60
