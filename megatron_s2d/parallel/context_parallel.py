"""How sequences that lie end to end are cut over context-parallel ranks: Megatron's and Transformer Engine's scheme.

Each sequence is cut into twice as many pieces as there are ranks; rank r holds the r-th piece from the front and the
r-th from the back, so that with causal attention all ranks have the same work. No Megatron here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def num_pieces(size: int) -> int:
    """What the length of every sequence has to be a multiple of at ``size`` context ranks."""
    return 1 if size == 1 else 2 * size


def cp_positions(bounds: Sequence[int], size: int) -> np.ndarray:
    """[size, tokens / size] int64: the positions that each rank holds, in its order.

    ``bounds``: where each sequence begins, and the end; lengths are multiples of ``pieces(size)``.
    """
    starts, lengths = np.asarray(bounds[:-1]), np.diff(bounds)
    if np.any(lengths % num_pieces(size)):
        raise ValueError(f"sequences of {lengths.tolist()} tokens cannot be cut for {size} context ranks")
    if size == 1:
        return np.arange(bounds[-1])[None]
    held = []
    for rank in range(size):
        parts = []
        for start, length in zip(starts, lengths, strict=True):
            piece = length // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                parts.append(np.arange(start + number * piece, start + (number + 1) * piece))
        held.append(np.concatenate(parts))
    return np.stack(held)
