"""A pool of long-lived worker processes that answer each JSON request with one status line.

Plain pipes rather than ``multiprocessing``: a worker is a script of its own with few imports, inherits nothing of torch
or of a process group, and exchanges text only.
"""

from __future__ import annotations

import json
import queue
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_STARTUP_TIMEOUT_S = 300  # imports on a busy machine with a cold file system


class _Worker:
    """One process, started with its first request and restarted after a failure."""

    def __init__(self, script: Path) -> None:
        self._script = script
        self._process: subprocess.Popen | None = None

    def run(self, request: dict[str, Any], timeout_s: float) -> str:
        """Return the status of ``request``; "crash" if the process ends, "timeout" after ``timeout_s``."""
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return "crash"
        status = self._read_line(timeout_s)
        if not status:
            self.close()
        return "timeout" if status is None else status or "crash"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        # -E -s: ignore the user's Python settings. A new session: Ctrl-C goes to the trainer only, which then closes
        # the pool.
        self._process = subprocess.Popen(
            [sys.executable, "-E", "-s", str(self._script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        if self._read_line(_STARTUP_TIMEOUT_S) != "ready":
            self.close()
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


def _is_readable(file: Any, timeout_s: float) -> bool:
    """Return whether ``file`` has data or ends within ``timeout_s``; unlike select, for any descriptor number."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


class WorkerPool:
    """At most ``num_workers`` processes of ``script``, started on demand."""

    def __init__(self, script: Path, num_workers: int) -> None:
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix=script.stem)
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker(script) for _ in range(num_workers)]
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
