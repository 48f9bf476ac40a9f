"""Per-rank watchdog: ``heartbeat()`` renews a deadline; on expiry the rank dumps its stacks and exits. No torch here.

The launcher then restarts the job instead of paying for a hang. The deadline is Python's ``faulthandler``, whose timer
works without the interpreter's lock: it catches a rank that hangs in a collective, a kernel or a regular expression
alike. There is one such timer per process, so its state is global in this module.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_MIN_INTERVAL_SECONDS = 0.5  # more frequent heartbeats are not written: the file may be on a network file system

_file: IO | None = None
_timeout = 0.0
_last_heartbeat = 0.0


@contextlib.contextmanager
def watchdog(path: Path, watchdog_timeout_seconds: float | None) -> Iterator[None]:
    """Exit the process (code 1) after ``watchdog_timeout_seconds`` without ``heartbeat`` in the block; None: never.

    ``path`` exists meanwhile: its modification time is the last heartbeat, and on expiry the stacks of all threads are
    written to it. It is removed when the block ends without expiry.
    """
    global _file, _timeout
    if watchdog_timeout_seconds is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        _file, _timeout = file, watchdog_timeout_seconds
        heartbeat(force=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _file = None
    path.unlink(missing_ok=True)


def heartbeat(*, force: bool = False) -> None:
    """Report progress and so renew the deadline; no-op outside of ``watchdog``."""
    global _last_heartbeat
    now = time.monotonic()
    if _file is not None and (force or now - _last_heartbeat >= min(_MIN_INTERVAL_SECONDS, _timeout / 4)):
        _last_heartbeat = now
        os.utime(_file.fileno())
        faulthandler.dump_traceback_later(_timeout, exit=True, file=_file)


def has_stack_dump(path: Path) -> bool:
    """Return whether the watchdog of the rank that writes to ``path`` expired."""
    return path.exists() and path.stat().st_size > 0
