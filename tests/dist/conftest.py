"""Starts a worker of this folder on several ranks: forks of one process, gloo, one thread a rank."""

import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# Only ends a worker that hangs: a busy machine may need many times the usual seconds.
LIMIT_SECONDS = 1500


class RankServer:
    """A process that has imported the libraries once and forks the ranks of every launch."""

    def __init__(self, directory: Path):
        self._directory, self._launches = directory, 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("launch_ranks.py"))],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, worker: str, ranks: int, *arguments: object) -> None:
        """Run a worker of this folder; fail with the last lines that its ranks printed."""
        self._launches += 1
        errors = self._directory / f"{self._launches}.txt"
        request = {
            "worker": str(Path(__file__).with_name(worker)),
            "ranks": ranks,
            "arguments": [str(argument) for argument in arguments],
            "stderr": str(errors),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if not self._answers(LIMIT_SECONDS):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                process.send_signal(signal.SIGABRT)  # prints the stacks of its threads
            self._answers(60)
            pytest.fail(f"{worker} took more than {LIMIT_SECONDS} s on {ranks} ranks:\n{errors.read_text()[-8000:]}")
        assert self._process.stdout.readline() == "0\n", errors.read_text()[-4000:] if errors.exists() else "no output"

    def _answers(self, seconds: float) -> bool:
        """Wait until the process prints; return whether it did so, or ended, within ``seconds``."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory):
    """run_ranks(worker file, number of ranks, arguments): fails with the last lines that the ranks printed."""
    server = RankServer(tmp_path_factory.mktemp("ranks"))
    yield server.run
    server.close()
