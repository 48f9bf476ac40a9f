"""Rows of JSON, JSON-lines, Parquet and Arrow files, in ranges that processes read on their own. No torch here."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.errors import UserError

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_RANGE, BYTES_PER_RANGE = 16384, 8 << 20
_ROWS_PER_BATCH = 1000
# A range in the middle of a row group decodes the rows before it as well.
_MAX_SLICES = 64
_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")


@dataclasses.dataclass(frozen=True)
class RowRange:
    """Consecutive rows of a file."""

    path: Path
    first_row: int  # its number in the file, from 0
    end: float  # share of the file's content up to the end of this range
    byte_range: tuple[int, int] | None = None  # of JSON lines, from the start of a line; None: a list of objects
    first_line: int = 0  # of JSON lines, blank ones counted, from 0
    row_groups: tuple[int, ...] = ()  # of Parquet
    skipped: int = 0  # rows of the row groups before the range
    num_rows: int = 0  # of Parquet


def row_ranges(path: Path) -> Iterator[RowRange]:
    """Yield the ranges of a file in order, of about ``ROWS_PER_RANGE`` rows; a list of objects or an Arrow file is one.

    Raises ``UserError`` for a missing, empty or unreadable file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: not a .jsonl, .json, .parquet or .arrow file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    if path.suffix == ".parquet":
        ranges = _parquet_ranges(path)
    elif path.suffix == ".arrow" or _is_list(path):
        ranges = iter([RowRange(path, 0, 1.0)])
    else:
        ranges = _line_ranges(path)
    first = next(ranges, None)
    if first is None:
        raise UserError(f"{path}: no rows")
    return itertools.chain([first], ranges)


def rows_in(rows: RowRange) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a range."""
    if rows.path.suffix == ".parquet":
        return _parquet_rows(rows)
    if rows.path.suffix == ".arrow":
        return _arrow_rows(rows.path)
    return _listed_rows(rows.path) if rows.byte_range is None else _line_rows(rows)


def read_lines(rows: RowRange) -> bytes:
    """Return the bytes of a range of JSON lines."""
    assert rows.byte_range is not None
    start, end = rows.byte_range
    with open(rows.path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def content_size(path: Path) -> int:
    """Return the bytes of a file's content: of Parquet uncompressed, if it can be read."""
    size = path.stat().st_size
    if path.suffix != ".parquet":
        return size
    with contextlib.suppress(UserError), _parquet_file(path) as file:
        groups = (file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups))
        size = max(size, sum(groups))
    return size


def parse_json(content: bytes, location: str) -> Any:
    """Return the value of JSON text; raise ``UserError`` that names its location."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not valid JSON ({error})") from None


# -------------------------------------------------------------------------------- JSON
# Not through an Arrow table: with one type per column, 2 next to 1.5 becomes 2.0, integers beyond 64 bits become
# floats, and the arguments of MBPP+ do not fit.


def _is_list(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return path.suffix == ".json" and start.startswith(b"[")


def _listed_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    values = parse_json(path.read_bytes(), str(path))
    if not values:
        raise UserError(f"{path}: no rows")
    for number, row in enumerate(values, 1):
        yield _mapping(row, f"{path}: row {number}")


def _line_ranges(path: Path) -> Iterator[RowRange]:
    total = path.stat().st_size
    start = position = first_row = first_line = num_rows = num_lines = 0
    with open(path, "rb") as file:
        for line in file:
            position += len(line)
            num_lines += 1
            num_rows += bool(line.strip())
            if num_rows == ROWS_PER_RANGE or position - start >= BYTES_PER_RANGE:
                yield RowRange(path, first_row, position / total, (start, position), first_line)
                first_row, first_line = first_row + num_rows, first_line + num_lines
                start, num_rows, num_lines = position, 0, 0
    if num_rows:
        yield RowRange(path, first_row, 1.0, (start, position), first_line)


def _line_rows(rows: RowRange) -> Iterator[Mapping[str, Any]]:
    assert rows.byte_range is not None
    position, end = rows.byte_range
    with open(rows.path, "rb") as file:
        file.seek(position)
        for number, line in enumerate(file, rows.first_line + 1):
            position += len(line)
            if line.strip():
                location = f"{rows.path}: line {number}"
                yield _mapping(parse_json(line, location), location)
            if position >= end:
                return


def _mapping(row: Any, location: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{location}: expected an object, got {type(row).__name__}")
    return row


# -------------------------------------------------------------------------------- Parquet


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into ``UserError``."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: text is not UTF-8 ({error})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({str(error).strip().splitlines()[0]})") from error


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with _parquet_errors(path), parquet.ParquetFile(path) as file:
        yield file


def _parquet_ranges(path: Path) -> Iterator[RowRange]:
    """Yield row groups, small ones together and large ones in slices."""
    with _parquet_file(path) as file:
        metadata = file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    total, first_row = max(1, sum(count for count, _ in sizes)), 0
    for members in _together(sizes):
        count = sum(sizes[index][0] for index in members)
        num_bytes = sum(sizes[index][1] for index in members)
        slices = min(_MAX_SLICES, max(1, ceil_div(count, ROWS_PER_RANGE), ceil_div(num_bytes, BYTES_PER_RANGE)))
        length = max(1, ceil_div(count, slices))
        for skipped in range(0, count, length):
            num_rows, start = min(length, count - skipped), first_row + skipped
            end = (start + num_rows) / total
            yield RowRange(path, start, end, row_groups=tuple(members), skipped=skipped, num_rows=num_rows)
        first_row += count


def _together(sizes: list[tuple[int, int]]) -> Iterator[list[int]]:
    """Yield the row groups (rows, bytes) that a range reads together: of limited size, unless it is one."""
    members: list[int] = []
    num_rows = num_bytes = 0
    for index, (count, size) in enumerate(sizes):
        if members and (num_rows + count > ROWS_PER_RANGE or num_bytes + size > BYTES_PER_RANGE):
            yield members
            members, num_rows, num_bytes = [], 0, 0
        members.append(index)
        num_rows, num_bytes = num_rows + count, num_bytes + size
    if members:
        yield members


def _parquet_rows(rows: RowRange) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a range, without a copy of the file on disk."""
    skipped, remaining = rows.skipped, rows.num_rows
    with _parquet_file(rows.path) as file:
        for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=rows.row_groups, use_threads=False):
            start = min(skipped, len(batch))
            part = batch.slice(start, remaining)
            skipped, remaining = skipped - start, remaining - len(part)
            yield from part.to_pylist()
            if not remaining:
                return


def parquet_columns(rows: RowRange, names: Sequence[str]) -> pyarrow.Table | None:
    """Return columns of a range; None if the file does not have each of them once, at its top level."""
    global _columns
    with _parquet_errors(rows.path):
        status = rows.path.stat()
        wanted = (rows.path, rows.row_groups, tuple(names), status.st_size, status.st_mtime_ns)
        if _columns is None or _columns.of != wanted or _columns.position > rows.skipped:
            _columns = _Columns(wanted)
        try:
            return _columns.read(rows.skipped, rows.num_rows)
        except BaseException:
            _columns = None
            raise


class _Columns:
    """Columns of row groups that are read forward: a process decodes a row once, however many ranges it has of them."""

    def __init__(self, of: tuple[Path, tuple[int, ...], tuple[str, ...], int, int]) -> None:
        """of: path, row groups, names of columns, size and time of the file."""
        from pyarrow import parquet

        self.of, (path, row_groups, names, *_) = of, of
        file = parquet.ParquetFile(path)
        fields = file.schema_arrow.names
        self._has_all = all(fields.count(name) == 1 and "." not in name for name in names)
        options = {"row_groups": row_groups, "columns": list(names), "use_threads": False}
        self._batches = file.iter_batches(_ROWS_PER_BATCH, **options) if self._has_all else iter(())
        self._rest: list[pyarrow.RecordBatch] = []
        self.position = 0  # rows of the groups that are behind

    def read(self, start: int, count: int) -> pyarrow.Table | None:
        """Return rows from ``start`` on, at or behind ``position``; None without these columns."""
        import pyarrow

        if not self._has_all:
            return None
        self._next(start - self.position)
        batches = self._next(count)
        return pyarrow.Table.from_batches(batches) if batches else None

    def _next(self, count: int) -> list[pyarrow.RecordBatch]:
        """Return the next ``count`` rows, or those that are left."""
        batches = []
        self.position += count
        while count:
            batch = self._rest.pop() if self._rest else next(self._batches, None)
            if batch is None:
                break
            batches.append(batch.slice(0, count))
            if len(batch) > count:
                self._rest.append(batch.slice(count))
            count -= len(batches[-1])
        return batches


_columns: _Columns | None = None  # that this process read last


# -------------------------------------------------------------------------------- Arrow
def _arrow_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file in the Arrow stream format, which ``datasets`` writes, or the Arrow file format."""
    import pyarrow

    count = 0
    try:
        with pyarrow.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(file)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(file))
            for batch in batches:
                count += batch.num_rows
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Arrow ({str(error).strip().splitlines()[0]})") from error
    if not count:
        raise UserError(f"{path}: no rows")
