"""The index of a teacher cache: a row of numbers for every sample, in files that are mapped and not read into memory.

``index.bin`` has the rows in the order of the samples, ``ids.bin`` the digests of their ids in ascending order with the
number of the row. A rank reads the rows of the samples that a step names, so a cache may have more of them than fit
into memory. Every row has a checksum, which is compared when it is read.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_s2d.errors import UserError
from megatron_s2d.records import OPTIONAL_ARRAYS, RemoteSample, Sample

INDEX_NAME, IDS_NAME = "index.bin", "ids.bin"
_FINISH_REASONS = ("stop", "length", "abort", "data")
_LABEL_BYTES = 20  # of a verifier's label; longer ones are cut
_ROW = np.dtype(
    [
        ("position", "<u8"),  # in the list that the writer got the samples of
        ("offset", "<u8"),  # of the sample's line in samples.jsonl, in bytes
        ("bytes", "<u4"),  # of the line
        ("name_bytes", "<u4"),  # of the part of the line before the token ids
        ("shard", "<u4"),
        ("start", "<u4"),  # first row in the shard
        ("rows", "<u4"),  # response tokens
        ("length", "<u4"),  # tokens of prompt and response
        ("temperature", "<f8"),
        ("reward", "<f8"),  # NaN: not graded
        ("arrays", "<u2"),  # bits of OPTIONAL_ARRAYS
        ("finish_reason", "u1"),
        ("label", f"S{_LABEL_BYTES}"),
        ("tokens", "V32"),  # digest of tokens and response mask
        ("content", "V32"),  # digest of the distribution
        ("line", "<u4"),  # CRC-32 of the line
        ("names", "<u4"),  # CRC-32 of its part before the token ids
        ("checksum", "<u4"),  # CRC-32 of the row before this field
    ]
)
_ID = np.dtype([("key", "<u8"), ("row", "<u4")])
ROW_BYTES, ID_BYTES = _ROW.itemsize, _ID.itemsize


def index_row(
    sample: Sample, line: bytes, *, position: int, offset: int, shard: int, start: int, tokens: str, content: str
) -> np.void:
    """Return the row of ``sample``, whose ``line`` is at ``offset``. tokens, content: SHA-256 in hexadecimal."""
    row = np.zeros(1, dtype=_ROW)[0]
    row["position"], row["offset"], row["bytes"], row["line"] = position, offset, len(line), zlib.crc32(line)
    row["name_bytes"] = line.index(b', "token_ids"')  # a quote inside a text would have a backslash before it
    row["names"] = zlib.crc32(line[: row["name_bytes"]])
    row["shard"], row["start"], row["rows"], row["length"] = shard, start, sample.response_length, sample.length
    row["temperature"], row["reward"] = sample.temperature, np.nan if sample.reward is None else sample.reward
    row["arrays"] = sum(1 << bit for bit, name in enumerate(OPTIONAL_ARRAYS) if sample.has(name))
    row["finish_reason"] = _FINISH_REASONS.index(sample.finish_reason)
    row["label"] = (sample.verifier_label or "").encode()[:_LABEL_BYTES]
    row["tokens"], row["content"] = np.void(bytes.fromhex(tokens)), np.void(bytes.fromhex(content))
    return sealed(row)


def sealed(row: np.void) -> np.void:
    """Set the checksum of a row."""
    row["checksum"] = _checksum(row)
    return row


def ids_file(ids: Sequence[str]) -> bytes:
    """Return the content of ``ids.bin`` for samples with ``ids``."""
    entries = np.zeros(len(ids), dtype=_ID)
    entries["key"], entries["row"] = [_key(sample_id) for sample_id in ids], np.arange(len(ids))
    return np.sort(entries, order=("key", "row")).tobytes()


class CacheIndex:
    """The mapped index of one directory."""

    def __init__(self, directory: Path, size: int):
        """size: number of samples."""
        self.path, self._size = directory / INDEX_NAME, size
        self.rows = _mapped(self.path, _ROW, size)
        self._ids = _mapped(directory / IDS_NAME, _ID, size)

    def __len__(self) -> int:
        return self._size

    def row(self, number: int) -> np.void:
        """Return a row; ``UserError`` if it is damaged."""
        row = self.rows[number]
        if _checksum(row) != row["checksum"]:
            raise UserError(f"{self.path}: row {number} is damaged; rebuild the cache")
        return row

    def find(self, sample_id: str) -> list[int]:
        """Return the rows of the samples whose id has the digest of ``sample_id``: rarely more than one."""
        key = _key(sample_id)
        first = int(np.searchsorted(self._ids["key"], np.uint64(key)))
        last = first
        while last < self._size and self._ids["key"][last] == key:
            last += 1
        return [row for row in self._ids["row"][first:last].tolist() if row < self._size]


def remote_sample(row: np.void, names: dict[str, Any], temperature: float | None, dp_rank: int) -> RemoteSample:
    """Return what a rank knows of a cached sample that ``dp_rank`` reads. names: its ids and domain."""
    graded = not np.isnan(row["reward"])
    bits = int(row["arrays"])
    return RemoteSample(
        id=names["id"],
        prompt_id=names["prompt_id"],
        group_id=names["group_id"],
        domain=names["domain"],
        length=int(row["length"]),
        response_length=int(row["rows"]),
        temperature=float(row["temperature"]) if temperature is None else temperature,
        finish_reason=_FINISH_REASONS[row["finish_reason"]],
        dp_rank=dp_rank,
        reward=float(row["reward"]) if graded else None,
        verifier_label=row["label"].decode(errors="ignore") if graded else None,
        arrays=frozenset(name for bit, name in enumerate(OPTIONAL_ARRAYS) if bits >> bit & 1),
    )


def _checksum(row: np.void) -> int:
    return zlib.crc32(row.tobytes()[: -_ROW["checksum"].itemsize])


def _key(sample_id: str) -> int:
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "little")


def _mapped(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r", shape=(size,)) if size else np.zeros(0, dtype=dtype)
