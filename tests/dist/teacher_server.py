"""``s2d serve-teacher`` as a process, for tests."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


class Server:
    """A server that has said where it is."""

    def __init__(self, process: subprocess.Popen, line: str):
        self.process, self.line = process, line
        found = re.match(r"teacher at (\S+), weights_digest (\w+)", line)
        assert found is not None, f"the server said: {line!r}"
        self.url, self.digest = found.groups()

    def kill(self) -> None:
        """As a machine that fails: no time to say anything."""
        self.process.kill()
        self.process.wait(30)

    def close(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def start_server(directory: Path, *overrides: str, errors: Path | None = None) -> Server:
    arguments = ["tokenizer=task:modular_arithmetic", "precision=float32", "port=0", *overrides]
    command = [sys.executable, "-m", "megatron_s2d.cli", "serve-teacher", "--model", str(directory)]
    process = subprocess.Popen(
        [*command, *(part for value in arguments for part in ("--set", value))],
        stdout=subprocess.PIPE,
        stderr=None if errors is None else errors.open("w"),
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Server(process, process.stdout.readline())


@contextlib.contextmanager
def running(directory: Path, *overrides: str) -> Iterator[Server]:
    server = start_server(directory, *overrides)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.close()
