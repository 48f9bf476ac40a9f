"""Starts a worker of this folder on several ranks: forks of one process, gloo, one thread a rank."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# Only ends a worker that hangs: a busy machine may need many times the usual seconds.
LIMIT_SECONDS = 1500


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(worker file, number of ranks, arguments): fails with the last lines that the ranks printed."""

    def run(worker: str, ranks: int, *arguments: object) -> None:
        folder = Path(__file__).parent
        command = [sys.executable, str(folder / "launch_ranks.py"), str(folder / worker), str(ranks)]
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            errors = process.communicate(timeout=LIMIT_SECONDS)[1]
        except subprocess.TimeoutExpired:
            for rank in psutil.Process(process.pid).children(recursive=True):
                rank.send_signal(signal.SIGABRT)  # prints the stacks of its threads
            try:
                errors = process.communicate(timeout=60)[1]
            finally:
                process.kill()
            pytest.fail(f"{worker} took more than {LIMIT_SECONDS} s on {ranks} ranks:\n{errors[-8000:]}")
        assert process.returncode == 0, errors[-4000:]

    return run
