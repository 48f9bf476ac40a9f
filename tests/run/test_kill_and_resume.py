"""Kill the run at any time: the same command resumes it, bit-identical to an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from s2d import DIRECT_ARM, LIMIT_SECONDS, ROOT, SMOKE, environment, metrics, processes_of, s2d, start, wait_for

JOBS = [
    "stages/teacher_base",
    "stages/rl_teacher",
    "stages/forward_kl",
    "stages/opd",
    "stages/stage3",
    "stages/student_grpo",
    "evaluations/stage3",
    "evaluations/student_grpo",
]


DIRECT_JOBS = ["stages/student_base", "stages/student_grpo", "evaluations/student_grpo"]


def assert_equals_unbroken(run_dir, unbroken, jobs=JOBS) -> None:
    for job in jobs:
        assert metrics(run_dir, job) == metrics(unbroken, job), job
    for arm in [job.removeprefix("evaluations/") for job in jobs if job.startswith("evaluations/")]:
        content = (run_dir / "evaluations" / arm / "evaluation.jsonl").read_bytes()
        assert content == (unbroken / "evaluations" / arm / "evaluation.jsonl").read_bytes()


def count_rows(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_resume_after_several_sigkills(unbroken, tmp_path):
    """Kills during base training, GRPO and OPD, each between two checkpoints, some of them saved asynchronously."""
    run_dir = tmp_path / "killed"
    async_saves = [f"stages.{stage}.checkpoint.async_save=true" for stage in ("teacher_base", "opd")]
    settings = [part for setting in async_saves for part in ("--set", setting)]
    for job, rows in (("stages/teacher_base", 30), ("stages/rl_teacher", 6), ("stages/opd", 5)):
        run = start("run", SMOKE, "--out", run_dir, *settings)
        path = run_dir / job / "metrics.jsonl"
        wait_for(lambda run=run, path=path, rows=rows: count_rows(path) >= rows or run.poll() is not None)
        assert run.poll() is None, run.stdout.read()
        run.send_signal(signal.SIGKILL)
        run.wait()
        wait_for(lambda: not processes_of(run_dir))
        assert not (run_dir / job / "finished.json").exists(), "the job ended before the kill: use fewer rows"
    finished = s2d("run", SMOKE, "--out", run_dir, *settings)
    assert finished.returncode == 0, finished.stderr
    lineage = json.loads((run_dir / "stages/opd/lineage.json").read_text())
    assert len(lineage["resumed"]) == 1
    assert_equals_unbroken(run_dir, unbroken)


def test_sigterm_saves_and_the_same_command_resumes(unbroken, tmp_path):
    run_dir = tmp_path / "stopped"
    run = start("run", SMOKE, "--out", run_dir, *DIRECT_ARM)
    wait_for(lambda: count_rows(run_dir / "stages/student_base/metrics.jsonl") >= 7)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode == 130 and "run the same command again to resume" in output
    assert list((run_dir / "stages/student_base/checkpoints").glob("step_*"))
    finished = s2d("run", SMOKE, "--out", run_dir, *DIRECT_ARM)
    assert finished.returncode == 0, finished.stderr
    assert_equals_unbroken(run_dir, unbroken, DIRECT_JOBS)


def test_killed_rank_stops_the_run_with_a_one_line_error(tmp_path):
    run_dir = tmp_path / "rank"
    run = start("run", SMOKE, "--out", run_dir)
    wait_for(lambda: count_rows(run_dir / "stages/teacher_base/metrics.jsonl") >= 3)
    victim = next(pid for pid in processes_of(run_dir / "stages/teacher_base") if pid != run.pid)
    os.kill(victim, signal.SIGKILL)
    output, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode == 3 and "was killed by signal 9" in output
    assert not processes_of(run_dir)


def test_hanging_rank_is_detected_by_the_watchdog(tmp_path):
    """One of two ranks is stopped: the other dumps its stacks, and the run ends."""
    run_dir = tmp_path / "hang"
    settings = ["parallel={tensor_model_parallel_size: 2}", "max_parallel_stages=1", "watchdog_timeout_seconds=6"]
    run = start("run", SMOKE, "--out", run_dir, *(part for setting in settings for part in ("--set", setting)))
    job = run_dir / "stages/teacher_base"
    wait_for(lambda: count_rows(job / "metrics.jsonl") >= 3)
    ranks = [pid for pid in processes_of(job) if pid != run.pid and any_open(pid, "rank1-heartbeat.txt")]
    os.kill(ranks[0], signal.SIGSTOP)
    output, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode == 3 and "made no progress for watchdog_timeout_seconds" in output, output
    assert "Thread" in (job / "rank0-heartbeat.txt").read_text()
    assert not processes_of(run_dir)


def any_open(pid: int, name: str) -> bool:
    return any(os.readlink(link).endswith(name) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())


def test_second_run_of_one_directory_waits(tmp_path):
    run_dir = tmp_path / "both"
    first = start("run", SMOKE, "--out", run_dir)
    wait_for(lambda: (run_dir / ".lock").exists() and (run_dir / ".lock").read_bytes())
    second = start("run", SMOKE, "--out", run_dir)
    time.sleep(3)
    assert second.poll() is None, "the second run waits for the first"
    for run in (second, first):
        run.send_signal(signal.SIGKILL)
        run.wait()


def test_non_finite_loss_stops_the_run(tmp_path):
    run_dir = tmp_path / "nan"
    finished = s2d(
        "run",
        SMOKE,
        "--out",
        run_dir,
        "--set",
        "models.student.initializer_range=1.0e+25",  # its squares leave the range of float32
        *DIRECT_ARM,
    )
    assert finished.returncode == 1
    assert "stages/student_base: the " in finished.stderr and "Traceback" not in finished.stderr
    assert not (run_dir / "stages/student_base/finished.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_workflow_runs_on_several_local_ranks(unbroken, tmp_path, layout):
    run_dir = tmp_path / "ranks"
    finished = s2d(
        "run", SMOKE, "--out", run_dir, "--set", f"parallel={json.dumps(layout)}", "--set", "max_parallel_stages=1"
    )
    assert finished.returncode == 0, finished.stderr
    assert_close_to_unbroken(run_dir, unbroken, "stages/teacher_base")


def assert_close_to_unbroken(run_dir, unbroken, job) -> None:
    """Compare the losses of ``job`` up to rounding and accuracies within four standard errors."""
    for row, expected_row in zip(metrics(run_dir, job), metrics(unbroken, job), strict=True):
        assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-3)
    results = json.loads((run_dir / "results.json").read_text())["arms"]
    expected = json.loads((unbroken / "results.json").read_text())["arms"]
    for name, arm in results.items():
        assert abs(arm["avg_at_k"] - expected[name]["avg_at_k"]) < 4 * expected[name]["std_err"]


def test_workflow_resumes_under_torchrun_at_another_layout(unbroken, tmp_path):
    """Killed on one rank, resumed by torchrun on two data-parallel ranks."""
    run_dir = tmp_path / "torchrun"
    run = start("run", SMOKE, "--out", run_dir, *DIRECT_ARM)
    wait_for(lambda: count_rows(run_dir / "stages/student_base/metrics.jsonl") >= 25)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (run_dir / "stages/student_base/finished.json").exists(), "the stage ended before the kill"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = subprocess.run(
        [*command, "-m", "megatron_s2d.cli", "run", SMOKE, "--out", run_dir, *DIRECT_ARM, "--elastic"],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        cwd=ROOT,
        env=environment(),
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_close_to_unbroken(run_dir, unbroken, "stages/student_base")
    assert set(json.loads((run_dir / "results.json").read_text())["arms"]) == {"direct_student_grpo"}
