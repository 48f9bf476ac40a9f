"""A pool of long-lived worker processes that answer one JSON line with one word.

Plain pipes rather than ``multiprocessing``: a worker is a script of its own that imports little, is started afresh
(nothing of torch or of a process group is inherited), and exchanges text only.
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

_START_SECONDS = 300  # for imports on a busy machine with a cold file system


class _Worker:
    """One process, started when first asked and again after it was lost."""

    def __init__(self, script: Path) -> None:
        self._script = script
        self._process: subprocess.Popen | None = None

    def ask(self, request: dict[str, Any], seconds: float) -> str:
        """The word for ``request``; "crash" if the process ends, "timeout" if it says nothing for ``seconds``."""
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return "crash"
        word = self._line(seconds)
        if word is None or not word:
            self.close()
        return "timeout" if word is None else word or "crash"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        # -E -s: settings of the user's shell do not reach the worker. Its own session: Ctrl-C is for the trainer,
        # which then closes the pool.
        self._process = subprocess.Popen(
            [sys.executable, "-E", "-s", str(self._script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        if self._line(_START_SECONDS) != "ready":
            self.close()
            raise RuntimeError(f"the worker {self._script.name} did not start; its message is on the error output")

    def _line(self, seconds: float) -> str | None:
        """The next line, "" at the end of the stream, None after ``seconds``."""
        text, end = b"", time.monotonic() + seconds
        while not text.endswith(b"\n"):
            if not _is_readable(self._process.stdout, max(0.0, end - time.monotonic())):
                return None
            part = self._process.stdout.read(4096)
            if not part:
                return ""
            text += part
        return text.decode().strip()


def _is_readable(file: Any, seconds: float) -> bool:
    """Whether ``file`` has something to read (or has ended) within ``seconds``; for any number of open files."""
    watch = select.poll()
    watch.register(file, select.POLLIN)
    return bool(watch.poll(1000 * seconds))


class WorkerPool:
    """At most ``num_workers`` processes of ``script``, started as they are needed."""

    def __init__(self, script: Path, num_workers: int) -> None:
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix=script.stem)
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker(script) for _ in range(num_workers)]
        for worker in self._workers:
            self._idle.put(worker)

    def ask(self, requests: Sequence[dict[str, Any]], seconds: float) -> list[str]:
        """The words for ``requests``, in order; no single one takes longer than ``seconds`` and a start."""
        return list(self._threads.map(lambda request: self._ask(request, seconds), requests))

    def close(self) -> None:
        """Kill the processes."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _ask(self, request: dict[str, Any], seconds: float) -> str:
        worker = self._idle.get()
        try:
            return worker.ask(request, seconds)
        finally:
            self._idle.put(worker)
