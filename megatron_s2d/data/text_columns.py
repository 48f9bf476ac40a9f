"""Columns of text without an object for each: digests, checks and lists of ids of millions of texts. No torch here.

n: texts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow

_STEP = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64, as the factors in mix64
_WORD = 8  # bytes that are digested together
_WORDS_AT_ONCE = 1 << 18
_FIRST_PRINTABLE, _LAST_PRINTABLE = 0x21, 0x7E


def mix64(values: np.ndarray) -> np.ndarray:
    """Return SplitMix64's finalizer of ``values`` (uint64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def sequence_digests(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return a digest of each of the sequences that ``values`` (unsigned, 64 bits as a rule) has one after the other.

    lengths: [n]. uint64 [n]: two of ten million differing sequences share one with probability 3e-6. Not for security.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    positions = np.arange(len(values), dtype=np.int64) - np.repeat(ends - lengths, lengths)
    mixed = mix64(values.astype(np.uint64) ^ mix64((positions.astype(np.uint64) + np.uint64(1)) * _STEP))
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(mixed, out=sums[1:])
    return mix64((sums[ends] - sums[ends - lengths]) ^ mix64(lengths.astype(np.uint64)))


def text_digests(texts: pyarrow.StringArray) -> np.ndarray:
    """Return a digest of each text's UTF-8, uint64 [n]; see ``sequence_digests``. Null counts as empty."""
    content, bounds = content_of(texts)
    content = np.concatenate([content, np.zeros(_WORD, np.uint8)])
    # The eight bytes from each byte on, as one number.
    words = np.ndarray((len(content) - _WORD + 1,), "<u8", content, strides=(1,))
    lengths = np.diff(bounds)
    counts = -(-lengths // _WORD)
    cuts = np.searchsorted(np.cumsum(counts), np.arange(_WORDS_AT_ONCE, counts.sum(), _WORDS_AT_ONCE))
    parts = [
        _digests(words, part_starts, part_lengths, part_counts)
        for part_starts, part_lengths, part_counts in zip(
            np.split(bounds[:-1], cuts), np.split(lengths, cuts), np.split(counts, cuts), strict=True
        )
    ]
    return np.concatenate(parts)


def _digests(words: np.ndarray, starts: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    positions = np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    values = words[np.repeat(starts, counts) + _WORD * positions]
    last = np.cumsum(counts)[counts > 0] - 1
    spare = (-lengths[counts > 0] % _WORD).astype(np.uint64) * np.uint64(8)  # bits behind the end of a text
    values[last] &= np.uint64(2**64 - 1) >> spare
    return mix64(sequence_digests(values, counts) ^ (lengths.astype(np.uint64) * _STEP))


def content_of(texts: pyarrow.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the UTF-8 of all texts, uint8, and where each begins and the last one ends, int64 [n + 1]."""
    if not len(texts):
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, content = texts.buffers()
    bounds = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    data = np.frombuffer(content, np.uint8) if content is not None else np.zeros(0, np.uint8)
    return data[bounds[0] : bounds[-1]], bounds - bounds[0]


def byte_lengths(texts: pyarrow.StringArray) -> np.ndarray:
    """Return the bytes of each text, int64 [n]; 0 for null."""
    return np.diff(content_of(texts)[1])


def some_blank(texts: pyarrow.StringArray) -> bool:
    """Return whether a text has no other characters than blanks, as Python defines them."""
    content, bounds = content_of(texts)
    starts, lengths = bounds[:-1], np.diff(bounds)
    if not lengths.all():
        return True
    first = content[starts]
    printable = (first >= _FIRST_PRINTABLE) & (first <= _LAST_PRINTABLE)
    return any(not texts[int(index)].as_py().strip() for index in np.flatnonzero(~printable))


def with_bytes(texts: pyarrow.StringArray, wanted: np.ndarray) -> np.ndarray:
    """Return the mask [n] of the texts that have one of some bytes. wanted: mask [256]."""
    content, bounds = content_of(texts)
    if wanted[ord(" ") : _LAST_PRINTABLE + 1].any():
        positions = np.flatnonzero(wanted[content])
    else:  # most bytes of a text are these, which comparisons leave out in a tenth of the time
        positions = np.flatnonzero((content < ord(" ")) | (content > _LAST_PRINTABLE))
        positions = positions[wanted[content[positions]]]
    return _marked(np.searchsorted(bounds, positions, side="right") - 1, len(texts))


def with_parts(texts: pyarrow.StringArray, parts: Collection[str]) -> np.ndarray:
    """Return the mask [n] of the texts that contain one of ``parts``, none of them empty."""
    content, bounds = content_of(texts)
    data = content.tobytes()
    found: list[int] = []
    for part in parts:
        encoded = part.encode()
        position = data.find(encoded)
        while position >= 0:
            found.append(position)
            position = data.find(encoded, position + 1)
    # One that begins in a text and ends in the next one marks too many, which is what a caller can live with.
    return _marked(np.searchsorted(bounds, np.array(found, np.int64), side="right") - 1, len(texts))


def _marked(indices: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    mask[indices] = True
    return mask


def joined(parts: Sequence[pyarrow.StringArray | str]) -> pyarrow.StringArray:
    """Return the texts [n] that the parts of each make one after the other; a part is a column or the same for all."""
    import pyarrow
    import pyarrow.compute

    values = [pyarrow.scalar(part) if isinstance(part, str) else part for part in parts]
    if len(values) == 1:
        return values[0]
    return pyarrow.compute.binary_join_element_wise(*values, "")


def list_array(values: np.ndarray, lengths: np.ndarray) -> pyarrow.ListArray:
    """Return lists of int32 [n], whose ``values`` follow one another; lengths: [n], -1 for null."""
    import pyarrow

    missing = lengths < 0
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(np.maximum(lengths, 0), out=offsets[1:])
    mask = pyarrow.array(missing) if missing.any() else None
    return pyarrow.ListArray.from_arrays(offsets, values.astype(np.int32, copy=False), mask=mask)


def list_content(lists: pyarrow.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of lists one after the other, int32, and their lengths, int64 [n]; -1 for null."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(lists).fill_null(-1).to_numpy().astype(np.int64)
    return lists.flatten().to_numpy(), lengths
