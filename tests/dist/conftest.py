"""Starts a worker of this folder on several ranks: torchrun, gloo, one thread a rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(worker file, number of ranks, arguments of the worker): fails with the end of what the ranks printed."""

    def run(worker: str, ranks: int, *arguments: object) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        finished = subprocess.run(
            [*command, str(Path(__file__).with_name(worker)), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert finished.returncode == 0, finished.stderr[-4000:]

    return run
