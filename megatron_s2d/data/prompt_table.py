"""Prompts by index: an Arrow table in memory or memory-mapped from a file, and the rows of it that are read.

A ``PromptTable`` is a sequence of ``Prompt`` that builds each one when it is asked for. What checks need of all prompts
(lengths, digests, ids) comes as arrays, so that ten million rows take some hundred megabytes. No torch here.

n: prompts of the table.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from megatron_s2d.artifacts.files import atomic_write_bytes, atomic_write_json, read_json_object
from megatron_s2d.data.forked_map import forked_map, in_child, num_processes
from megatron_s2d.data.text_columns import content_of
from megatron_s2d.data.text_tokens import token_keys
from megatron_s2d.records import Prompt

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 4096  # prompts that are read together in a pass over the table
_ROWS_PER_PART = 65536  # whose values one process computes
_SETTINGS = ("domain", "verifier", "environment")  # columns that a source sets, for all of its rows as a rule


def schema() -> pyarrow.Schema:
    """Return the columns of a table: the fields of ``Prompt`` and the digest of its tokens."""
    import pyarrow

    tokens = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema(
        {
            "id": pyarrow.string(),
            "token_ids": tokens,
            "text": pyarrow.string(),
            "domain": pyarrow.string(),
            "verifier": pyarrow.string(),
            "answer": pyarrow.string(),
            "solution_token_ids": tokens,
            "environment": pyarrow.string(),
            "key": pyarrow.uint64(),
        }
    )


def record_batch(prompts: Sequence[Prompt]) -> pyarrow.RecordBatch:
    """Return prompts as rows of ``schema``."""
    import pyarrow

    columns: dict[str, list[Any]] = {
        field.name: [getattr(prompt, field.name) for prompt in prompts] for field in dataclasses.fields(Prompt)
    }
    lengths = np.array([len(prompt.token_ids) for prompt in prompts])
    columns["key"] = token_keys(np.concatenate([prompt.token_ids for prompt in prompts]), lengths)
    arrays = [pyarrow.array(columns[field.name], field.type) for field in schema()]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema())


class PromptTable(Sequence[Prompt]):
    """The prompts ``rows`` of an Arrow table; all of them for None.

    directory: of a table on disk, where ``remember`` keeps arrays.
    """

    def __init__(self, table: pyarrow.Table, rows: np.ndarray | None = None, directory: Path | None = None):
        self._table, self._rows, self._directory = table, rows, directory

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> PromptTable:
        """Return the table of prompts that are in memory."""
        if isinstance(prompts, PromptTable):
            return prompts
        import pyarrow

        return cls(pyarrow.Table.from_batches([record_batch(prompts)] if prompts else [], schema()))

    @classmethod
    def concatenate(cls, tables: Sequence[PromptTable]) -> PromptTable:
        """Return the prompts of all tables, one table after the other, without a copy of them."""
        if len(tables) == 1:
            return tables[0]
        import pyarrow

        starts = np.cumsum([0, *(table._table.num_rows for table in tables)])
        rows = [table.rows.astype(np.int64) + start for table, start in zip(tables, starts[:-1], strict=True)]
        return cls(pyarrow.concat_tables([table._table for table in tables]), np.concatenate(rows))

    @property
    def rows(self) -> np.ndarray:
        """Rows of the Arrow table [n], in the order of the prompts."""
        return np.arange(self._table.num_rows) if self._rows is None else self._rows

    def __len__(self) -> int:
        return self._table.num_rows if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptTable: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptTable:
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self))))
        position = range(len(self))[index]
        row = position if self._rows is None else int(self._rows[position])
        return _prompt({name: self._table.column(name)[row] for name in _FIELDS})

    def __iter__(self) -> Iterator[Prompt]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            part = self._part(start, min(len(self), start + _ROWS_AT_ONCE))
            columns = [part.column(name) for name in _FIELDS]
            for values in zip(*columns, strict=True):
                yield _prompt(dict(zip(_FIELDS, values, strict=True)))

    def _part(self, start: int, stop: int) -> pyarrow.Table:
        if self._rows is None:
            return self._table.slice(start, stop - start)
        return self._table.take(self._rows[start:stop])

    def select(self, indices: np.ndarray) -> PromptTable:
        """Return the prompts at ``indices``, in their order, or those of a mask [n]."""
        if indices.dtype == np.bool_:
            if indices.all():
                return self
            if self._rows is not None:
                return PromptTable(self._table, self._rows[indices], self._directory)
            indices = _true_rows(indices)
        rows = _index(indices, self._table.num_rows) if self._rows is None else self._rows[indices]
        return PromptTable(self._table, rows, self._directory)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt, int32 [n]."""
        return self._lengths_of("lengths", "token_ids")

    @functools.cached_property
    def solution_lengths(self) -> np.ndarray:
        """Number of tokens of each reference solution, int32 [n]; -1 without one."""
        return self._lengths_of("solution_lengths", "solution_token_ids")

    @property
    def keys(self) -> np.ndarray:
        """A digest of what a model reads of each prompt, uint64 [n]: equal for equal tokens (``TextTokens.keys``)."""
        return self._taken(self._stored("keys", lambda: _values(self._table.column("key"), np.uint64)))

    def _lengths_of(self, name: str, column: str) -> np.ndarray:
        return self._taken(self._stored(name, lambda: _list_lengths(self._table.column(column))))

    def _stored(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return a value for each row of the Arrow table; of a table on disk from a mapped file of its own.

        Between the text of the rows the same values would bring most of the table into memory, a page for each few.
        """
        return compute() if self._directory is None else self._array(name, compute)

    def _array(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        assert self._directory is not None
        return _remembered(self._directory / f"{name}.npy", compute, apart=self._table.num_rows > _ROWS_PER_PART)

    def prepare(self) -> None:
        """Write what every later start reads: lengths, keys, the order of ids, and columns with one value."""
        for name in ("lengths", "solution_lengths", "keys", "_constants"):
            getattr(self, name)
        self.sorted_by_id()

    def values(self, name: str) -> list[str | None]:
        """Return the values of a column of text, for sets of prompts that fit into memory."""
        column = self._table.column(name)
        return (column if self._rows is None else column.take(self._rows)).to_pylist()

    def encoded(self, name: str) -> tuple[list[str | None], np.ndarray]:
        """Return the distinct values of a column of text, and which of them each prompt has, int32 [n]."""
        column = self._table.column(name)
        column = (column if self._rows is None else column.take(self._rows)).combine_chunks()
        encoded = column.dictionary_encode(null_encoding="encode")
        return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def distinct(self, name: str) -> set[str | None]:
        """Return the distinct values of a column of text."""
        import pyarrow.compute

        if len(self) and name in self._constants:
            return {self._constants[name]}
        column = self._table.column(name)
        return set(pyarrow.compute.unique(column if self._rows is None else column.take(self._rows)).to_pylist())

    @functools.cached_property
    def _constants(self) -> dict[str, str | None]:
        """Values of the columns of settings in which all rows of a table on disk agree; kept beside it."""
        if self._directory is None:
            return {}
        path = self._directory / "constants.json"
        if not path.exists():
            import pyarrow.compute

            values = {name: pyarrow.compute.unique(self._table.column(name)).to_pylist() for name in _SETTINGS}
            atomic_write_json(path, {name: value[0] for name, value in values.items() if len(value) == 1})
        return read_json_object(path)

    def first_id(self) -> str:
        """Return the smallest id."""
        import pyarrow.compute

        column = self._table.column("id")
        return pyarrow.compute.min(column if self._rows is None else column.take(self._rows)).as_py()

    def is_null(self, name: str) -> np.ndarray:
        """Return the mask [n] of the prompts that lack a field."""
        column = self._table.column(name)
        if column.null_count == 0:
            return np.zeros(len(self), dtype=bool)
        return self._taken(np.concatenate([chunk.is_null().to_numpy(zero_copy_only=False) for chunk in column.chunks]))

    def find(self, ids: Iterable[str]) -> dict[str, Prompt]:
        """Return the prompts with ``ids``; ``KeyError`` for one that is not here. One pass over the table's ids."""
        import pyarrow
        import pyarrow.compute

        wanted = list(dict.fromkeys(ids))
        if not wanted:
            return {}
        places = pyarrow.compute.is_in(self._table.column("id"), value_set=pyarrow.array(wanted, pyarrow.string()))
        hits = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in places.chunks])
        found = {prompt.id: prompt for prompt in self.select(self._taken(hits))}
        return {name: found[name] for name in wanted}

    def sorted_by_id(self) -> np.ndarray:
        """Return the indices [n] of the prompts in the order of their ids (as text, by code point)."""
        if self._directory is None:
            return _id_order(self._table if self._rows is None else self._table.take(self._rows))
        order = self._array("order", lambda: _id_order(self._table))
        if self._rows is None:
            return order
        place = np.full(self._table.num_rows, -1, dtype=order.dtype)  # row -> index here
        place[self._rows] = np.arange(len(self._rows), dtype=order.dtype)
        ordered, count = np.empty(len(self._rows), dtype=order.dtype), 0
        for start in range(0, len(order), _ROWS_PER_PART):
            part = place[order[start : start + _ROWS_PER_PART]]
            part = part[part >= 0]
            ordered[count : count + len(part)] = part
            count += len(part)
        return ordered[:count]

    def remember(self, name: str, compute: Callable[[PromptTable], np.ndarray]) -> np.ndarray:
        """Return ``compute`` of these prompts [n]: one value each, a function of the prompt alone.

        Of a table on disk it is computed once, for all rows, and kept beside it under ``name``.
        """
        if self._directory is None:
            return compute(self)
        return self._taken(_remembered(self._directory / f"{name}.npy", lambda: self._computed(compute)))

    def _computed(self, compute: Callable[[PromptTable], np.ndarray]) -> np.ndarray:
        """Return ``compute`` of all rows of the Arrow table, part by part."""
        starts = range(0, self._table.num_rows, _ROWS_PER_PART)
        parts = forked_map(
            lambda start: compute(PromptTable(self._table.slice(start, _ROWS_PER_PART))), starts, num_processes()
        )
        return np.concatenate(list(parts))

    def _taken(self, values: np.ndarray) -> np.ndarray:
        return values if self._rows is None else values[self._rows]


_FIELDS = tuple(field.name for field in dataclasses.fields(Prompt))


def _prompt(values: dict[str, Any]) -> Prompt:
    """Build a prompt from Arrow scalars."""
    solution = values["solution_token_ids"]
    return Prompt(
        id=values["id"].as_py(),
        token_ids=_ids(values["token_ids"]),
        text=values["text"].as_py(),
        domain=values["domain"].as_py(),
        verifier=values["verifier"].as_py(),
        answer=values["answer"].as_py(),
        solution_token_ids=_ids(solution) if solution.is_valid else None,
        environment=values["environment"].as_py(),
    )


def _ids(scalar: Any) -> np.ndarray:
    return scalar.values.to_numpy().astype(np.int64)


def _values(column: pyarrow.ChunkedArray, dtype: type) -> np.ndarray:
    parts = [chunk.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _list_lengths(column: pyarrow.ChunkedArray) -> np.ndarray:
    """Return the lengths of lists, -1 for null; reads the offsets and not the values."""
    import pyarrow.compute

    parts = [pyarrow.compute.list_value_length(chunk).fill_null(-1).to_numpy() for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _remembered(path: Path, compute: Callable[[], np.ndarray], *, apart: bool = False) -> np.ndarray:
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


def _id_order(table: pyarrow.Table) -> np.ndarray:
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
    for start in range(0, len(same), _ROWS_PER_PART):  # not all at once: ten million numbers have 80 MB
        part = first[order[start : start + _ROWS_PER_PART + 1]]
        same[start : start + _ROWS_PER_PART] = part[1:] == part[:-1]
    del first
    if same.any():
        tied = np.flatnonzero(np.concatenate([same, [False]]) | np.concatenate([[False], same]))
        group = np.concatenate([[0], np.cumsum(~same)])[tied]
        rows = order[tied]
        keys = pyarrow.table({"group": group, "id": column.take(rows)})
        by = pyarrow.compute.sort_indices(keys, sort_keys=[("group", "ascending"), ("id", "ascending")]).to_numpy()
        order[tied] = rows[by]
    return _index(order, table.num_rows)


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


def _true_rows(mask: np.ndarray) -> np.ndarray:
    """Return the rows of a mask, part by part: numpy's numbers have eight bytes each."""
    starts = range(0, len(mask), _ROWS_PER_PART)
    parts = [_index(np.flatnonzero(mask[start : start + _ROWS_PER_PART]) + start, len(mask)) for start in starts]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _index(values: np.ndarray, num_rows: int) -> np.ndarray:
    """Return row numbers in four bytes each, if that is enough."""
    return values.astype(np.int32 if num_rows < 2**31 else np.int64, copy=False)
