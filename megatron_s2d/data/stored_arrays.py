"""Arrays with a value for each row: computed by several processes, kept in files, mapped. No torch here."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_s2d.artifacts.files import atomic_write_bytes
from megatron_s2d.artifacts.lock import directory_lock
from megatron_s2d.data.forked_map import forked_map, in_child, num_processes
from megatron_s2d.data.id_order import as_index

ANNOUNCE_SECONDS = 20.0
"""Between two lines of progress."""

_ROWS_AT_ONCE = 65536
_WAIT_SECONDS = 24 * 3600.0  # for the process that computes the same values
_LOG = logging.getLogger(__name__)


def remembered(path: Path, compute: Callable[[], np.ndarray], *, apart: bool = False) -> np.ndarray:
    """Return the array of a file, mapped; it is computed and written if it is not there yet.

    apart: computed in a process of its own, which takes much memory.
    """

    def write() -> None:
        values, header = np.ascontiguousarray(compute()), io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
        atomic_write_bytes(path, header.getvalue(), values.data if values.size else b"")

    if not path.exists():
        in_child(write) if apart else write()
    array: np.ndarray = np.load(path, mmap_mode="r")
    return array


def remembered_once(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Return ``remembered`` of what takes long: the other processes of a machine wait for the first one."""
    if path.exists():
        return remembered(path, compute)
    with directory_lock(path.parent / "locks" / path.stem, wait_seconds=_WAIT_SECONDS):
        return remembered(path, compute)


def in_processes(compute: Callable[[int], np.ndarray], starts: range, what: str | None) -> np.ndarray:
    """Return the values that ``compute`` returns for all starts, which processes compute."""
    parts: list[np.ndarray] = []
    announced = time.monotonic()
    for part in forked_map(compute, starts, num_processes()):
        parts.append(part)
        if what is not None and time.monotonic() - announced >= ANNOUNCE_SECONDS:
            announced = time.monotonic()
            _LOG.warning("tokenized %s, %.0f %%", what, 100 * len(parts) / len(starts))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def true_rows(mask: np.ndarray) -> np.ndarray:
    """Return the rows of a mask, part by part: numpy's numbers have eight bytes each."""
    starts = range(0, len(mask), _ROWS_AT_ONCE)
    parts = [as_index(np.flatnonzero(mask[start : start + _ROWS_AT_ONCE]) + start, len(mask)) for start in starts]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
