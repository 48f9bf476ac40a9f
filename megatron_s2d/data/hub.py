"""Data sets of the Hugging Face hub as files.

``datasets`` downloads and converts a split into its own cache, or streams its first rows, which become one file here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_s2d.artifacts.files import atomic_write_json, file_digest, json_digest, read_json_object
from megatron_s2d.config.base import dump
from megatron_s2d.config.data import FileSource, HubSource, RowSource
from megatron_s2d.errors import UserError

_ROWS_PER_BATCH = 1000  # of a stream


def as_files(source: FileSource | HubSource, cache_dir: Path) -> FileSource:
    """Return a source of the Arrow files of a hub's data set, in its order; a source of files is returned unchanged.

    Downloads what the cache of ``datasets`` lacks, once: ``cache_dir`` remembers the files, so that later stages and
    other ranks do not ask the hub again. Raises ``UserError`` for a data set that cannot be loaded, and for a revision
    that is no commit, with the newest one.
    """
    if isinstance(source, FileSource):
        return source
    revision = source.revision
    if not Path(source.dataset).is_dir() and not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise UserError(
            f"revision: {revision or 'a branch'} may have other rows tomorrow: set revision: {_commit(source)}"
        )
    names = ("dataset", "name", "split", "revision", *(("stream_rows",) if source.stream_rows else ()))
    remembered = cache_dir / f"hub-{json_digest({name: dump(source)[name] for name in names})}.json"
    record = read_json_object(remembered) if revision and remembered.exists() else {}
    paths = record.get("paths", [])
    if "sha256" in record and Path(paths[0]).is_file() and file_digest(Path(paths[0])) != record["sha256"]:
        raise UserError(f"{paths[0]}: differs from the rows that were streamed: remove it to stream them again")
    if not paths or not all(Path(path).is_file() for path in paths):
        record = _load(source) if source.stream_rows is None else _stream(source, remembered.with_suffix(".parquet"))
        atomic_write_json(remembered, record)
        paths = record["paths"]
    return FileSource(
        path=[Path(path) for path in paths], **{name: getattr(source, name) for name in RowSource.model_fields}
    )


def _load(source: HubSource) -> dict[str, Any]:
    import datasets  # imports pandas and fsspec: only where it is used

    try:
        # This never runs code of the data set: datasets 4 and later cannot.
        rows = datasets.load_dataset(source.dataset, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # of the network, the hub, the data set's files and its description
        raise _failure(source, error) from error
    return {"paths": [file["filename"] for file in rows.cache_files]}


def _stream(source: HubSource, path: Path) -> dict[str, Any]:
    """Write the first rows of the split to ``path``; return which rows these are, and their digest.

    A commit has its files in one order, so that everybody gets the same rows.
    """
    import datasets

    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    num_rows, writer = 0, None
    try:
        rows = datasets.load_dataset(
            source.dataset, source.name, split=source.split, revision=source.revision, streaming=True
        )
        for table in rows.take(source.stream_rows).with_format("arrow").iter(_ROWS_PER_BATCH):
            writer = writer or pq.ParquetWriter(partial, table.schema)
            writer.write_table(table)
            num_rows += len(table)
        if writer is None:
            raise UserError(f"data set {source.dataset!r}: the split {source.split} has no rows")
        writer.close()
        os.replace(partial, path)
    except UserError:
        raise
    except Exception as error:  # as in ``_load``, and of the connection in the middle of it
        raise _failure(source, error) from error
    finally:
        partial.unlink(missing_ok=True)
    digest = file_digest(path)
    return {"paths": [str(path)], "revision": source.revision, "rows": [0, num_rows], "sha256": digest}


def _commit(source: HubSource) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(source.dataset, revision=source.revision).sha)
    except Exception as error:  # of the network and the hub
        raise _failure(source, error) from error


def _failure(source: HubSource, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"data set {source.dataset!r} cannot be loaded ({reason}); give its name on the hub and a configuration, split "
        "and revision that it has, or a folder"
    )
