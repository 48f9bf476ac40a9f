"""Prompts by index: an Arrow table in memory or memory-mapped from a file, and the rows of it that are read.

A ``PromptTable`` is a sequence of ``Prompt`` that builds each one when it is asked for. What checks need of all prompts
(lengths, digests, ids) comes as arrays, so that ten million rows take some hundred megabytes. No torch here.

n: prompts of the table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from megatron_s2d.artifacts.files import atomic_write_json, read_json_object
from megatron_s2d.data.id_order import as_index, id_order
from megatron_s2d.data.stored_arrays import in_processes, remembered, remembered_once, true_rows
from megatron_s2d.data.table_rows import FIELDS, prompt_of, take_rows
from megatron_s2d.data.table_tokens import most_lengths, token_lengths, with_tokens
from megatron_s2d.data.text_tokens import TextTokens, token_keys
from megatron_s2d.records import Prompt

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_ONCE = 4096  # prompts that are read together in a pass over the table
_LONG_ROWS_AT_ONCE = 512
_ROWS_PER_PART = 65536  # whose values one process computes
_BEYOND = "lengths-beyond-"  # and a limit: the file with the lengths of prompts that may be longer
_BOUNDED = {"most_tokens": "token_ids", "most_solution_tokens": "solution_token_ids"}
_SETTINGS = ("domain", "verifier", "environment")  # columns that a source sets, for all of its rows as a rule


def schema() -> pyarrow.Schema:
    """Return the columns of a table: fields of ``Prompt``, its key, and a solution whose tokens are not known yet."""
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
            "solution": pyarrow.string(),
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
    columns["solution"] = [None] * len(prompts)
    arrays = [pyarrow.array(columns[field.name], field.type) for field in schema()]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema())


class PromptTable(Sequence[Prompt]):
    """The prompts ``rows`` of an Arrow table; all of them for None.

    Rows of a table on disk may have texts and no tokens: these are computed when a prompt is read, and of all prompts
    only their largest numbers are known (``longest``) until somebody asks for more.
    """

    def __init__(
        self,
        table: pyarrow.Table,
        rows: np.ndarray | None = None,
        directory: Path | None = None,
        tokens: TextTokens | None = None,
        limit: int | None = None,
    ):
        """directory: of a table on disk, where ``remember`` keeps arrays. tokens: of texts, if rows lack theirs. limit:
        what no prompt of the table is longer than.
        """
        self._table, self._rows, self._directory = table, rows, directory
        self._tokens, self._limit = tokens, limit
        self._recent: dict[int, Prompt] = {}  # row -> one whose length was asked for

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
        joined = pyarrow.concat_tables([table._table for table in tables])
        tokens = next((table._tokens for table in tables if table._tokens is not None), None)
        if tokens is None:
            return cls(joined, np.concatenate(rows))
        limits = [table.longest if table._tokens is None else table._limit for table in tables]
        known = [limit for limit in limits if limit is not None]
        return cls(joined, np.concatenate(rows), None, tokens, max(known) if len(known) == len(limits) else None)

    def _with(self, rows: np.ndarray) -> PromptTable:
        return PromptTable(self._table, rows, self._directory, self._tokens, self._limit)

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
        if row in self._recent:
            return self._recent[row]
        if self._tokens is not None:
            return next(iter(self.select(np.array([position]))))
        return prompt_of({name: self._table.column(name)[row] for name in FIELDS})

    def __iter__(self) -> Iterator[Prompt]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            part = self._part(start, min(len(self), start + _ROWS_AT_ONCE))
            if self._tokens is not None:
                part = with_tokens(part, self._tokens)
            columns = [part.column(name) for name in FIELDS]
            for values in zip(*columns, strict=True):
                yield prompt_of(dict(zip(FIELDS, values, strict=True)))

    def _part(self, start: int, stop: int) -> pyarrow.Table:
        if self._rows is None:
            return self._table.slice(start, stop - start)
        return take_rows(self._table, self._rows[start:stop])

    def select(self, indices: np.ndarray) -> PromptTable:
        """Return the prompts at ``indices``, in their order, or those of a mask [n]."""
        if indices.dtype == np.bool_:
            if indices.all():
                return self
            if self._rows is not None:
                return self._with(self._rows[indices])
            indices = true_rows(indices)
        rows = as_index(indices, self._table.num_rows) if self._rows is None else self._rows[indices]
        return self._with(rows)

    # ------------------------------------------------------------------------------- lengths

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt, int32 [n]. Of a table of texts all are computed, once."""
        return self._taken(self._exact("lengths", "token_ids"))

    @functools.cached_property
    def solution_lengths(self) -> np.ndarray:
        """Number of tokens of each reference solution, int32 [n]; -1 without one. As ``lengths``."""
        return self._taken(self._exact("solution_lengths", "solution_token_ids"))

    @property
    def has_solution(self) -> np.ndarray:
        """Mask [n] of the prompts with a reference solution."""
        return ~(self.is_null("solution_token_ids") & self.is_null("solution"))

    @property
    def is_exact(self) -> bool:
        """Whether ``longest`` and ``longest_sample`` are those of prompts, and not what none is longer than."""
        return self._tokens is None

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt; of a table of texts a number that none has more than."""
        return int(self._most.max(initial=0))

    @property
    def longest_sample(self) -> tuple[int, int]:
        """Tokens of prompt and solution of the longest two together; as ``longest``."""
        solutions = self.solution_lengths if self._tokens is None else self._bounds("most_solution_tokens")
        longest = int((self._most + solutions).argmax())
        return int(self._most[longest]), int(solutions[longest])

    def longer_than(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the prompts with more than ``limit`` tokens, in their order, and how many they have.

        Of a table of texts the lengths of those are computed that may have as many, once.
        """
        if self._tokens is None or self._directory is None:
            indices = np.flatnonzero(self._most > limit)
            if self._tokens is None:
                return indices, self.lengths[indices]
            lengths = self._lengths_of_rows(self.rows[indices])
            return indices[lengths > limit], lengths[lengths > limit]
        rows = np.flatnonzero(self._stored_bounds("most_tokens") > limit)
        if not len(rows) or (self._limit is not None and self._limit <= limit):
            return np.zeros(0, np.int64), np.zeros(0, np.int32)
        path = self._directory / f"{_BEYOND}{limit}.npy"
        lengths = remembered_once(path, lambda: self._lengths_beyond(rows, limit))
        rows, lengths = rows[lengths > limit], lengths[lengths > limit]
        if self._rows is None or not len(rows):
            return rows, lengths
        is_longer = np.zeros(self._table.num_rows, dtype=bool)
        is_longer[rows] = True
        indices = np.flatnonzero(is_longer[self._rows])
        return indices, lengths[np.searchsorted(rows, self._rows[indices])]

    def longest_beyond(self, limit: int) -> Prompt | None:
        """Return the (first) longest prompt if it has more than ``limit`` tokens."""
        indices, lengths = self.longer_than(limit)
        return self[int(indices[lengths.argmax()])] if len(indices) else None

    def up_to(self, limit: int | None) -> PromptTable:
        """Return the prompts with at most ``limit`` tokens."""
        if limit is None:
            return self
        fits = np.ones(len(self), dtype=bool)
        fits[self.longer_than(limit)[0]] = False
        fitting = self.select(fits)
        if self._tokens is None:
            return fitting
        least = limit if self._limit is None else min(limit, self._limit)
        return PromptTable(fitting._table, fitting._rows, fitting._directory, fitting._tokens, least)

    def lengths_at(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of some prompts and of their solutions (-1 without one), int64 [len(indices)] each."""
        if self._tokens is None:
            return self.lengths[indices].astype(np.int64), self.solution_lengths[indices].astype(np.int64)
        part = self.select(np.asarray(indices, dtype=np.int64))
        rows = part.rows.tolist()
        if not self._recent.keys() >= set(rows):
            self._recent = dict(zip(rows, part, strict=True))  # who asks for lengths reads them next
        prompts = [self._recent[row] for row in rows]
        solutions = [-1 if one.solution_token_ids is None else len(one.solution_token_ids) for one in prompts]
        return np.array([len(one.token_ids) for one in prompts], np.int64), np.array(solutions, np.int64)

    @functools.cached_property
    def _most(self) -> np.ndarray:
        """How many tokens each prompt has at most, int32 [n]."""
        if self._tokens is None:
            return self.lengths
        most = self._bounds("most_tokens")
        return most if self._limit is None else np.minimum(most, self._limit)

    def _bounds(self, name: str) -> np.ndarray:
        return self._taken(self._stored_bounds(name))

    def _stored_bounds(self, name: str) -> np.ndarray:
        column, tokens = _BOUNDED[name], self._tokens
        assert tokens is not None
        return self._stored(name, lambda: self._computed(lambda part: most_lengths(part._table, tokens, column)))

    def _exact(self, name: str, column: str) -> np.ndarray:
        tokens = self._tokens
        if tokens is None:
            return self._stored(name, lambda: _list_lengths(self._table.column(column)))

        def compute() -> np.ndarray:
            return self._computed(lambda part: token_lengths(part._table, tokens, column), "lengths")

        return compute() if self._directory is None else remembered_once(self._directory / f"{name}.npy", compute)

    def _lengths_beyond(self, rows: np.ndarray, limit: int) -> np.ndarray:
        """Return the number of tokens of ``rows``, those with a bound above ``limit``; known ones are read."""
        assert self._directory is not None
        found = (int(path.stem.removeprefix(_BEYOND)) for path in self._directory.glob(f"{_BEYOND}*.npy"))
        larger = min((other for other in found if other > limit), default=None)
        if larger is None:
            return self._lengths_of_rows(rows)
        known = self._stored_bounds("most_tokens")[rows] > larger
        lengths = np.empty(len(rows), dtype=np.int32)
        lengths[known] = np.load(self._directory / f"{_BEYOND}{larger}.npy")
        lengths[~known] = self._lengths_of_rows(rows[~known])
        return lengths

    def _lengths_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of tokens of rows of the Arrow table, int32 [len(rows)]."""
        tokens = self._tokens
        assert tokens is not None

        def lengths(start: int) -> np.ndarray:
            return token_lengths(take_rows(self._table, rows[start : start + _LONG_ROWS_AT_ONCE]), tokens, "token_ids")

        return in_processes(lengths, range(0, len(rows), _LONG_ROWS_AT_ONCE), "long prompts")

    # ------------------------------------------------------------------------------- other values of all prompts

    @property
    def keys(self) -> np.ndarray:
        """A digest of what a model reads of each prompt, uint64 [n]: equal for equal tokens (``TextTokens.keys``)."""
        return self._taken(self._stored("keys", lambda: _values(self._table.column("key"), np.uint64)))

    def _stored(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return a value for each row of the Arrow table; of a table on disk from a mapped file of its own.

        Between the text of the rows the same values would bring most of the table into memory, a page for each few.
        """
        return compute() if self._directory is None else self._array(name, compute)

    def _array(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        assert self._directory is not None
        return remembered(self._directory / f"{name}.npy", compute, apart=self._table.num_rows > _ROWS_PER_PART)

    def prepare(self) -> None:
        """Write what every later start reads: lengths, keys, the order of ids, and columns with one value."""
        for name in _BOUNDED if self._tokens is not None else ():
            self._stored_bounds(name)
        for name in ("lengths", "solution_lengths") if self._tokens is None else ():
            getattr(self, name)
        for name in ("keys", "_constants"):
            getattr(self, name)
        self.sorted_by_id()

    def values(self, name: str) -> list[str | None]:
        """Return the values of a column of text, for sets of prompts that fit into memory."""
        return self._column(name).to_pylist()

    def _column(self, name: str) -> pyarrow.ChunkedArray:
        if self._rows is None:
            return self._table.column(name)
        return take_rows(self._table.select([name]), self._rows).column(name)

    def encoded(self, name: str) -> tuple[list[str | None], np.ndarray]:
        """Return the distinct values of a column of text, and which of them each prompt has, int32 [n]."""
        encoded = self._column(name).combine_chunks().dictionary_encode(null_encoding="encode")
        return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def distinct(self, name: str) -> set[str | None]:
        """Return the distinct values of a column of text."""
        import pyarrow.compute

        if len(self) and name in self._constants:
            return {self._constants[name]}
        return set(pyarrow.compute.unique(self._column(name)).to_pylist())

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

        smallest: str = pyarrow.compute.min(self._column("id")).as_py()
        return smallest

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
        import pyarrow

        if self._directory is None:
            return id_order(pyarrow.table({"id": self._column("id")}))
        order = self._array("order", lambda: id_order(self._table))
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
        return self._taken(remembered(self._directory / f"{name}.npy", lambda: self._computed(compute)))

    def _computed(self, compute: Callable[[PromptTable], np.ndarray], what: str | None = None) -> np.ndarray:
        """Return ``compute`` of all rows of the Arrow table, part by part. what: is announced, if it takes long."""

        size = _ROWS_PER_PART if self._tokens is None else _ROWS_AT_ONCE  # texts are longer than numbers

        def part(start: int) -> np.ndarray:
            return compute(PromptTable(self._table.slice(start, size), tokens=self._tokens))

        return in_processes(part, range(0, self._table.num_rows, size), what)

    def _taken(self, values: np.ndarray) -> np.ndarray:
        return values if self._rows is None else values[self._rows]


def _values(column: pyarrow.ChunkedArray, dtype: type) -> np.ndarray:
    parts = [chunk.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _list_lengths(column: pyarrow.ChunkedArray) -> np.ndarray:
    """Return the lengths of lists, -1 for null; reads the offsets and not the values."""
    import pyarrow.compute

    parts = [pyarrow.compute.list_value_length(chunk).fill_null(-1).to_numpy() for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
