"""Watchdog of a rank: ``heartbeat()`` renews a deadline; on expiry the rank dumps its stacks and exits. No torch here.

The launcher then restarts the job instead of paying for a hang. The deadline is Python's ``faulthandler``, whose timer
works without the interpreter's lock: it catches a rank that hangs in a collective, a kernel or a regular expression
alike. There is one such timer per process, so its state is global in this module.

The ranks of a machine share one file, which the first of them touches: a thousand ranks on a shared file system write
as many files as there are machines. ``faulthandler`` prints the timeout before the stacks and nothing that says whose
they are, so the rank is added to the timeout as microseconds: "Timeout (1:00:00.000017)!" is of rank 17.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_MIN_INTERVAL_SECONDS = 0.5  # between two renewals of the deadline
_TOUCHES_PER_TIMEOUT = 100  # the file may be on a network file system, as those of a thousand other ranks

_RANK_SECONDS = 1e-6  # added to the timeout, times the rank
_DUMP_SECONDS = 0.05  # between the dumps of two ranks of a machine, so that their lines do not mix

_file: IO | None = None
_timeout = _touch_interval = 0.0
_last_heartbeat = _last_touch = 0.0


@contextlib.contextmanager
def watchdog(
    path: Path, watchdog_timeout_seconds: float | None, *, rank: int = 0, local_rank: int = 0
) -> Iterator[None]:
    """Exit the process (code 1) after ``watchdog_timeout_seconds`` without ``heartbeat`` in the block; None: never.

    ``path``, one file for all ranks of a machine, exists meanwhile: its modification time is that of a heartbeat of the
    one with ``local_rank`` 0, a hundredth of the timeout old at most, and on expiry the stacks of all threads of a rank
    are appended to it. It is removed when the block of that rank ends without expiry of any.
    """
    global _file, _timeout, _touch_interval
    if watchdog_timeout_seconds is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_first = local_rank == 0
    with open(path, "a") as file:
        if is_first:
            file.truncate(0)  # stacks of an earlier run
        # Less half a microsecond: faulthandler rounds up.
        _file, _timeout = file, watchdog_timeout_seconds + local_rank * _DUMP_SECONDS + (rank - 0.5) * _RANK_SECONDS
        _touch_interval = watchdog_timeout_seconds / _TOUCHES_PER_TIMEOUT if is_first else math.inf
        heartbeat(force=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _file = None
    if is_first and not has_stack_dump(path):
        path.unlink(missing_ok=True)


def heartbeat(*, force: bool = False) -> None:
    """Report progress and so renew the deadline; no-op outside of ``watchdog``."""
    global _last_heartbeat, _last_touch
    now = time.monotonic()
    if _file is not None and (force or now - _last_heartbeat >= min(_MIN_INTERVAL_SECONDS, _timeout / 4)):
        _last_heartbeat = now
        if _touch_interval < math.inf and (force or now - _last_touch >= _touch_interval):
            _last_touch = now
            os.utime(_file.fileno())
        faulthandler.dump_traceback_later(_timeout, exit=True, file=_file)


def has_stack_dump(path: Path) -> bool:
    """Return whether the watchdog of a rank that writes to ``path`` expired."""
    return path.exists() and path.stat().st_size > 0
