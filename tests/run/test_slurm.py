"""Launchers on a real SLURM of two nodes: killed, preempted and timed-out jobs resume with identical results."""

import json
import signal
from pathlib import Path

import pytest
from s2d import metrics, start
from slurm import WORKFLOW, Cluster, is_idle, launch, logs, slurm_cluster, wait
from slurm import command as slurm

JOBS = ["stages/student_base", "stages/student_grpo", "evaluations/student_grpo"]


def rows(run_dir: Path, job: str) -> int:
    path = run_dir / job / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_equals(run_dir: Path, unbroken: Path) -> None:
    """Check equal metrics in every step, every step once, and equal label ledgers."""
    for job in JOBS:
        assert metrics(run_dir, job) == metrics(unbroken, job), job
    for job in JOBS[:2]:
        steps = [row["step"] for row in metrics(run_dir, job)]
        assert steps == list(range(1, len(steps) + 1)), job
    evaluation = "evaluations/student_grpo/evaluation.jsonl"
    assert (run_dir / evaluation).read_bytes() == (unbroken / evaluation).read_bytes()
    assert json.loads((run_dir / "label_ledger.json").read_text()) == json.loads(
        (unbroken / "label_ledger.json").read_text()
    )
    assert not (run_dir / "stages/.archive").exists() and (run_dir / "report.html").exists()


def resumes(run_dir: Path, job: str) -> int:
    return len(json.loads((run_dir / job / "lineage.json").read_text())["resumed"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def local_run(tmp_path_factory) -> Path:
    """An uninterrupted run of two ranks on this machine, with torchrun."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    result = launch("local", run_dir, "--processes-per-node", "2")
    assert result.returncode == 0, result.stderr
    return run_dir


def test_job_on_two_nodes_equals_the_local_run(cluster, local_run, tmp_path):
    run_dir = tmp_path / "it's a 100% run"
    job = cluster.launch(run_dir)["run"]
    cluster.finish(job, run_dir)
    assert_equals(run_dir, local_run)
    assert cluster.restarts(job) == 0 and resumes(run_dir, "stages/student_base") == 0
    assert (run_dir / "launch").is_dir() and "done in" in logs(run_dir)


def launch_and_wait_for_training(cluster: Cluster, run_dir: Path, *arguments: str) -> int:
    """Launch a job and wait until it is in base training."""
    job = cluster.launch(run_dir, *arguments)["run"]
    wait(lambda: rows(run_dir, "stages/student_base") >= 15, run_dir)
    return job


@pytest.mark.slow
def test_lost_node_requeues_the_job(cluster, local_run, tmp_path):
    run_dir = tmp_path / "node"
    job = launch_and_wait_for_training(cluster, run_dir)
    cluster.script("kill", cluster.directory, "node2")
    assert not (run_dir / "stages/student_base/finished.json").exists()
    wait(lambda: cluster.state(job) == "PENDING", run_dir)
    cluster.script("start", cluster.directory, "node2")
    cluster.finish(job, run_dir)
    assert cluster.restarts(job) == 1 and resumes(run_dir, "stages/student_base") >= 1
    assert_equals(run_dir, local_run)


@pytest.mark.slow
def test_job_continues_on_the_remaining_node(cluster, local_run, tmp_path):
    """Two data-parallel ranks become one: the same steps on the same samples, with another order of summation."""
    run_dir = tmp_path / "shrunk"
    job = launch_and_wait_for_training(cluster, run_dir, "--cluster-set", "min_nodes=1")
    cluster.script("kill", cluster.directory, "node2")
    try:
        cluster.finish(job, run_dir)
    finally:
        cluster.script("start", cluster.directory, "node2")
    assert cluster.restarts(job) == 0 and resumes(run_dir, "stages/student_base") == 1
    assert "nodes left: node1\n" in logs(run_dir)
    for row, expected in zip(metrics(run_dir, JOBS[0]), metrics(local_run, JOBS[0]), strict=True):
        assert row["step"] == expected["step"] and row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert json.loads((run_dir / "label_ledger.json").read_text()) == json.loads(
        (local_run / "label_ledger.json").read_text()
    )


@pytest.mark.slow
def test_killed_step_restarts_within_the_job(cluster, local_run, tmp_path):
    run_dir = tmp_path / "step"
    job = launch_and_wait_for_training(cluster, run_dir)
    slurm("scancel", "--signal=KILL", f"{job}.0")
    cluster.finish(job, run_dir)
    assert cluster.restarts(job) == 0 and resumes(run_dir, "stages/student_base") == 1
    assert "attempt 0: the ranks ended with code" in logs(run_dir)
    assert_equals(run_dir, local_run)


@pytest.mark.slow
def test_preempted_job_resumes(cluster, local_run, tmp_path):
    run_dir = tmp_path / "preempted"
    job = launch_and_wait_for_training(cluster, run_dir)
    options = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log"]
    urgent = int(slurm("sbatch", "--parsable", *options, "--wrap", "srun sleep 2").stdout)
    cluster.finish(urgent, run_dir)
    cluster.finish(job, run_dir)
    assert cluster.restarts(job) == 1 and resumes(run_dir, "stages/student_base") == 1
    assert_equals(run_dir, local_run)


@pytest.mark.slow
def test_cancelled_job_is_resumed_by_a_new_launch(cluster, local_run, tmp_path):
    run_dir = tmp_path / "cancelled"
    job = launch_and_wait_for_training(cluster, run_dir)
    slurm("scancel", str(job))
    wait(is_idle, run_dir)
    assert cluster.state(job) == "CANCELLED" and cluster.restarts(job) == 0
    job = cluster.launch(run_dir)["run"]
    cluster.finish(job, run_dir)
    assert resumes(run_dir, "stages/student_base") == 1
    assert_equals(run_dir, local_run)


@pytest.mark.slow
def test_job_saves_before_its_time_limit_and_resumes(cluster, tmp_path):
    """SLURM checks limits twice a minute: the signal comes 60 to 90 seconds after the start, during the stage."""
    longer = ["--set", "stages.student_base.steps=4000", "--set", "stages.student_base.checkpoint.interval_steps=2000"]
    limit = ["--cluster-set", "time_limit_minutes=4", "--cluster-set", "signal_seconds=150"]
    run_dir = tmp_path / "limit"
    saved = run_dir / "stages/student_base/checkpoints"
    job = cluster.launch(run_dir, *longer, *limit)["run"]
    wait(lambda: cluster.restarts(job) == 1 and cluster.state(job) == "PENDING", run_dir, 400)
    stopped = rows(run_dir, "stages/student_base")
    assert 0 < stopped < 4000 and (saved / f"step_{stopped:08d}").is_dir(), logs(run_dir)
    assert "back into the queue" in logs(run_dir)
    cluster.finish(job, run_dir, timeout=1500)
    assert resumes(run_dir, "stages/student_base") >= 1
    unbroken = tmp_path / "unbroken"
    result = launch("local", unbroken, *longer)
    assert result.returncode == 0, result.stderr
    assert_equals(run_dir, unbroken)


@pytest.mark.slow
def test_one_job_per_stage_gives_the_same_run(cluster, local_run, tmp_path):
    run_dir = tmp_path / "stages"
    jobs = cluster.launch(run_dir, "--per-stage")
    assert list(jobs) == ["student_base", "student_grpo", "report"]
    cluster.finish(jobs["report"], run_dir)
    assert_equals(run_dir, local_run)
    assert list(cluster.launch(run_dir, "--per-stage", "--dry-run")) == []
    plans = [json.loads(path.read_text()) for path in (run_dir / "launch").glob("*/processes.json")]
    assert ["report"] in [[task["name"] for task in plan] for plan in plans], "finished stages are not submitted again"


@pytest.mark.slow
def test_user_error_is_not_retried_and_cancels_dependent_stages(cluster, tmp_path):
    run_dir = tmp_path / "mistake"
    wrong = ["--set", "stages.student_base.optimizer={lr: 1.0e+30, grad_clip: 0}"]
    jobs = cluster.launch(run_dir, "--per-stage", *wrong)
    wait(is_idle, run_dir)
    assert cluster.state(jobs["student_base"]) == "FAILED", logs(run_dir)
    assert cluster.state(jobs["student_grpo"]) == cluster.state(jobs["report"]) == "CANCELLED"
    assert "attempt 0" not in logs(run_dir) and "error: " in logs(run_dir)


@pytest.mark.slow
def test_terminated_local_launch_saves_and_resumes(local_run, tmp_path):
    run_dir = tmp_path / "stopped"
    running = start("launch", "local", WORKFLOW, "--out", run_dir)
    wait(lambda: rows(run_dir, "stages/student_base") >= 15, run_dir)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=1500)
    assert running.returncode == 130 and "run the same command again to resume" in output
    saved = sorted((run_dir / "stages/student_base/checkpoints").glob("step_*"))[-1].name
    assert int(saved.removeprefix("step_")) == rows(run_dir, "stages/student_base")
    assert launch("local", run_dir).returncode == 0
    assert_equals(run_dir, local_run)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_nemo_run_experiment_gives_the_same_run(executor, request, local_run, tmp_path):
    pytest.importorskip("nemo_run", reason="NeMo-Run is not installed (the extra `launch`)")
    run_dir = tmp_path / "nemo"
    if executor == "local":
        result = launch("nemo-run", run_dir, "--executor", "local", "--processes-per-node", "2")
    else:
        cluster = request.getfixturevalue("cluster")
        result = launch("nemo-run", run_dir, "--nodes", "2", "--cluster", cluster.file)
        wait(is_idle, run_dir, 420)
    assert result.returncode == 0, result.stderr
    assert (run_dir / "report.html").exists(), result.stdout
    assert_equals(run_dir, local_run)
