"""An advisory lock on a directory that the kernel releases when its process ends. No torch.

Not ``filelock``: its file locks have no shared mode and do not name the holder, and its read-write lock is an SQLite
database, which is not safe on network file systems.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_s2d.artifacts.files import LOCK_NAME, disk_errors
from megatron_s2d.errors import UserError
from megatron_s2d.formatting import printable


@contextlib.contextmanager
def directory_lock(
    directory: str | Path,
    *,
    shared: bool = False,
    wait_seconds: float = 0.0,
    announce: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Lock ``directory`` (created if missing) for this process until the block or the process ends.

    ``shared``: several shared locks may coexist, and exclude an exclusive one. If another process holds the lock, pass
    one message to ``announce``, wait up to ``wait_seconds``, then raise a ``UserError`` that names the holder.
    """
    path = Path(directory) / LOCK_NAME
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, path, wait_seconds, announce)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _acquire(
    descriptor: int, kind: int, path: Path, wait_seconds: float, announce: Callable[[str], None] | None
) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = printable(os.pread(descriptor, 200, 0).decode("utf-8", "replace")) or "another process"
        except OSError as error:
            raise UserError(f"{path}: file system without locks ({error.strerror}); use another one") from error
        if time.monotonic() >= deadline:
            raise UserError(f"{path.parent}: in use by {holder}; wait for it to end or choose another directory")
        if announce is not None:
            announce(f"{path.parent}: in use by {holder}, waiting")
            announce = None
        time.sleep(0.1)
