"""Messages between trainer and teacher server: tensors as they are in memory behind a small JSON header. No torch here.

A message is the magic, the length of the header (uint32, little-endian), the header, and the tensors one after the
other. The header names their dtypes and shapes; nothing else in a message is interpreted, and a message whose length
differs from what its header says is refused. numpy has no bfloat16: such a tensor is an array of its bits, uint16.

Shapes: n tokens of all sequences, b sequences, r response tokens of all sequences, k top-k entries, h hidden size.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

_MAGIC = b"S2DT1\n"
_LARGEST_HEADER = 2**24
_DTYPES = {"int32": np.int32, "uint8": np.uint8, "float32": np.float32, "bfloat16": np.uint16}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}

Payload = Literal["sampled", "top_k", "hidden"]
Source = Literal["student", "teacher", "union"]


class WireError(ValueError):
    """A message that breaks the protocol, or a reply that does not fit its request."""


def encode(meta: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the message of ``meta`` (JSON values) and ``tensors``."""
    listed = [[name, _NAMES[array.dtype], list(array.shape)] for name, array in tensors.items()]
    header = json.dumps({"meta": dict(meta), "tensors": listed}).encode()
    parts = [_MAGIC, len(header).to_bytes(4, "little"), header]
    return b"".join([*parts, *(np.ascontiguousarray(array).tobytes() for array in tensors.values())])


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Invert ``encode``; raise ``WireError`` for anything that is not such a message. The arrays are read-only."""
    start = len(_MAGIC) + 4
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        raise WireError("it is no message of a teacher service")
    size = int.from_bytes(data[len(_MAGIC) : start], "little")
    if size > _LARGEST_HEADER:
        raise WireError(f"its header claims {size} bytes")
    try:
        header = json.loads(data[start : start + size])
        meta, listed = header["meta"], [(str(n), str(d), [int(x) for x in s]) for n, d, s in header["tensors"]]
        dtypes = {name: np.dtype(_DTYPES[dtype]) for name, dtype, _ in listed}
        if not isinstance(meta, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise WireError("its header cannot be read") from None
    position, tensors = start + size, {}
    for name, _, shape in listed:
        if min(shape, default=0) < 0:
            raise WireError("its header has a negative size")
        count = math.prod(shape)
        if position + count * dtypes[name].itemsize > len(data):
            raise WireError(f"it ends within '{name}' {shape}")
        tensors[name] = np.frombuffer(data, dtypes[name], count, position).reshape(shape)
        position += count * dtypes[name].itemsize
    if position != len(data):
        raise WireError(f"it has {len(data) - position} bytes more than its header says")
    return meta, tensors


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Sequences of a teacher's tokens, and what to return at their response tokens.

    A request is a batch of its own on the server, so a reply does not depend on what else is asked for.
    """

    payload: Payload
    token_ids: np.ndarray  # [n] int32, one sequence behind the other
    lengths: np.ndarray  # [b] int32
    response_mask: np.ndarray  # [n] uint8, 1 at response tokens; never at the first token of a sequence
    temperatures: np.ndarray  # [b] float32, of log-probabilities; 0 counts as 1
    k: int = 0  # top_k: entries of teacher or student; a union has up to twice as many
    source: Source = "teacher"  # top_k: whose most likely tokens
    student_ids: np.ndarray | None = None  # [r, k] int32, for source student or union

    @property
    def num_rows(self) -> int:
        """Number of response tokens."""
        return int(self.response_mask.sum())

    def encode(self) -> bytes:
        """Return the message."""
        tensors = {
            "token_ids": self.token_ids,
            "lengths": self.lengths,
            "response_mask": self.response_mask,
            "temperatures": self.temperatures,
        }
        if self.student_ids is not None:
            tensors["student_ids"] = self.student_ids
        return encode({"payload": self.payload, "k": self.k, "source": self.source}, tensors)

    @classmethod
    def decode(cls, data: bytes, *, vocab_size: int, max_positions: int, max_tokens: int) -> ScoreRequest:
        """Return the request of a message; raise ``WireError`` for one that this teacher cannot answer."""
        meta, tensors = decode(data)
        wanted = {"token_ids": np.int32, "lengths": np.int32, "response_mask": np.uint8, "temperatures": np.float32}
        for name, dtype in wanted.items():
            if name not in tensors or tensors[name].dtype != dtype or tensors[name].ndim != 1:
                raise WireError(f"'{name}' is missing or has another type")
        request = cls(
            meta.get("payload"), *(tensors[name] for name in wanted), int(meta.get("k", 0)),
            meta.get("source"), tensors.get("student_ids"),
        )  # fmt: skip
        request._check(vocab_size, max_positions, max_tokens)
        return request

    def _check(self, vocab_size: int, max_positions: int, max_tokens: int) -> None:
        lengths, ids, mask = self.lengths, self.token_ids, self.response_mask
        if self.payload not in ("sampled", "top_k", "hidden") or self.source not in ("student", "teacher", "union"):
            raise WireError(f"unknown payload {self.payload!r} or source {self.source!r}")
        if not len(lengths) or lengths.min() < 1 or len(ids) != lengths.sum() or len(mask) != len(ids):
            raise WireError(f"{len(ids)} tokens and {len(mask)} marks for sequences of {int(lengths.sum())} tokens")
        if len(self.temperatures) != len(lengths) or not np.isfinite(self.temperatures).all():
            raise WireError("there is not one temperature for each sequence")
        if len(ids) > max_tokens:
            raise WireError(f"{len(ids)} tokens are more than max_request_tokens {max_tokens}")
        if lengths.max() > max_positions:
            raise WireError(f"a sequence of {lengths.max()} tokens is longer than the teacher's {max_positions}")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise WireError(f"token ids from {ids.min()} to {ids.max()} are outside the vocabulary of {vocab_size}")
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        if mask.max() > 1 or mask[starts].any():
            raise WireError("the marks of response tokens are not 0 and 1, or mark a first token")
        needs_ids = self.payload == "top_k" and self.source != "teacher"
        if (self.student_ids is not None) != needs_ids:
            raise WireError("student_ids goes with top_k of the student or the union, and only with these")
        if self.payload == "top_k" and not 1 <= self.k <= vocab_size:
            raise WireError(f"k is {self.k}: choose between 1 and {vocab_size}")
        if needs_ids:
            wanted = self.student_ids
            if wanted.dtype != np.int32 or wanted.shape != (self.num_rows, self.k):
                raise WireError(f"student_ids has shape {wanted.shape}, not {(self.num_rows, self.k)}")
            if wanted.size and (wanted.min() < 0 or wanted.max() >= vocab_size):
                raise WireError("student_ids are outside the vocabulary")

    def reply_shapes(self, vocab_size: int, hidden_size: int, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return name -> (dtype, shape) of the tensors of a good reply. dtype: of the teacher's hidden states."""
        rows = self.num_rows
        if self.payload == "sampled":
            return {"log_probs": ("float32", (rows,))}
        if self.payload == "hidden":
            return {"hidden": (dtype, (rows, hidden_size))}
        width = min(2 * self.k, vocab_size) if self.source == "union" else self.k
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "ids": ("int32", (rows, width)),
            "log_probs": ("float32", (rows, width)),
            "log_tail_mass": ("float32", (rows,)),
        }
        return shapes | ({"num_shared": ("int32", (rows,))} if self.source != "teacher" else {})

    def reply_bytes(self, vocab_size: int, hidden_size: int, dtype: str) -> int:
        """Return the bytes of the tensors of a reply."""
        shapes = self.reply_shapes(vocab_size, hidden_size, dtype)
        return sum(math.prod(shape) * np.dtype(_DTYPES[name]).itemsize for name, shape in shapes.values())

    def check_reply(self, tensors: Mapping[str, np.ndarray], vocab_size: int, hidden_size: int, dtype: str) -> None:
        """Raise ``WireError`` for a reply of other sizes, or with numbers that no model gives."""
        for name, (kind, shape) in self.reply_shapes(vocab_size, hidden_size, dtype).items():
            found = tensors.get(name)
            if found is None or found.dtype != _DTYPES[kind] or found.shape != shape:
                described = "nothing" if found is None else f"{_NAMES[found.dtype]} {list(found.shape)}"
                raise WireError(f"'{name}' should be {kind} {list(shape)}, and is {described}")
        if "hidden" in tensors:
            if not _is_finite(tensors["hidden"]):
                raise WireError("hidden states are not finite")
            return
        # A token that the teacher finds impossible has -inf; 1e-4 is rounding.
        if np.isnan(tensors["log_probs"]).any() or (tensors["log_probs"] > 1e-4).any():
            raise WireError("log-probabilities are NaN or above 0")
        if "ids" in tensors and tensors["ids"].size:
            ids, tail = tensors["ids"], tensors["log_tail_mass"]
            if ids.min() < 0 or ids.max() >= vocab_size or np.isnan(tail).any():
                raise WireError("ids are outside the vocabulary, or the mass of the tail is NaN")


def _is_finite(values: np.ndarray) -> bool:
    """Return whether float32 numbers, or bfloat16 ones by their bits, are finite."""
    if values.dtype == np.uint16:
        return not ((values & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(values).all())


def bytes_per_token(hidden_size: int, dtype: str, k: int) -> dict[str, int]:
    """Return payload -> bytes of one response token in a reply, and of the request's ids where they are sent."""
    value = np.dtype(_DTYPES[dtype]).itemsize
    return {"sampled": 4, "top_k of the teacher": 8 * k + 4, "top_k of the student": 12 * k + 8,
            "hidden": hidden_size * value}  # fmt: skip
