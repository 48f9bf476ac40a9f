"""The SLURM launcher at 32 nodes: start of a job, a lost node, requeue, and how long each takes.

The controller and 32 node daemons are real, and so are the launcher, its scripts, srun and the queue. Ranks are
``stand_in_trainer.py``: 32 ranks that import PyTorch would measure this machine.
"""

import json
import sys
from pathlib import Path

import pytest
from slurm import Cluster, logs, slurm_cluster, wait

NODES = 32
TRAINER = Path(__file__).with_name("stand_in_trainer.py")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), NODES) as running:
        yield running


def launch(cluster: Cluster, run_dir: Path, nodes: int, *arguments: str) -> int:
    """Submit a job with one stand-in rank a node, and return its id."""
    interpreter = cluster.directory / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {TRAINER} "$@"\n')
    interpreter.chmod(0o755)
    settings = ["--set", f"parallel.data_parallel_size={nodes}", "--cluster-set", f"python={interpreter}"]
    return cluster.launch(run_dir, *settings, *arguments, nodes=nodes)["run"]


def steps(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def restarted(run_dir: Path, **expected: object) -> list[dict]:
    """Steps whose fields have the ``expected`` values."""
    return [row for row in steps(run_dir) if all(row[key] == value for key, value in expected.items())]


def lose(cluster: Cluster, run_dir: Path, node: str) -> float:
    """Kill a node once there is a checkpoint, and return the time of the last step before."""
    wait(lambda: (run_dir / "checkpoint.json").exists(), run_dir)
    cluster.script("kill", cluster.directory, node)
    return steps(run_dir)[-1]["time"]


def finish(cluster: Cluster, job: int, run_dir: Path) -> None:
    (run_dir / "enough").touch()
    cluster.finish(job, run_dir)
    numbers = [row["step"] for row in steps(run_dir)]
    assert numbers == list(range(1, len(numbers) + 1)), "every step once"


@pytest.mark.slow
def test_lost_node_is_replaced_by_a_spare_one(cluster, tmp_path, capsys):
    """31 of 32 nodes: SLURM notices the loss (SlurmdTimeout is 10 s here), requeues, and starts on the other 31."""
    run_dir = tmp_path / "run"
    job = launch(cluster, run_dir, NODES - 1)
    submitted = cluster.submitted(job)
    lost = lose(cluster, run_dir, "node17")
    started = steps(run_dir)[0]["time"]
    try:
        wait(lambda: restarted(run_dir, restart="1"), run_dir)
        again = restarted(run_dir, restart="1")[0]
        finish(cluster, job, run_dir)
    finally:
        cluster.script("start", cluster.directory, "node17")
    assert cluster.restarts(job) == 1 and {row["ranks"] for row in steps(run_dir)} == {NODES - 1}, logs(run_dir)
    with capsys.disabled():
        print(
            f"\nsubmission to first step: {started - submitted:.1f} s; loss to next step: {again['time'] - lost:.1f} s"
        )


@pytest.mark.slow
def test_job_continues_on_the_nodes_that_are_left(cluster, tmp_path, capsys):
    """All 32 nodes with ``min_nodes``: no way through the queue."""
    run_dir = tmp_path / "run"
    wait(lambda: cluster.num_idle() == NODES, run_dir)
    job = launch(cluster, run_dir, NODES, "--cluster-set", f"min_nodes={NODES // 2}")
    lost = lose(cluster, run_dir, "node5")
    try:
        wait(lambda: restarted(run_dir, ranks=NODES - 1), run_dir)
        again = restarted(run_dir, ranks=NODES - 1)[0]
        finish(cluster, job, run_dir)
    finally:
        cluster.script("start", cluster.directory, "node5")
    assert cluster.restarts(job) == 0 and again["restart"] == "0", logs(run_dir)
    with capsys.disabled():
        print(f"\nloss to next step on {NODES - 1} nodes: {again['time'] - lost:.1f} s")
