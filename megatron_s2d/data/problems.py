"""Which rows of a source's files are its problems: order, unique ids, limits. No torch here.

Files are read in ranges of rows, by several processes if they are large; what depends on the order of all rows is
decided here, range by range, so the result does not depend on their number.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_s2d.config.data import FileSource
from megatron_s2d.data.columns_of_rows import ProblemColumns, plain_problems, text_array
from megatron_s2d.data.files import Problem, rows_of
from megatron_s2d.data.forked_map import forked_map
from megatron_s2d.data.row_ranges import RowRange, row_ranges
from megatron_s2d.data.text_columns import text_digests
from megatron_s2d.errors import UserError

if TYPE_CHECKING:
    import pyarrow

_PROBLEMS_AT_ONCE, _BYTES_AT_ONCE = 16384, 32 << 20  # that are converted together
DUPLICATES = "duplicates"


@dataclasses.dataclass(frozen=True)
class ProblemBatch[Content: Sized]:
    """What ``convert`` made of consecutive problems, and which of them are kept: a mask [len(content)]."""

    content: Content
    kept: np.ndarray
    share: float  # of all files, up to here


@dataclasses.dataclass(frozen=True)
class _Part:
    """Rows of one file that a process reads."""

    rows: RowRange
    prefix: str  # of their ids
    share: float
    chosen: np.ndarray | None = None  # numbers of the rows to read, from 1; None: all


@dataclasses.dataclass(frozen=True)
class _ReadPart[Content]:
    """What a process read: all rows, or those before a mistake in one."""

    ids: pyarrow.StringArray
    numbers: np.ndarray  # of the rows, from 1
    keys: np.ndarray | None  # digests of the ids; None where ids are the numbers of rows, which do not repeat
    batches: list[Content]
    error: UserError | None


def read_problems(source: FileSource, counts: dict[str, int]) -> Iterator[Problem]:
    """Yield the problems of all files of ``source`` in order; see ``convert_problems``."""
    for batch in convert_problems(source, counts, list):
        yield from itertools.compress(batch.content, batch.kept)


def convert_problems[Content: Sized](
    source: FileSource, counts: dict[str, int], convert: Callable[[Sequence[Problem]], Content], processes: int = 1
) -> Iterator[ProblemBatch[Content]]:
    """Yield ``convert`` of the problems of all files in order, and count dropped rows with a repeated id in ``counts``.

    convert: returns as many values as it gets problems; runs in one of ``processes`` processes. ``skip`` and
    ``limit`` count the rows that ``min_values`` and ``on_duplicate_id`` keep. With ``limit_seed`` every row is read,
    and the chosen ones a second time.

    Raises ``UserError`` for what ``row_ranges`` and ``rows_of`` do and (unless ``on_duplicate_id: drop``) a repeated
    id.
    """
    parts = _parts(source)
    if source.limit_seed is not None:
        parts = _sampled(source, counts, processes)
        source = source.model_copy(update={"limit": None, "skip": 0})  # which the sample is of
    for part, result, kept in _distinct(source, counts, parts, convert, processes):
        start = 0
        for content in result.batches:
            mask = kept[start : start + len(content)]
            start += len(content)
            if mask.any():
                yield ProblemBatch(content, mask, part.share)


def _parts(source: FileSource) -> Iterator[_Part]:
    sizes = np.cumsum([0, *(path.stat().st_size if path.is_file() else 0 for path in source.paths)])
    for index, (path, prefix) in enumerate(zip(source.paths, id_prefixes(source.paths), strict=True)):
        for rows in row_ranges(path):
            size = sizes[index] + rows.end * (sizes[index + 1] - sizes[index])
            yield _Part(rows, prefix, float(size / max(1, sizes[-1])))


def _distinct[Content: Sized](
    source: FileSource,
    counts: dict[str, int],
    parts: Iterator[_Part],
    convert: Callable[[Sequence[Problem]], Content],
    processes: int,
) -> Iterator[tuple[_Part, _ReadPart[Content], np.ndarray]]:
    """Yield what was read of each part and the mask of its problems that are kept: the first of each id, without
    ``skip``, up to ``limit``.
    """
    drops, remaining, to_skip = source.on_duplicate_id == "drop", source.limit, source.skip
    counts.setdefault(DUPLICATES, 0)
    seen, (parts, read_parts) = SeenIds(), itertools.tee(parts)

    def read(part: _Part) -> _ReadPart[Content]:
        return _read(source, part, convert)

    for part, result in zip(parts, forked_map(read, read_parts, processes), strict=False):
        new = np.ones(len(result.ids), dtype=bool) if result.keys is None else seen.add(result.keys)
        error = result.error
        kept = new
        if not drops and not new.all():
            first = int(np.argmin(new))
            error = _repeated(part.rows.path, int(result.numbers[first]), result.ids[first].as_py())
            kept = new & (np.arange(len(new)) < first)
        if to_skip:
            skipped = kept & (np.cumsum(kept) <= to_skip)
            kept, to_skip = kept & ~skipped, to_skip - int(skipped.sum())
        if remaining is not None:
            kept = kept & (np.cumsum(kept) <= remaining)
            remaining -= int(kept.sum())
        before = len(new) if remaining != 0 else int(np.flatnonzero(kept)[-1]) + 1 if kept.any() else 0
        counts[DUPLICATES] += int((~new[:before]).sum())
        yield part, result, kept
        if remaining == 0:
            return
        if error is not None:
            raise error


def _repeated(path: Path, number: int, id_: str) -> UserError:
    return UserError(
        f"{path}: row {number}: duplicate id '{id_}'; make ids unique, or set on_duplicate_id: drop to use the first "
        "row of each id"
    )


def _read[Content: Sized](
    source: FileSource, part: _Part, convert: Callable[[Sequence[Problem]], Content]
) -> _ReadPart[Content]:
    """Read and convert the rows of a part, up to the first mistake."""
    plain = plain_problems(source, part.rows, part.prefix) if part.chosen is None else None
    error = None
    if plain is not None:
        problems, numbers = plain
    else:
        listed: list[Problem] = []
        of_rows: list[int] = []
        chosen = None if part.chosen is None else frozenset(part.chosen.tolist())
        try:
            for row, problem in rows_of(source, part.rows, part.prefix, chosen):
                listed.append(problem)
                of_rows.append(row.number)
        except UserError as mistake:
            error = mistake
        problems, numbers = ProblemColumns.of(listed), np.array(of_rows, dtype=np.int64)
    batches, mistake = _converted(problems, convert)
    count = sum(map(len, batches))
    ids = problems.ids[:count]
    numbered = source.schema_ == "columns" and source.columns.id is None
    return _ReadPart(ids, numbers[:count], None if numbered else id_keys(ids), batches, mistake or error)


def _converted[Content: Sized](
    problems: ProblemColumns, convert: Callable[[Sequence[Problem]], Content]
) -> tuple[list[Content], UserError | None]:
    """Return what ``convert`` makes of all problems, or of those before the first that it refuses, and the refusal."""
    batches = []
    for together in _groups(problems):
        try:
            batches.append(convert(together))
        except UserError:
            for problem in together:
                try:
                    batches.append(convert([problem]))
                except UserError as error:
                    return batches, error
            raise
    return batches, None


def _groups(problems: ProblemColumns) -> Iterator[ProblemColumns]:
    """Yield consecutive problems of limited number and size; the text of an Arrow array has at most 2 GiB."""
    start = size = 0
    sizes = problems.sizes()
    if 0 < len(problems) <= _PROBLEMS_AT_ONCE and sizes.sum() < _BYTES_AT_ONCE:  # as a rule
        yield problems
        return
    for index, num_bytes in enumerate(sizes.tolist()):
        size += num_bytes
        if index + 1 - start == _PROBLEMS_AT_ONCE or size >= _BYTES_AT_ONCE or index + 1 == len(problems):
            yield problems[start : index + 1]
            start, size = index + 1, 0


def _sampled(source: FileSource, counts: dict[str, int], processes: int) -> Iterator[_Part]:
    """Yield the parts with a random sample of ``limit`` problems; it depends on their ids, not on their order."""
    import pyarrow
    import pyarrow.compute

    parts: list[_Part] = []
    ids: list[pyarrow.Array] = []
    numbers: list[np.ndarray] = []
    everything = source.model_copy(update={"limit": None})
    for part, result, kept in _distinct(everything, counts, _parts(source), _without_content, processes):
        parts.append(part)
        ids.append(result.ids.filter(pyarrow.array(kept)))
        numbers.append(result.numbers[kept])
    by_id = pyarrow.compute.sort_indices(pyarrow.chunked_array(ids)).to_numpy()
    mask = np.ones(len(by_id), dtype=bool)
    if source.limit is not None and len(by_id) > source.limit:
        mask[by_id[np.random.default_rng(source.limit_seed).permutation(len(by_id))[source.limit :]]] = False
    masks = np.split(mask, np.cumsum([len(part) for part in numbers])[:-1])
    for part, rows, chosen in zip(parts, numbers, masks, strict=True):
        if chosen.any():
            yield dataclasses.replace(part, chosen=rows[chosen])


def _without_content(problems: Sequence[Problem]) -> range:
    return range(len(problems))


def id_keys(ids: Sequence[str] | pyarrow.StringArray) -> np.ndarray:
    """Return a digest of each id, uint64 [n]: two of ten million share one with probability 3e-6."""
    import pyarrow

    return text_digests(ids if isinstance(ids, pyarrow.Array) else text_array(ids))


class SeenIds:
    """The set of ``id_keys`` so far, in 8 bytes each: a Python set of ten million takes a gigabyte."""

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []  # sorted, each at least twice as long as the next

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Return the mask [n] of the keys [n] that are new, and no repetition among themselves."""
        values, first = np.unique(keys, return_index=True)
        is_new = np.ones(len(values), dtype=bool)
        for level in self._levels:
            places = np.minimum(np.searchsorted(level, values), len(level) - 1)
            is_new &= level[places] != values
        mask = np.zeros(len(keys), dtype=bool)
        mask[first[is_new]] = True
        self._store(values[is_new])
        return mask

    def _store(self, values: np.ndarray) -> None:
        if not len(values):
            return
        while self._levels and len(self._levels[-1]) < 2 * len(values):
            values = np.concatenate([self._levels.pop(), values])
            values.sort(kind="stable")  # which merges the two sorted ones
        self._levels.append(values)


def id_prefixes(paths: Sequence[Path]) -> list[str]:
    """Return the prefixes of ids: the names of the files, with as many folders as make them unique."""
    depths = range(1, max(len(path.parts) for path in paths) + 1)
    for bare, depth in [*((True, depth) for depth in depths), *((False, depth) for depth in depths)]:
        names = ["/".join((path.with_suffix("") if bare else path).parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{max(paths, key=paths.count)}: the file appears twice in `path`")
