"""The teacher cache: responses with the teacher's distribution at every response token, on disk.

A directory: ``header.json`` (what is stored and the digests of the other files; written last), ``samples.jsonl`` (the
responses), ``index.jsonl`` (one row per sample: token digest, shard, rows, digest of its distribution) and safetensors
shards. Rows are per response token in order, so they do not depend on the reader's layout, packing or order of samples.

Representations (methods.md M2): ``sampled_token`` log-probability of the sampled token; ``top_k`` k ids and
log-probabilities with the log of the remaining mass; ``hidden_states`` final hidden states, after the last norm, for
the teacher's own output layer; ``full_vocab`` all log-probabilities.

A directory appears under its name complete or not at all. Resuming an unfinished cache is not supported here;
``data/packing.py`` and ``teachers/cached.py`` turn rows into batches.

Shapes: r response tokens of a sample, k top-k entries, v vocabulary, h hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_s2d.artifacts.files import atomic_directory, atomic_write_json, file_digest, json_digest, read_json
from megatron_s2d.config.base import Config, parse
from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample, read_samples, sample_to_json

FORMAT = "megatron_s2d teacher cache"
VERSION = 3
_SHARD_BYTES = 256 << 20
_HEADER, _SAMPLES, _INDEX = "header.json", "samples.jsonl", "index.jsonl"
_TENSORS = {
    "sampled_token": ("log_probs",),
    "top_k": ("ids", "log_probs", "log_tail_mass"),
    "hidden_states": ("hidden",),
    "full_vocab": ("log_probs",),
}


class CacheHeader(Config):
    """The origin of the distributions. Opening a cache with another expected header raises ``UserError``."""

    representation: Literal["sampled_token", "top_k", "hidden_states", "full_vocab"] = Field(
        description="what is stored per response token"
    )
    teacher_digest: str = Field(description="digest of the teacher's weights")
    tokenizer_fingerprint: str = Field(description="digest of the tokenizer")
    template_fingerprint: str = Field(description="digest of the chat template that rendered the prompts")
    temperature: float = Field(
        gt=0, description="of the log-probabilities; 1 for hidden_states, which have none of their own"
    )
    vocab_size: int = Field(ge=1, description="valid token ids, without padding")
    k: int | None = Field(None, ge=1, description="entries per token of representation top_k")
    hidden_size: int | None = Field(None, ge=1, description="width of representation hidden_states")

    @pydantic.model_validator(mode="after")
    def _sizes_of_representation(self) -> CacheHeader:
        if (self.representation == "top_k") != (self.k is not None) or (self.representation == "hidden_states") != (
            self.hidden_size is not None
        ):
            raise ValueError("k belongs to representation top_k and hidden_size to hidden_states, each to no other")
        if self.k is not None and self.k > self.vocab_size:
            raise ValueError(f"k {self.k} exceeds the vocabulary of {self.vocab_size}")
        return self

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each stored tensor for ``rows`` response tokens."""
        widths = {
            "top_k": (self.k,),
            "full_vocab": (self.vocab_size,),
            "hidden_states": (self.hidden_size,),
            "sampled_token": (),
        }
        shape = (rows, *widths[self.representation])
        return {name: (rows,) if name == "log_tail_mass" else shape for name in _TENSORS[self.representation]}


@dataclasses.dataclass(frozen=True, eq=False)
class CachedDistribution:
    """The teacher at the response tokens of one sample; only the fields of the cache's representation are set."""

    log_probs: torch.Tensor | None = None  # float32: sampled_token [r], top_k [r, k], full_vocab [r, v]
    ids: torch.Tensor | None = None  # [r, k] int32, distinct in a row
    log_tail_mass: torch.Tensor | None = None  # [r] float32, -inf if no mass remains
    hidden: torch.Tensor | None = None  # [r, h] in the dtype of the teacher

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


def token_digest(sample: Sample) -> str:
    """Return the digest of a sample's tokens and response mask, which identifies its distribution."""
    tokens = np.ascontiguousarray(sample.token_ids, dtype=np.int64).tobytes()
    mask = np.packbits(np.ascontiguousarray(sample.response_mask, dtype=np.bool_)).tobytes()
    return hashlib.sha256(len(sample.token_ids).to_bytes(8, "little") + tokens + mask).hexdigest()


def _dense_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense copy on the CPU (``contiguous`` would keep the stride of a single row)."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _content_digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.view(torch.uint8).numpy()).cast("B") if tensor.numel() else b"")
    return digest.hexdigest()


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


class CacheWriter:
    """Streams samples and distributions into a new cache from one process. A context manager; or call ``finish``.

    ``directory`` appears with ``finish``; an exception inside the ``with`` block deletes all written files.
    """

    def __init__(self, directory: str | Path, header: CacheHeader, *, shard_bytes: int = _SHARD_BYTES):
        self.header, self._shard_bytes = header, shard_bytes
        self._stack = contextlib.ExitStack()
        self._path = self._stack.enter_context(atomic_directory(directory))
        self._files = {name: self._stack.enter_context((self._path / name).open("wb")) for name in (_SAMPLES, _INDEX)}
        self._pending: list[dict[str, torch.Tensor]] = []
        self._pending_bytes = self._pending_rows = 0
        self._shards: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self._tokens, self._captured_mass = 0, 0.0
        self._finished = False

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._stack.__exit__(*error)
        elif not self._finished:
            self.finish()

    def add(self, sample: Sample, distribution: CachedDistribution) -> None:
        """Append one sample; its distribution has one row per response token and is copied to the CPU."""
        if sample.id in self._ids:
            raise UserError(f"sample {sample.id} is already in the cache: ids must be unique")
        tensors = {name: _dense_copy(value) for name, value in distribution.tensors().items()}
        self._check(sample, tensors)
        row = {
            "id": sample.id, "tokens": token_digest(sample), "shard": len(self._shards), "start": self._pending_rows,
            "rows": sample.response_length, "content": _content_digest(tensors),
        }  # fmt: skip
        self._write(_SAMPLES, sample_to_json(sample))
        self._write(_INDEX, json.dumps(row))
        self._ids.add(sample.id)
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
            dtypes = {"ids": (torch.int32,), "hidden": (torch.float32, torch.bfloat16, torch.float16)}
            if value.dtype not in dtypes.get(name, (torch.float32,)):
                raise UserError(f"sample {sample.id}: {name} cannot be stored as {value.dtype}")
            if name != "ids" and bool(torch.isnan(value).any()):
                raise UserError(f"sample {sample.id}: the teacher's {name} contain NaN: check the teacher's weights")
        ids = tensors.get("ids")
        if ids is not None and ids.numel():
            ordered = ids.sort(dim=1).values
            if int(ordered[:, 0].min()) < 0 or int(ordered[:, -1].max()) >= self.header.vocab_size:
                raise UserError(
                    f"sample {sample.id}: top-k ids outside the vocabulary of {self.header.vocab_size} tokens"
                )
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise UserError(f"sample {sample.id}: the top-k ids of one position contain a token twice")

    def _write(self, name: str, line: str) -> None:
        self._files[name].write(line.encode("utf-8") + b"\n")

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._path / _shard_name(len(self._shards))
        shard = {
            name: torch.cat([tensors[name] for tensors in self._pending])
            for name in _TENSORS[self.header.representation]
        }
        save_file(shard, path)
        self._shards.append({"sha256": file_digest(path), "bytes": path.stat().st_size, "rows": self._pending_rows})
        self._pending, self._pending_bytes, self._pending_rows = [], 0, 0

    def finish(self) -> None:
        """Write the pending rows and the header, and rename the directory to its final name."""
        try:
            self._flush()
            for file in self._files.values():
                file.close()
            body = {
                "header": self.header.model_dump(),
                "samples": len(self._ids),
                "tokens": self._tokens,
                "shards": self._shards,
                "files": {name: file_digest(self._path / name) for name in self._files},
            }
            if self.header.representation == "top_k":
                body["captured_mass"] = self._captured_mass / max(1, self._tokens)
            document = {"format": FORMAT, "version": VERSION, "body": body, "body_digest": json_digest(body)}
            atomic_write_json(self._path / _HEADER, document)
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        self._stack.close()
        self._finished = True


class TeacherCache:
    """A finished cache. ``samples``: all samples in the order of writing; distributions are read on demand."""

    def __init__(self, directory: Path, body: dict[str, Any]):
        self.directory, self._body = directory, body
        self.header = parse(CacheHeader, body["header"], str(directory / _HEADER))
        self.samples = read_samples(directory / _SAMPLES)
        self._index = {row["id"]: row for row in map(json.loads, (directory / _INDEX).read_text().splitlines())}
        self._shards: dict[int, Any] = {}

    @classmethod
    def open(cls, directory: str | Path, *, expect: CacheHeader | None = None) -> TeacherCache:
        """Open a cache and check header, samples and file sizes; distributions are checked when they are read.

        expect: the header that the reader's configuration needs; a ``UserError`` names the first field that differs.
        """
        directory = Path(directory)
        body = _read_header(directory)
        for name, digest in body["files"].items():
            if name not in (_SAMPLES, _INDEX) or file_digest(directory / name) != digest:
                raise UserError(f"{directory / name}: content does not match its digest; rebuild the cache")
        for number, shard in enumerate(body["shards"]):
            path = directory / _shard_name(number)
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise UserError(f"{path}: missing or truncated ({shard['bytes']} bytes expected); rebuild the cache")
        cache = cls(directory, body)
        if expect is not None:
            cache._compare(expect)
        for sample in cache.samples:
            if cache._row(sample.id)["tokens"] != token_digest(sample):
                raise UserError(f"{directory}: tokens of sample {sample.id} do not match the index; rebuild the cache")
        return cache

    def _compare(self, expect: CacheHeader) -> None:
        for name in CacheHeader.model_fields:
            stored, expected = getattr(self.header, name), getattr(expect, name)
            if stored != expected:
                description = CacheHeader.model_fields[name].description
                raise UserError(
                    f"{self.directory}: {name} is {stored!r}, this run expects {expected!r} ({description}): "
                    "use another cache or rebuild this one"
                )

    def _row(self, sample_id: str) -> dict[str, Any]:
        row = self._index.get(sample_id)
        if row is None:
            raise UserError(f"{self.directory}: no sample {sample_id!r} in this cache")
        return row

    def distribution(self, sample: str | Sample) -> CachedDistribution:
        """Return the distribution of a sample, by id or by record; the tokens of a record must match the cache."""
        row = self._row(sample if isinstance(sample, str) else sample.id)
        if isinstance(sample, Sample) and token_digest(sample) != row["tokens"]:
            raise UserError(
                f"sample {sample.id} differs from the cached tokens: the cache belongs to another tokenizer, "
                "template or sampling run"
            )
        rows, shapes = slice(row["start"], row["start"] + row["rows"]), self.header.shapes(row["rows"])
        try:
            file = self._open_shard(row["shard"])
            tensors = {name: file.get_slice(name)[rows] for name in shapes}
        except (SafetensorError, OSError, KeyError) as error:
            path = self._shard_path(row["shard"])
            raise UserError(f"{path}: cannot be read ({error}); rebuild the cache") from error
        if _content_digest(tensors) != row["content"]:
            raise UserError(
                f"{self._shard_path(row['shard'])}: rows of sample {row['id']} are damaged; rebuild the cache"
            )
        return CachedDistribution(**tensors)

    def _shard_path(self, number: int) -> Path:
        return self.directory / _shard_name(number)

    def _open_shard(self, number: int) -> Any:
        if number not in self._shards:
            self._shards[number] = safe_open(self._shard_path(number), "pt")
        return self._shards[number]


def _read_header(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such teacher cache; run the teacher_cache stage first")
    if not (directory / _HEADER).is_file():
        raise UserError(f"{directory}: not a finished teacher cache (no {_HEADER})")
    document = read_json(directory / _HEADER)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{directory / _HEADER}: not the header of a teacher cache")
    if document.get("version") != VERSION:
        raise UserError(
            f"{directory / _HEADER}: cache version {document.get('version')}, this version reads {VERSION}: "
            "rebuild the cache, or use the version that wrote it"
        )
    body = document.get("body")
    if not isinstance(body, dict) or json_digest(body) != document.get("body_digest"):
        raise UserError(f"{directory / _HEADER}: damaged, content does not match its digest; rebuild the cache")
    return body


def cache_info(directory: str | Path) -> dict[str, Any]:
    """Return header fields, counts of samples, tokens and shards, and bytes in total and per token, from the header."""
    body = _read_header(Path(directory))
    size = sum(shard["bytes"] for shard in body["shards"])
    counts = {"samples": body["samples"], "tokens": body["tokens"], "shards": len(body["shards"]), "bytes": size}
    extra = {"captured_mass": body["captured_mass"]} if "captured_mass" in body else {}
    return body["header"] | counts | {"bytes_per_token": size / max(1, body["tokens"])} | extra


def verify_cache(directory: str | Path) -> dict[str, Any]:
    """Check every byte against its digest and return ``cache_info``; a ``UserError`` names the first damaged file."""
    directory = Path(directory)
    cache = TeacherCache.open(directory)
    for number, shard in enumerate(_read_header(directory)["shards"]):
        path = directory / _shard_name(number)
        if file_digest(path) != shard["sha256"]:
            raise UserError(f"{path}: content does not match its digest; rebuild the cache")
    for sample in cache.samples:
        cache.distribution(sample)
    return cache_info(directory)
