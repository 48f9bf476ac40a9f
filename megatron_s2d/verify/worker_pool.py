"""A pool of long-lived worker processes that answer each JSON request with one line.

Plain pipes rather than ``multiprocessing``: a worker is a script of its own with few imports, inherits nothing of torch
or of a process group, and exchanges text only.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_s2d.errors import UserError

_STARTUP_TIMEOUT_S = 300  # imports on a busy machine with a cold file system


class _Worker:
    """One process, started with its first request and restarted after a failure."""

    def __init__(self, script: Path, greeting: dict[str, Any] | None = None) -> None:
        self._script, self._greeting = script, greeting
        self._process: subprocess.Popen | None = None

    def run(self, request: dict[str, Any], timeout_s: float) -> str:
        """Return the status of ``request``; "crash" if the process ends, "timeout" after ``timeout_s``."""
        if self._process is None:
            self._start()
        try:
            _write(self._process.stdin, json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            self.close()
            return "crash"
        status = self._read_line(timeout_s)
        if not status:
            self.close()
        return "timeout" if status is None else status or "crash"

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with the processes that it has started
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        # -E -s: ignore the user's Python settings. A new session: Ctrl-C goes to the trainer only, which then closes
        # the pool.
        self._process = subprocess.Popen(
            [sys.executable, "-E", "-s", str(self._script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        if self._greeting is not None:
            with contextlib.suppress(BrokenPipeError):
                _write(self._process.stdin, json.dumps(self._greeting).encode() + b"\n")
        reply = self._read_line(_STARTUP_TIMEOUT_S)
        if reply == "ready":
            return
        self.close()
        if self._greeting is not None:
            raise UserError(reply or f"its worker process did not start within {_STARTUP_TIMEOUT_S} s, or ended")
        raise RuntimeError(f"the worker {self._script.name} did not start; see its error output")

    def _read_line(self, timeout_s: float) -> str | None:
        """Return the next line, "" at the end of the stream, None after ``timeout_s``."""
        text, deadline = b"", time.monotonic() + timeout_s
        while not text.endswith(b"\n"):
            if not _is_readable(self._process.stdout, max(0.0, deadline - time.monotonic())):
                return None
            part = self._process.stdout.read(4096)
            if not part:
                return ""
            text += part
        return text.decode().strip()


def _write(file: Any, data: bytes) -> None:
    """Write all of ``data`` to an unbuffered pipe, whose ``write`` may take a part only."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _is_readable(file: Any, timeout_s: float) -> bool:
    """Return whether ``file`` has data or ends within ``timeout_s``; unlike select, for any descriptor number."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


class WorkerPool:
    """At most ``num_workers`` processes of ``script``, started on demand.

    greeting: first line for every process, which answers ``ready`` or why it cannot work (a ``UserError``).
    """

    def __init__(self, script: Path, num_workers: int, greeting: dict[str, Any] | None = None) -> None:
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix=script.stem)
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker(script, greeting) for _ in range(num_workers)]
        for worker in self._workers:
            self._idle.put(worker)

    def run(self, requests: Sequence[dict[str, Any]], timeout_s: float) -> list[str]:
        """Return the statuses of ``requests`` in order; ``timeout_s`` limits each of them, without startup time."""
        return list(self._threads.map(lambda request: self._run_one(request, timeout_s), requests))

    def close(self) -> None:
        """Kill the processes."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _run_one(self, request: dict[str, Any], timeout_s: float) -> str:
        worker = self._idle.get()
        try:
            return worker.run(request, timeout_s)
        finally:
            self._idle.put(worker)
