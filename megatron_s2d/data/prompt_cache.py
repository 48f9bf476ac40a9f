"""Tables of prompts on disk: prepared once, memory-mapped by every rank of a machine.

A table is ``prompts.arrow`` (an Arrow stream, which ``datasets.Dataset.from_file`` opens too), ``counts.json`` and
arrays with a value for each row, in a directory named after the content of the files, the settings and the tokenizer.
One process writes it, with the help of one for each core, while the others of its machine wait; it appears complete or
not at all. Small files stay in memory. No torch here.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_s2d.artifacts.files import (
    atomic_directory,
    atomic_write_json,
    disk_errors,
    file_digest,
    json_digest,
    read_json_object,
)
from megatron_s2d.artifacts.lock import directory_lock
from megatron_s2d.data.forked_map import num_processes
from megatron_s2d.data.problems import ProblemBatch
from megatron_s2d.data.prompt_table import PromptTable, schema
from megatron_s2d.data.row_ranges import content_size
from megatron_s2d.data.stored_arrays import ANNOUNCE_SECONDS
from megatron_s2d.data.text_tokens import TextTokens
from megatron_s2d.errors import UserError

if TYPE_CHECKING:
    import pyarrow

IN_MEMORY_BYTES = 8 << 20
"""Files whose content has fewer bytes are read into memory, and nothing is written."""

_TABLES_IN_MEMORY = 8
_WAIT_SECONDS = 24 * 3600.0  # for the process that prepares the same table
_PROMPTS, _COUNTS = "prompts.arrow", "counts.json"
_LOG = logging.getLogger(__name__)

_recent: dict[str, tuple[PromptTable, dict[str, int]]] = {}  # of this process, by the key of a table


class Reader(Protocol):
    """Reads the prompts of files in some processes, and leaves counts of rows in its argument.

    deferred: without tokens, if their tokenizer is ``bounded``.
    """

    def __call__(
        self, counts: dict[str, int], processes: int, *, deferred: bool
    ) -> Iterator[ProblemBatch[pyarrow.RecordBatch]]: ...


def table_of_files(
    paths: Sequence[Path], settings: Mapping[str, Any], directory: Path, read: Reader, tokens: TextTokens
) -> tuple[PromptTable, dict[str, int]]:
    """Return the table of the prompts that ``read`` yields, and the counts that it leaves in its argument.

    settings: all that the prompts depend on besides the content of ``paths``. The table of files whose content has
    ``IN_MEMORY_BYTES`` or more is kept in ``directory`` and used again. tokens: of the prompts that ``read`` leaves
    without.
    """
    digests = [content_digest(path, directory) for path in paths]
    key = json_digest({"code": _code_digest(), "files": digests, "settings": dict(settings)})
    if sum(map(content_size, paths)) < IN_MEMORY_BYTES:
        return _in_memory(key, read)
    target = directory / key
    if not target.exists():
        with directory_lock(directory / "locks" / key, wait_seconds=_WAIT_SECONDS, announce=_LOG.warning):
            if not target.exists():
                _LOG.warning("preparing %s in %s, once", ", ".join(map(str, paths)), target)
                _write(target, read, tokens)
    return _open(target, tokens)


def _in_memory(key: str, read: Reader) -> tuple[PromptTable, dict[str, int]]:
    """Return the table of small files; the last few are used again, as halves of an entry and stages ask for them."""
    import pyarrow

    if key not in _recent:
        counts: dict[str, int] = {}
        batches = [_kept(batch) for batch in read(counts, 1, deferred=False)]
        while len(_recent) >= _TABLES_IN_MEMORY:
            del _recent[next(iter(_recent))]
        _recent[key] = PromptTable(pyarrow.Table.from_batches(batches, schema())), counts
    table, counts = _recent[key]
    return table, dict(counts)


def _kept(batch: ProblemBatch[pyarrow.RecordBatch]) -> pyarrow.RecordBatch:
    return batch.content if batch.kept.all() else batch.content.filter(batch.kept)


def content_digest(path: Path, directory: Path) -> str:
    """Return the SHA-256 of a file; of a large one, again only if its size or the times of its change differ."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    status = path.stat()
    if status.st_size < IN_MEMORY_BYTES:
        return file_digest(path)
    seen = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    memo = directory / "digests" / f"{name}.json"
    if memo.exists():
        known = read_json_object(memo)
        if all(known.get(key) == value for key, value in seen.items()):
            return str(known["sha256"])
    digest = file_digest(path)
    atomic_write_json(memo, {**seen, "path": str(path.resolve()), "sha256": digest})
    return digest


def _write(target: Path, read: Reader, tokens: TextTokens) -> None:
    import pyarrow

    counts: dict[str, int] = {}
    num_rows, announced = 0, time.monotonic()
    with atomic_directory(target) as partial, disk_errors(target):
        with pyarrow.OSFile(str(partial / _PROMPTS), "wb") as file, pyarrow.ipc.new_stream(file, schema()) as stream:
            for batch in read(counts, num_processes(), deferred=True):
                content = _kept(batch)
                stream.write_batch(content)
                num_rows += len(content)
                if time.monotonic() - announced >= ANNOUNCE_SECONDS:
                    announced = time.monotonic()
                    _LOG.warning("prepared %s prompts, %.0f %% of the files", f"{num_rows:,}", 100 * batch.share)
        atomic_write_json(partial / _COUNTS, counts)
        _table(partial, tokens).prepare()


def _open(directory: Path, tokens: TextTokens) -> tuple[PromptTable, dict[str, int]]:
    try:
        table, counts = _table(directory, tokens), read_json_object(directory / _COUNTS)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: damaged table of prompts ({error}); remove this directory") from None
    return table, counts


def _table(directory: Path, tokens: TextTokens) -> PromptTable:
    import pyarrow

    table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(directory / _PROMPTS))).read_all()
    return PromptTable(table, None, directory, tokens if table.column("token_ids").null_count else None)


@functools.cache
def _code_digest() -> str:
    """Return the digest of this package: what it reads from a row may change with it."""
    return json_digest([file_digest(path) for path in sorted(Path(__file__).parent.glob("*.py"))])
