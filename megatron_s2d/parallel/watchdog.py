"""Signs of life of a rank: every piece of progress renews a deadline, and a rank that misses it shows where it stands
and ends, so that its launcher starts the job again instead of paying for a hang.

The deadline is Python's ``faulthandler``, whose timer works without the interpreter's lock: a rank that hangs in a
collective, a kernel or a regular expression is caught alike. Being one a process, its state lives in this module.
No torch here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_RENEW_SECONDS = 0.5  # more frequent signs are not written: the file may lie on a network

_file: IO | None = None
_limit = 0.0
_renewed = 0.0


@contextlib.contextmanager
def watchdog(path: Path, watchdog_timeout_seconds: float | None) -> Iterator[None]:
    """Within the block, end the process (exit code 1) if no ``beat`` comes for ``watchdog_timeout_seconds``; None: never.

    ``path`` exists meanwhile: its time of change is the last sign of life, its content the stacks of all threads once the
    deadline has passed. It is removed when the block ends, unless it holds stacks.
    """
    global _file, _limit
    if watchdog_timeout_seconds is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        _file, _limit = file, watchdog_timeout_seconds
        heartbeat(force=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _file = None
    path.unlink(missing_ok=True)


def heartbeat(*, force: bool = False) -> None:
    """Progress was made. Does nothing outside of ``watched``."""
    global _renewed
    now = time.monotonic()
    if _file is not None and (force or now - _renewed >= min(_RENEW_SECONDS, _limit / 4)):
        _renewed = now
        os.utime(_file.fileno())
        faulthandler.dump_traceback_later(_limit, exit=True, file=_file)


def has_stack_dump(path: Path) -> bool:
    """Whether the rank that wrote to ``path`` was ended because it made no progress."""
    return path.exists() and path.stat().st_size > 0
