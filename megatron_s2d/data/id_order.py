"""The order of ids as text, of millions of them. No torch here."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from megatron_s2d.data.text_columns import content_of

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 65536


def id_order(table: pyarrow.Table) -> np.ndarray:
    """Return the rows in the order of ids. UTF-8 sorts like code points, which Python's text does.

    Ids are compared by the first bytes after what all of them begin with, as numbers, and by Arrow, which takes ten
    times as long, only where these are equal.
    """
    import pyarrow
    import pyarrow.compute

    column = table.column("id")
    if not len(column):
        return np.zeros(0, np.int32)
    ends = pyarrow.compute.min_max(column)
    pairs = zip(ends["min"].as_py().encode(), ends["max"].as_py().encode(), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    first = np.empty(len(column), dtype=np.uint64)
    for chunk, start in zip(column.chunks, np.cumsum([0, *map(len, column.chunks)]).tolist(), strict=False):
        first[start : start + len(chunk)] = _bytes_as_number(chunk, common)
    order = np.argsort(first)
    same = np.empty(len(order) - 1, dtype=bool)
    for start in range(0, len(same), _ROWS_AT_ONCE):  # not all at once: ten million numbers have 80 MB
        part = first[order[start : start + _ROWS_AT_ONCE + 1]]
        same[start : start + _ROWS_AT_ONCE] = part[1:] == part[:-1]
    del first
    if same.any():
        tied = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
        group = np.concatenate([[0], np.cumsum(~same)])[tied]
        rows = order[tied]
        keys = pyarrow.table({"group": group, "id": column.take(rows)})
        by = pyarrow.compute.sort_indices(keys, sort_keys=[("group", "ascending"), ("id", "ascending")]).to_numpy()
        order[tied] = rows[by]
    return as_index(order, table.num_rows)


def _bytes_as_number(texts: pyarrow.StringArray, skipped: int) -> np.ndarray:
    """Return the eight bytes after the first ``skipped`` of each text, uint64 [n], zeros after its end.

    A smaller text has a smaller number or the same. Every text has at least ``skipped`` bytes.
    """
    content, bounds = content_of(texts)
    starts, spare = bounds[:-1] + skipped, 8 - np.minimum(8, np.diff(bounds) - skipped)
    content = np.concatenate([content, np.zeros(8, np.uint8)])
    numbers = np.ndarray((len(content) - 7,), ">u8", content, strides=(1,))[starts].astype(np.uint64)
    shift = (8 * spare).astype(np.uint64)  # of all 64 bits it would be none
    return np.where(spare == 8, np.uint64(0), (numbers >> shift) << shift)


def as_index(values: np.ndarray, num_rows: int) -> np.ndarray:
    """Return row numbers in four bytes each, if that is enough."""
    return values.astype(np.int32 if num_rows < 2**31 else np.int64, copy=False)
