"""Kill the run at any time: the same command resumes it, bit-identical to an uninterrupted run."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
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
    "stages/tool_grpo",
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
        wait_for(lambda path=path, rows=rows: count_rows(path) >= rows, run)
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
    """Stopped in its second stage; the first one is that of the other run."""
    run_dir = tmp_path / "stopped"
    shutil.copytree(unbroken / "stages/student_base", run_dir / "stages/student_base")
    run = start("run", SMOKE, "--out", run_dir, *DIRECT_ARM)
    wait_for(lambda: count_rows(run_dir / "stages/student_grpo/metrics.jsonl") >= 2, run)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode == 130 and "stopped by SIGTERM; run the same command again to resume" in output
    assert list((run_dir / "stages/student_grpo/checkpoints").glob("step_*"))
    finished = s2d("run", SMOKE, "--out", run_dir, *DIRECT_ARM)
    assert finished.returncode == 0, finished.stderr
    assert_equals_unbroken(run_dir, unbroken, DIRECT_JOBS)
    assert len(json.loads((run_dir / "stages/student_grpo/lineage.json").read_text())["resumed"]) == 1


def test_a_signal_to_all_processes_of_the_run_ends_it_as_one_to_the_runner_does(tmp_path):
    """Schedulers signal the process group: the process that ranks are forked from has to outlive the ranks."""
    run_dir = tmp_path / "stopped"
    run = start("run", SMOKE, "--out", run_dir, *DIRECT_ARM, start_new_session=True)
    wait_for(lambda: count_rows(run_dir / "stages/student_base/metrics.jsonl") >= 2, run)
    os.killpg(run.pid, signal.SIGTERM)
    output, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode == 130, output
    assert output.splitlines()[-1] == "stopped by SIGTERM; run the same command again to resume"
    assert "error" not in output and list((run_dir / "stages/student_base/checkpoints").glob("step_*"))
    assert not processes_of(run_dir)


def test_a_signal_during_the_preflight_ends_the_run_with_the_same_line(tmp_path):
    """The preflight asks a judge, which does not answer; the signal goes to all processes of the run."""
    with socket.create_server(("127.0.0.1", 0)) as judge:
        judge.settimeout(LIMIT_SECONDS)
        setting = f"data.pool.verifier=http://127.0.0.1:{judge.getsockname()[1]}/"
        run = start("run", SMOKE, "--out", tmp_path / "run", *DIRECT_ARM, "--set", setting, start_new_session=True)
        connection, _ = judge.accept()
        with connection:
            os.killpg(run.pid, signal.SIGTERM)
            output, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert (run.returncode, output) == (130, "stopped by SIGTERM; run the same command again to resume\n")
    assert not processes_of(tmp_path)


def test_second_run_of_one_directory_waits_and_a_killed_rank_stops_the_first(tmp_path):
    run_dir = tmp_path / "rank"
    run = start("run", SMOKE, "--out", run_dir)
    wait_for(lambda: (run_dir / ".lock").exists() and (run_dir / ".lock").read_bytes(), run)
    second = start("run", SMOKE, "--out", run_dir)
    assert f"in use by process {run.pid}" in second.stdout.readline() and second.poll() is None
    second.kill()
    second.wait()
    wait_for(lambda: count_rows(run_dir / "stages/teacher_base/metrics.jsonl") >= 3, run)
    victim = next(pid for pid in processes_of(run_dir / "stages/teacher_base") if pid != run.pid)
    os.kill(victim, signal.SIGKILL)
    output, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode == 3 and "was killed by signal 9" in output
    assert not processes_of(run_dir)


def test_hanging_rank_is_detected_by_the_watchdog(tmp_path):
    """One of two ranks is stopped: the other dumps its stacks, and the run ends."""
    run_dir = tmp_path / "hang"
    settings = ["parallel={tensor_model_parallel_size: 2}", "max_parallel_stages=1", "watchdog_timeout_seconds=12"]
    run = start("run", SMOKE, "--out", run_dir, *(part for setting in settings for part in ("--set", setting)))
    job = run_dir / "stages/teacher_base"
    wait_for(lambda: count_rows(job / "metrics.jsonl") >= 3, run)
    ranks = [pid for pid in processes_of(job) if pid != run.pid and any_open(pid, "rank1-log.txt")]
    os.kill(ranks[0], signal.SIGSTOP)
    output, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode == 3 and "made no progress for watchdog_timeout_seconds" in output, output
    (heartbeat,) = job.glob("*-heartbeat.txt")
    assert re.match(r"Timeout \(0:00:12\)!\nThread", heartbeat.read_text())  # of rank 0
    assert not processes_of(run_dir)


def any_open(pid: int, name: str) -> bool:
    return any(os.readlink(link).endswith(name) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())


def test_non_finite_loss_stops_the_run(tmp_path):
    run_dir = tmp_path / "nan"
    finished = s2d(
        "run",
        SMOKE,
        "--out",
        run_dir,
        "--set",
        "stages.student_base.optimizer.adam_eps=1.0e-300",  # 0 in float32: tokens without a gradient divide by it
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


@pytest.mark.slow
def test_workflow_resumes_under_torchrun_at_another_layout(unbroken, tmp_path):
    """Killed on one rank, resumed by torchrun on two data-parallel ranks."""
    run_dir = tmp_path / "torchrun"
    run = start("run", SMOKE, "--out", run_dir, *DIRECT_ARM)
    wait_for(lambda: count_rows(run_dir / "stages/student_base/metrics.jsonl") >= 25, run)
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
