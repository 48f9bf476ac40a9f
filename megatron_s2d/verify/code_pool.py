"""The processes that run programs (``fork_server.py``), from the verifier's side: one server per worker thread."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_SCRIPT = Path(__file__).with_name("fork_server.py")
_GRACE_SECONDS = 300  # beyond the limits that the server itself enforces: to start and end processes on a busy machine


def environment() -> dict[str, str]:
    """Return the environment of programs, which has none of the trainer's variables."""
    return {
        "PATH": "/usr/bin:/bin",
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or "",
        "PYTHONHASHSEED": "0",  # sets iterate in the same order every time
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def memory_file(content: bytes = b"") -> Iterator[int]:
    """Yield the descriptor of an unnamed file in memory, positioned at the start of ``content``.

    Not in a temporary directory: Landlock would keep a program from opening it as /dev/stdin.
    """
    descriptor = os.memfd_create("case")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def read_all(descriptor: int, limit: int) -> bytes:
    """Return the content of a file from its start, at most ``limit`` bytes."""
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read(limit)


class ForkServer:
    """One server process, started with its first request and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None

    def run(self, request: dict[str, Any], files: Sequence[int]) -> dict[str, Any] | None:
        """Return the reply to ``request`` with open ``files``; None if two servers in a row were killed over it."""
        for _ in range(2):
            if self._process is None:
                self._start()
            self._socket.settimeout(request["total_seconds"] + _GRACE_SECONDS)
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], files)
                if reply := self._socket.recv(1 << 16):
                    return json.loads(reply)
            except OSError:  # also a timeout
                pass
            logger.warning("a process that runs programs was killed; it is started again")
            self.close()
        return None

    def close(self) -> None:
        """Kill the process, and with it the program that it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._socket.close()
            self._process = None

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # A new session: Ctrl-C goes to the trainer only, which then closes the server.
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-X", "utf8", str(_SCRIPT), str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment(),
                cwd="/", start_new_session=True,
            )  # fmt: skip
        self._socket.settimeout(_GRACE_SECONDS)
        if self._socket.recv(16) != b"ready":
            self.close()
            raise RuntimeError(f"{_SCRIPT.name} did not start; see its error output")


class ForkServers:
    """Up to ``count`` servers; ``borrow`` one for a response. Threads may not be more than servers."""

    def __init__(self, count: int) -> None:
        self._servers = [ForkServer() for _ in range(count)]
        self._idle: queue.LifoQueue[ForkServer] = queue.LifoQueue()
        for server in self._servers:
            self._idle.put(server)

    @contextlib.contextmanager
    def borrow(self) -> Iterator[ForkServer]:
        """Yield a server that nothing else uses meanwhile."""
        server = self._idle.get()
        try:
            yield server
        finally:
            self._idle.put(server)

    def close(self) -> None:
        """Kill all servers."""
        for server in self._servers:
            server.close()
