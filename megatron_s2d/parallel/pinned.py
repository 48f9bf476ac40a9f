"""Pinned host copies of many tensors, without the rounding of PyTorch's host allocator.

That allocator rounds every allocation up to a power of two, which is up to twice the memory for large tensors. Here
tensors share segments whose sizes are powers of two already, the largest tensors first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from megatron_s2d.arithmetic import round_up
from megatron_s2d.parallel import device

_ALIGNMENT = 256  # bytes: of copies by the device
_LARGEST_SEGMENT = 4 << 30
_SMALLEST_SEGMENT = 1 << 20


@dataclasses.dataclass
class Segment:
    """An allocation of ``size`` bytes, a power of two, whose first ``used`` bytes are taken."""

    size: int
    used: int = 0


def place(sizes: Sequence[int]) -> tuple[list[Segment], list[tuple[int, int]]]:
    """Return segments that hold tensors of ``sizes`` bytes, and (number of the segment, offset) of each tensor."""
    padded = [round_up(size, _ALIGNMENT) for size in sizes]
    segments: list[Segment] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(sizes)
    remaining = sum(padded)
    for index in sorted(range(len(sizes)), key=lambda index: -padded[index]):
        size = padded[index]
        number = next((n for n, item in enumerate(segments) if item.size - item.used >= size), len(segments))
        if number == len(segments):
            segments.append(Segment(_segment_size(size, remaining)))
        places[index] = (number, segments[number].used)
        segments[number].used += size
        remaining -= size
    return segments, places


def _segment_size(size: int, remaining: int) -> int:
    """Return the power of two that holds ``size`` bytes and as much of all ``remaining`` bytes as fills it."""
    filled = min(_LARGEST_SEGMENT, 1 << (max(remaining, 1).bit_length() - 1))
    return max(_SMALLEST_SEGMENT, filled, 1 << (size - 1).bit_length())


def pinned_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return an uninitialised contiguous host tensor for each of ``tensors``; pinned if there is CUDA."""
    sizes = [tensor.numel() * tensor.dtype.itemsize for tensor in tensors]
    segments, places = place(sizes)
    buffers = [device.pinned_empty(segment.size, dtype=torch.uint8) for segment in segments]
    return [
        buffers[number][offset : offset + size].view(tensor.dtype).view(tensor.shape)
        for tensor, size, (number, offset) in zip(tensors, sizes, places, strict=True)
    ]
