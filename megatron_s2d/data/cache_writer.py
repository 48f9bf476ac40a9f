"""Writes a teacher cache: each process one directory, and one of them the header that joins the directories.

Shapes: r response tokens of a sample, k top-k entries, v vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_s2d.artifacts.files import atomic_directory, atomic_write_json, file_digest, json_digest
from megatron_s2d.data.cache import (
    DTYPES,
    FORMAT,
    HEADER_NAME,
    SAMPLES_NAME,
    TENSORS,
    VERSION,
    CachedDistribution,
    CacheHeader,
    check_rows,
    content_digest,
    read_header,
    shard_name,
    token_digest,
)
from megatron_s2d.data.cache_index import IDS_NAME, INDEX_NAME, ids_file, index_row
from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample, sample_to_json

_SHARD_BYTES = 256 << 20


def _dense_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense copy on the CPU (``contiguous`` would keep the stride of a single row)."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


class CacheWriter:
    """Streams samples and distributions into a new cache from one process. A context manager; or call ``finish``.

    ``directory`` appears with ``finish``; an exception inside the ``with`` block deletes all written files.
    """

    def __init__(self, directory: str | Path, header: CacheHeader, *, shard_bytes: int = _SHARD_BYTES):
        self.header, self._shard_bytes = header, shard_bytes
        self._stack = contextlib.ExitStack()
        self._path = self._stack.enter_context(atomic_directory(directory))
        self._files = {
            name: self._stack.enter_context((self._path / name).open("wb")) for name in (SAMPLES_NAME, INDEX_NAME)
        }
        self._pending: list[dict[str, torch.Tensor]] = []
        self._pending_bytes = self._pending_rows = 0
        self._shards: list[dict[str, Any]] = []
        self._ids: dict[str, None] = {}  # in order
        self._tokens, self._captured_mass, self._longest = 0, 0.0, 0
        self._offset = 0  # in the file of samples
        self._finished = False

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._stack.__exit__(*error)
        elif not self._finished:
            self.finish()

    def add(self, sample: Sample, distribution: CachedDistribution, position: int | None = None) -> None:
        """Append one sample; its distribution has one row per response token and is copied to the CPU.

        position: of the sample among those of several writers, by default its number here.
        """
        if sample.id in self._ids:
            raise UserError(f"sample {sample.id} is already in the cache: ids must be unique")
        tensors = {name: _dense_copy(value) for name, value in distribution.tensors().items()}
        self._check(sample, tensors)
        line = sample_to_json(sample).encode() + b"\n"
        row = index_row(
            sample,
            line,
            position=len(self._ids) if position is None else position,
            offset=self._offset,
            shard=len(self._shards),
            start=self._pending_rows,
            tokens=token_digest(sample),
            content=content_digest(tensors),
        )
        self._files[SAMPLES_NAME].write(line)
        self._files[INDEX_NAME].write(row.tobytes())
        self._offset += len(line)
        self._longest = max(self._longest, sample.response_length)
        self._ids[sample.id] = None
        self._pending.append(tensors)
        self._pending_rows += sample.response_length
        self._pending_bytes += sum(value.nbytes for value in tensors.values())
        self._tokens += sample.response_length
        if self.header.representation == "top_k":
            self._captured_mass += float(tensors["log_probs"].double().exp().sum())
        if self._pending_bytes >= self._shard_bytes:
            self._flush()

    def _check(self, sample: Sample, tensors: dict[str, torch.Tensor]) -> None:
        expected = self.header.shapes(sample.response_length)
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        if shapes != expected:
            raise UserError(
                f"sample {sample.id}: a {self.header.representation} cache needs shapes {expected}, got {shapes}"
            )
        for name, value in tensors.items():
            if value.dtype not in DTYPES.get(name, (torch.float32,)):
                raise UserError(f"sample {sample.id}: {name} cannot be stored as {value.dtype}")
            if value.is_floating_point() and bool(torch.isnan(value).any()):
                raise UserError(f"sample {sample.id}: the teacher's {name} contain NaN: check the teacher's weights")
        check_rows(sample, tensors["token_digests"], "the distribution to be cached")
        ids = tensors.get("ids")
        if ids is not None and ids.numel():
            ordered = ids.sort(dim=1).values
            if int(ordered[:, 0].min()) < 0 or int(ordered[:, -1].max()) >= self.header.vocab_size:
                raise UserError(
                    f"sample {sample.id}: top-k ids outside the vocabulary of {self.header.vocab_size} tokens"
                )
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise UserError(f"sample {sample.id}: the top-k ids of one position contain a token twice")

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._path / shard_name(len(self._shards))
        shard = {
            name: torch.cat([tensors[name] for tensors in self._pending])
            for name in TENSORS[self.header.representation]
        }
        save_file(shard, path)
        self._shards.append(_described(path) | {"rows": self._pending_rows})
        self._pending, self._pending_bytes, self._pending_rows = [], 0, 0

    def finish(self) -> None:
        """Write the pending rows and the header, and rename the directory to its final name."""
        try:
            self._flush()
            for file in self._files.values():
                file.close()
            (self._path / IDS_NAME).write_bytes(ids_file(list(self._ids)))
            names = (SAMPLES_NAME, INDEX_NAME, IDS_NAME)
            body = {
                "header": self.header.model_dump(),
                "samples": len(self._ids),
                "tokens": self._tokens,
                "longest_response": self._longest,
                "num_shards": len(self._shards),
                "shard_bytes": sum(shard["bytes"] for shard in self._shards),
                "shards": self._shards,
                "files": {name: _described(self._path / name) for name in names},
            }
            if self.header.representation == "top_k":
                body["captured_mass"] = self._captured_mass / max(1, self._tokens)
            _write_header(self._path, body)
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        self._stack.close()
        self._finished = True


def join_parts(directory: Path, names: Sequence[str], header: CacheHeader) -> None:
    """Write the header of ``directory``, whose folders ``names`` are the parts of one cache, in this order."""
    bodies = [read_header(directory / name) for name in names]
    body: dict[str, Any] = {"header": header.model_dump()}
    body |= {field: sum(part[field] for part in bodies) for field in ("samples", "tokens", "num_shards", "shard_bytes")}
    body["longest_response"] = max((part["longest_response"] for part in bodies), default=0)
    body["parts"] = [
        {"name": name, "samples": part["samples"], "digest": json_digest(part)}
        for name, part in zip(names, bodies, strict=True)
    ]
    if header.representation == "top_k":
        mass = sum(part["captured_mass"] * part["tokens"] for part in bodies)
        body["captured_mass"] = mass / max(1, body["tokens"])
    _write_header(directory, body)


def _described(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def _write_header(directory: Path, body: dict[str, Any]) -> None:
    document = {"format": FORMAT, "version": VERSION, "body": body, "body_digest": json_digest(body)}
    atomic_write_json(directory / HEADER_NAME, document)
