"""Split packed sequences over context-parallel ranks, as Megatron and Transformer Engine do. No Megatron here.

Each sequence is split into 2 * cp_size chunks; rank r has the r-th chunk from the front and the r-th from the back, so
that with causal attention all ranks have the same work.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cp_length_multiple(cp_size: int) -> int:
    """Return the number that the length of every sequence must be a multiple of."""
    return 1 if cp_size == 1 else 2 * cp_size


def cp_positions(cu_seqlens: Sequence[int], cp_size: int) -> np.ndarray:
    """Return the positions of each rank's tokens, in its order: [cp_size, total tokens / cp_size] int64.

    cu_seqlens: start of each sequence, and the end of the last; lengths are multiples of ``cp_length_multiple``.
    """
    starts, lengths = np.asarray(cu_seqlens[:-1]), np.diff(cu_seqlens)
    if np.any(lengths % cp_length_multiple(cp_size)):
        raise ValueError(
            f"sequences of {lengths.tolist()} tokens cannot be split over {cp_size} context-parallel ranks"
        )
    if cp_size == 1:
        return np.arange(cu_seqlens[-1])[None]
    positions = []
    for rank in range(cp_size):
        chunks = []
        for start, length in zip(starts, lengths, strict=True):
            size = length // (2 * cp_size)
            for index in (rank, 2 * cp_size - 1 - rank):
                chunks.append(np.arange(start + index * size, start + (index + 1) * size))
        positions.append(np.concatenate(chunks))
    return np.stack(positions)
