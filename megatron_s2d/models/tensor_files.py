"""Where a tensor of a checkpoint is in its files, and reading it from there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_s2d.errors import UserError

BLOCK_BYTES = 4 * 2**20
"""Bytes per read."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Location of a tensor: absolute byte range [start, stop) of ``path``."""

    path: Path
    dtype: torch.dtype
    """Of the values that are read."""
    shape: tuple[int, ...]
    start: int
    stop: int
    pickled: torch.Tensor | None = None
    """The tensor of a ``.bin`` file, mapped from it rather than in memory."""
    scales: TensorInfo | None = None
    """Scales of the blocks of a matrix that is stored in FP8."""
    block: tuple[int, int] = (0, 0)
    compute: Callable[[], torch.Tensor] | None = None
    """Values of a tensor that the files have as a part of another one (``fused_experts.py``)."""

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_bytes(path: Path, start: int, count: int) -> torch.Tensor:
    """Return ``count`` bytes of a file from ``start`` as a new uint8 tensor; ``UserError`` if the file ends before."""
    content = torch.empty(count, dtype=torch.uint8)
    view = memoryview(content.numpy())
    try:
        with open(path, "rb", buffering=0) as file:
            # Twice the read-ahead; with blocks of this size the kernel reads while the last block is being copied.
            os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_SEQUENTIAL)
            num_read = 0
            while num_read < count:
                block_size = os.preadv(file.fileno(), [view[num_read : num_read + BLOCK_BYTES]], start + num_read)
                if block_size == 0:
                    raise UserError(f"{path}: truncated; fetch the file again")
                num_read += block_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return content


def read_rows(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Return a tensor's slice [start, stop) along dimension 0, of which only its own bytes are read."""
    if info.pickled is not None:
        return info.pickled[start:stop].clone(memory_format=torch.contiguous_format)
    row = info.num_bytes // info.shape[0]
    content = read_bytes(info.path, info.start + start * row, (stop - start) * row)
    return content.view(info.dtype).view(stop - start, *info.shape[1:])
