"""Samples as one array of bytes, so that they travel between ranks as a tensor: a header, then their arrays.

    8 bytes    length of the header
    header     JSON: for every record its numbers and texts, and (name, dtype, shape) of each array
    arrays     one after the other, each aligned to 8 bytes

Nothing is pickled, and every array of a ``Sample`` travels, also one that was added later. Token ids travel as int32.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.arithmetic import round_up
from megatron_s2d.records import Sample, WeightVersionSpan

_ALIGNMENT = 8
_INT32 = np.iinfo(np.int32)


def encode_samples(samples: Sequence[Sample], extra: Sequence[Mapping[str, np.ndarray]] | None = None) -> np.ndarray:
    """Return uint8 [n] of ``samples``. extra: further arrays of each sample, which travel with it."""
    records = []
    for index, sample in enumerate(samples):
        fields = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
        arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
        spans = [dataclasses.astuple(span) for span in sample.weight_versions]
        scalars = {name: value for name, value in fields.items() if name not in arrays} | {"weight_versions": spans}
        further = {} if extra is None else {f"+{name}": value for name, value in extra[index].items()}
        records.append((scalars, arrays | further))
    return _encode(records)


def decode_samples(data: np.ndarray) -> tuple[list[Sample], list[dict[str, np.ndarray]]]:
    """Invert ``encode_samples``: (samples, their further arrays)."""
    samples, extra = [], []
    for scalars, arrays in _decode(data):
        spans = tuple(WeightVersionSpan(*span) for span in scalars.pop("weight_versions"))
        if scalars.get("turn_rewards") is not None:
            scalars["turn_rewards"] = tuple(scalars["turn_rewards"])
        own = {name: value for name, value in arrays.items() if not name.startswith("+")}
        samples.append(Sample(**scalars, **own, weight_versions=spans))
        extra.append({name[1:]: value for name, value in arrays.items() if name.startswith("+")})
    return samples, extra


def encode_arrays(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return uint8 [n] of ``arrays``."""
    return _encode([({}, {"": array}) for array in arrays])


def decode_arrays(data: np.ndarray) -> list[np.ndarray]:
    """Invert ``encode_arrays``."""
    return [arrays[""] for _, arrays in _decode(data)]


def _encode(records: Sequence[tuple[dict[str, Any], dict[str, np.ndarray]]]) -> np.ndarray:
    descriptions: list[Any] = []
    parts: list[np.ndarray] = []
    for scalars, arrays in records:
        described = []
        for name, array in arrays.items():
            sent = _narrowed(array)
            described.append([name, array.dtype.str, sent.dtype.str, list(array.shape)])
            parts.append(np.ascontiguousarray(sent).reshape(-1).view(np.uint8))
        descriptions.append([scalars, described])
    header = np.frombuffer(json.dumps(descriptions, ensure_ascii=False).encode(), dtype=np.uint8)
    start = round_up(_ALIGNMENT + len(header), _ALIGNMENT)
    data = np.zeros(start + sum(round_up(len(part), _ALIGNMENT) for part in parts), dtype=np.uint8)
    data[:_ALIGNMENT] = np.array([len(header)], dtype=np.int64).view(np.uint8)
    data[_ALIGNMENT : _ALIGNMENT + len(header)] = header
    for part in parts:
        data[start : start + len(part)] = part
        start += round_up(len(part), _ALIGNMENT)
    return data


def _decode(data: np.ndarray) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    size = int(data[:_ALIGNMENT].view(np.int64)[0])
    descriptions = json.loads(data[_ALIGNMENT : _ALIGNMENT + size].tobytes().decode())
    start = round_up(_ALIGNMENT + size, _ALIGNMENT)
    records = []
    for scalars, described in descriptions:
        arrays = {}
        for name, dtype, sent, shape in described:
            count = int(np.prod(shape, dtype=np.int64)) * np.dtype(sent).itemsize
            values = data[start : start + count].view(sent).reshape(shape)
            arrays[name] = values.astype(dtype)  # a copy: the buffer can be freed
            start += round_up(count, _ALIGNMENT)
        records.append((scalars, arrays))
    return records


def _narrowed(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.int64 and (not array.size or _INT32.min <= array.min() <= array.max() <= _INT32.max):
        return array.astype(np.int32)
    return array
