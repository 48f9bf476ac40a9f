"""The teacher cache: responses with the teacher's distribution at every response token, on disk.

A directory is a cache or a part of one: ``header.json`` (what is stored and the digests of the other files; written
last), ``samples.jsonl`` (the responses), ``index.bin`` and ``ids.bin`` (where each sample's line and rows are, and how
to find it by id: ``cache_index.py``) and safetensors shards. A cache of several parts has a header that names them, in
the order of their samples, and each data-parallel rank has written one. Rows are per response token in order, so they
do not depend on the reader's layout, packing or order of samples. Every row has a digest of the tokens up to its own
(``row_digests.py``, 4 bytes), which is compared with the sample's whenever rows are written and read.

Nothing of a cache is read into memory as a whole: the index is mapped, and lines and rows are read one sample at a
time, with their checksums. ``open`` compares headers and sizes; ``verify_cache`` reads every byte.

Representations (methods.md M2): ``sampled_token`` log-probability of the sampled token; ``top_k`` k ids and
log-probabilities with the log of the remaining mass; ``hidden_states`` final hidden states, after the last norm, for
the teacher's own output layer; ``full_vocab`` all log-probabilities.

``cache_writer.py`` writes caches; ``data/packing.py`` and ``teachers/cached.py`` turn rows into batches.

Shapes: r response tokens of a sample, k top-k entries, v vocabulary, h hidden size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from megatron_s2d.artifacts.files import file_digest, json_digest, read_json
from megatron_s2d.config.base import Config, parse
from megatron_s2d.data.cache_index import ID_BYTES, IDS_NAME, INDEX_NAME, ROW_BYTES, CacheIndex, remote_sample
from megatron_s2d.data.row_digests import row_digests
from megatron_s2d.errors import UserError
from megatron_s2d.records import AnySample, RemoteSample, Sample, sample_from_json

FORMAT = "megatron_s2d teacher cache"
VERSION = 5  # 4 had an index in JSON, which was read as a whole
HEADER_NAME, SAMPLES_NAME = "header.json", "samples.jsonl"
_OPEN_SHARDS = 32  # of a part
TENSORS = {
    "sampled_token": ("log_probs", "token_digests"),
    "top_k": ("ids", "log_probs", "log_tail_mass", "token_digests"),
    "hidden_states": ("hidden", "token_digests"),
    "full_vocab": ("log_probs", "token_digests"),
}
DTYPES = {
    "ids": (torch.int32,),
    "token_digests": (torch.int32,),
    "hidden": (torch.float32, torch.bfloat16, torch.float16),
}  # others: float32


class CacheHeader(Config):
    """The origin of the distributions. Opening a cache with another expected header raises ``UserError``."""

    representation: Literal["sampled_token", "top_k", "hidden_states", "full_vocab"] = Field(
        description="what is stored per response token"
    )
    teacher_digest: str = Field(description="digest of the teacher's weights")
    tokenizer_fingerprint: str = Field(description="digest of the tokenizer")
    template_fingerprint: str = Field(description="digest of the chat template that rendered the prompts")
    view_fingerprint: str | None = Field(
        None, description="digest of the view in which the teacher read the prompts; null: as the student does"
    )
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
        by_row = ("log_tail_mass", "token_digests")
        return {name: (rows,) if name in by_row else shape for name in TENSORS[self.representation]}


@dataclasses.dataclass(frozen=True, eq=False)
class CachedDistribution:
    """The teacher at the response tokens of one sample; only the fields of the cache's representation are set."""

    token_digests: torch.Tensor  # [r] int32, of the tokens up to each row's own: see ``row_digests.py``
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


def check_rows(sample: Sample, token_digests: torch.Tensor, where: str) -> None:
    """Raise ``UserError`` if rows with ``token_digests`` [r] are not those of the sample's response tokens."""
    expected = row_digests(sample)
    found = token_digests.numpy()
    num_wrong = int((found != expected).sum()) if found.shape == expected.shape else len(expected)
    if num_wrong:
        raise UserError(
            f"{where}: {num_wrong} of {len(expected)} rows of sample {sample.id} belong to other tokens (shifted by a "
            "row, or of another sample); rebuild the cache"
        )


def content_digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.view(torch.uint8).numpy()).cast("B") if tensor.numel() else b"")
    return digest.hexdigest()


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


class CachePart:
    """One directory of samples and distributions, which are read on demand."""

    def __init__(self, directory: Path, body: dict[str, Any]):
        """Raises ``UserError`` if a file is missing or has another size than when it was written."""
        self.directory, self._body = directory, body
        sizes = {name: file["bytes"] for name, file in body["files"].items()}
        sizes |= {shard_name(number): shard["bytes"] for number, shard in enumerate(body["shards"])}
        expected = {INDEX_NAME: ROW_BYTES * body["samples"], IDS_NAME: ID_BYTES * body["samples"]}
        if any(sizes[name] != size for name, size in expected.items()):
            raise UserError(f"{directory / HEADER_NAME}: the index has another number of samples; rebuild the cache")
        for name, size in sizes.items():
            _check_size(directory / name, size)
        self.index = CacheIndex(directory, body["samples"])
        self._lines = os.open(directory / SAMPLES_NAME, os.O_RDONLY)
        self._shards: dict[int, Any] = {}

    def __del__(self) -> None:
        if hasattr(self, "_lines"):
            os.close(self._lines)

    def sample(self, row: np.void) -> Sample:
        """Return the sample of a row of the index; ``UserError`` if its line is damaged."""
        line = os.pread(self._lines, int(row["bytes"]), int(row["offset"]))
        if zlib.crc32(line) != row["line"]:
            raise UserError(f"{self.directory / SAMPLES_NAME}: a line is damaged; rebuild the cache")
        return sample_from_json(line.decode())

    def remote(self, row: np.void, temperature: float | None, dp_rank: int) -> RemoteSample:
        """Return what ranks other than ``dp_rank`` know of a sample; its tokens are not read."""
        names = os.pread(self._lines, int(row["name_bytes"]), int(row["offset"]))
        if zlib.crc32(names) != row["names"]:
            raise UserError(f"{self.directory / SAMPLES_NAME}: a line is damaged; rebuild the cache")
        return remote_sample(row, json.loads(names + b"}"), temperature, dp_rank)

    def distribution(self, sample: Sample, row: np.void, header: CacheHeader) -> CachedDistribution:
        """Return the rows of ``sample``; see ``TeacherCache.distribution``."""
        if bytes.fromhex(token_digest(sample)) != row["tokens"].tobytes():
            raise UserError(
                f"sample {sample.id} differs from the cached tokens: the cache belongs to another tokenizer, "
                "template or sampling run"
            )
        start, count, shard = int(row["start"]), int(row["rows"]), int(row["shard"])
        path = self.directory / shard_name(shard)
        _check_size(path, self._body["shards"][shard]["bytes"])  # reading beyond the end of a mapped file kills
        try:
            file = self._open_shard(shard)
            tensors = {name: file.get_slice(name)[start : start + count] for name in header.shapes(count)}
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path}: cannot be read ({error}); rebuild the cache") from error
        if bytes.fromhex(content_digest(tensors)) != row["content"].tobytes():
            raise UserError(f"{path}: rows of sample {sample.id} are damaged; rebuild the cache")
        check_rows(sample, tensors["token_digests"], str(path))
        return CachedDistribution(**tensors)

    def verify(self, header: CacheHeader) -> None:
        """Compare every byte with its digest."""
        for name, file in self._body["files"].items():
            _check_digest(self.directory / name, file["sha256"])
        for number, shard in enumerate(self._body["shards"]):
            _check_digest(self.directory / shard_name(number), shard["sha256"])
        for number in range(len(self.index)):
            row = self.index.row(number)
            self.distribution(self.sample(row), row, header)

    def _open_shard(self, number: int) -> Any:
        if number not in self._shards:
            while len(self._shards) >= _OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards)))
            self._shards[number] = safe_open(self.directory / shard_name(number), "pt")
        return self._shards[number]


class TeacherCache:
    """A finished cache: samples in the order of writing, with their distributions, read on demand."""

    def __init__(self, directory: Path, body: dict[str, Any]):
        self.directory, self._body = directory, body
        self.header = parse(CacheHeader, body["header"], str(directory / HEADER_NAME))
        self.longest_response: int = body["longest_response"]  # tokens
        counts = [part["samples"] for part in body["parts"]] if "parts" in body else [body["samples"]]
        self._starts = np.cumsum([0, *counts])
        self._parts: dict[int, CachePart] = {}

    @classmethod
    def open(cls, directory: str | Path, *, expect: CacheHeader | None = None) -> TeacherCache:
        """Open a cache and check its header; sizes of files and contents are checked when they are first read.

        expect: the header that the reader's configuration needs; a ``UserError`` names the first field that differs.
        """
        directory = Path(directory)
        cache = cls(directory, read_header(directory))
        if expect is not None:
            cache._compare(expect)
        if "parts" not in cache._body:
            cache.part(0)
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

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def num_parts(self) -> int:
        """Number of directories with samples."""
        return len(self._starts) - 1

    def part(self, number: int) -> CachePart:
        """Return a part, which is opened when it is first used."""
        if number not in self._parts:
            self._parts[number] = self._open_part(number)
        return self._parts[number]

    def _open_part(self, number: int) -> CachePart:
        if "parts" not in self._body:
            return CachePart(self.directory, self._body)
        entry = self._body["parts"][number]
        directory = self.directory / entry["name"]
        body = read_header(directory)
        if json_digest(body) != entry["digest"]:
            raise UserError(f"{directory / HEADER_NAME}: not the part that was written; rebuild the cache")
        return CachePart(directory, body)

    @property
    def samples(self) -> CachedSamples:
        """All samples, in the order of writing."""
        return CachedSamples(self)

    def stored(self, *, temperature: float) -> CachedSamples:
        """Return the samples at another ``temperature``, as ``StoredSamples``."""
        return CachedSamples(self, temperature)

    def locate(self, index: int) -> tuple[CachePart, np.void]:
        """Return the part of sample ``index`` and its row there."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        part = self.part(number)
        return part, part.index.row(index - int(self._starts[number]))

    def distribution(self, sample: str | Sample) -> CachedDistribution:
        """Return the distribution of a sample, by id or by record; the tokens of a record must match the cache.

        Raises ``UserError`` for rows that are damaged or belong to other tokens than the sample's.
        """
        sample_id = sample if isinstance(sample, str) else sample.id
        for part in map(self.part, range(self.num_parts)):
            for number in part.index.find(sample_id):
                row = part.index.row(number)
                stored = part.sample(row)
                if stored.id == sample_id:
                    return part.distribution(stored if isinstance(sample, str) else sample, row, self.header)
        raise UserError(f"{self.directory}: no sample {sample_id!r} in this cache")


@dataclasses.dataclass(frozen=True, eq=False)
class CachedSamples(Sequence[Sample]):
    """The samples of a cache, read when they are asked for. temperature: that they get; None leaves theirs."""

    cache: TeacherCache
    temperature: float | None = None

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        part, row = self.cache.locate(range(len(self))[index])
        sample = part.sample(row)
        return sample if self.temperature is None else dataclasses.replace(sample, temperature=self.temperature)

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """See ``StoredSamples``."""
        return np.array([self.cache.locate(index)[1]["length"] for index in indices], dtype=np.int64)

    def read(self, indices: Sequence[int], ranks: Sequence[int], dp_rank: int) -> list[AnySample]:
        """See ``StoredSamples``."""
        samples: list[AnySample] = []
        for index, rank in zip(indices, ranks, strict=True):
            if rank == dp_rank:
                samples.append(self[index])
            else:
                part, row = self.cache.locate(index)
                samples.append(part.remote(row, self.temperature, rank))
        return samples


def _check_size(path: Path, size: int) -> None:
    if not path.is_file() or path.stat().st_size != size:
        raise UserError(f"{path}: missing or truncated ({size} bytes expected); rebuild the cache")


def _check_digest(path: Path, digest: str) -> None:
    if file_digest(path) != digest:
        raise UserError(f"{path}: content does not match its digest; rebuild the cache")


def read_header(directory: Path) -> dict[str, Any]:
    """Return the body of the header of a cache or a part; ``UserError`` if it is missing, damaged or too old."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such teacher cache; run the teacher_cache stage first")
    if not (directory / HEADER_NAME).is_file():
        raise UserError(f"{directory}: not a finished teacher cache (no {HEADER_NAME})")
    document = read_json(directory / HEADER_NAME)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{directory / HEADER_NAME}: not the header of a teacher cache")
    if document.get("version") != VERSION:
        raise UserError(
            f"{directory / HEADER_NAME}: cache version {document.get('version')}, this version reads {VERSION}: "
            "rebuild the cache, or use the version that wrote it"
        )
    body = document.get("body")
    if not isinstance(body, dict) or json_digest(body) != document.get("body_digest"):
        raise UserError(f"{directory / HEADER_NAME}: damaged, content does not match its digest; rebuild the cache")
    return body


def cache_info(directory: str | Path) -> dict[str, Any]:
    """Return header fields, counts of samples, tokens and shards, and bytes in total and per token, from the header."""
    body = read_header(Path(directory))
    size, num_shards = body["shard_bytes"], body["num_shards"]
    counts = {"samples": body["samples"], "tokens": body["tokens"], "shards": num_shards, "bytes": size}
    extra = {"captured_mass": body["captured_mass"]} if "captured_mass" in body else {}
    return body["header"] | counts | {"bytes_per_token": size / max(1, body["tokens"])} | extra


def verify_cache(directory: str | Path) -> dict[str, Any]:
    """Check every byte against its digest and return ``cache_info``; a ``UserError`` names the first damaged file."""
    cache = TeacherCache.open(directory)
    for number in range(cache.num_parts):
        cache.part(number).verify(cache.header)
    return cache_info(directory)
