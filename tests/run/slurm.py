"""A real SLURM on this machine, and launches on it, for the tests of this folder."""

import contextlib
import datetime
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s2d import s2d

WORKFLOW = Path(__file__).with_name("slurm.yaml")
CLUSTER_SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
CLUSTER_FILE = """
gpus_per_node: 0
time_limit_minutes: 10
sbatch: [--exclusive]
environment: {GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: "1", PYTHONWARNINGS: ignore}
"""


class Cluster:
    """A running SLURM cluster, and launches on it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.file = directory / "cluster.yaml"
        self.file.write_text(CLUSTER_FILE)

    def script(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
        command = [str(CLUSTER_SCRIPT), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=1500, stdin=subprocess.DEVNULL)
        assert result.returncode == 0 or not check, result.stdout + result.stderr
        return result

    def launch(self, run_dir: Path, *arguments: str, nodes: int = 2) -> dict[str, int]:
        """Submit the test's workflow and return the job id of each task."""
        result = launch("slurm", run_dir, "--cluster", self.file, "--nodes", nodes, *arguments)
        assert result.returncode == 0, result.stderr
        lines = [line.rpartition(": job ") for line in result.stdout.splitlines() if ": job " in line]
        return {name: int(number) for name, _, number in lines}

    def num_idle(self) -> int:
        return int(query("sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D").strip() or 0)

    def state(self, job: int) -> str:
        return query("scontrol", "show", "job", str(job)).partition("JobState=")[2].split()[0]

    def restarts(self, job: int) -> int:
        return int(query("scontrol", "show", "job", str(job)).partition("Restarts=")[2].split()[0])

    def submitted(self, job: int) -> float:
        """Return when the job came into the queue, in seconds since the epoch."""
        text = query("scontrol", "show", "job", str(job)).partition("SubmitTime=")[2].split()[0]
        return datetime.datetime.fromisoformat(text).timestamp()

    def finish(self, job: int, run_dir: Path, timeout: float = 1500) -> None:
        """Wait until the job has succeeded."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait(lambda: self.state(job) in ends, run_dir, timeout)
        assert self.state(job) == "COMPLETED", logs(run_dir)


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, timeout=1500, check=True)


def query(*command: str) -> str:
    """Return the output of a query, with retries: on a busy machine SLURM's commands may lose the controller."""
    for _ in range(5):
        result = subprocess.run(command, capture_output=True, text=True, timeout=1500)
        if result.returncode == 0:
            return result.stdout
        time.sleep(1)
    raise AssertionError(f"{command}: {result.stderr}")


def is_idle() -> bool:
    """Return whether no job is running or pending."""
    return not query("squeue", "--noheader")


def launch(*arguments: object) -> subprocess.CompletedProcess:
    launcher, run_dir, *others = arguments
    return s2d("launch", launcher, WORKFLOW, "--out", run_dir, *others, timeout=1500)


def wait(condition, run_dir: Path, timeout: float = 1500) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"timed out\n{logs(run_dir)}"
        time.sleep(0.2)


def logs(run_dir: Path) -> str:
    paths = sorted((run_dir / "launch").glob("*/*.log"))
    return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in paths)


@contextlib.contextmanager
def slurm_cluster(directory: Path, nodes: int = 2) -> Iterator[Cluster]:
    """Start a cluster whose files lie in ``directory``; skip the test where that is impossible."""
    path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (on Debian: apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = 15000 + probe.getsockname()[1] % 4000
    cluster = Cluster(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(directory / "slurm.conf"))
        try:
            cluster.script("up", directory, port, nodes)
            yield cluster
        finally:
            cluster.script("down", directory, check=False)
