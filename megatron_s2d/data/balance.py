"""Which data-parallel rank trains on which sample: each on its own, except where one rank has too many tokens.

Moving a sample costs a message, and leaving it costs the other ranks time, so samples move only from ranks above the
mean number of tokens by more than a tolerance. Every rank computes the same result from lengths alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

TOLERANCE = 0.15  # in training: of the mean tokens of a rank
SCORING_TOLERANCE = 0.5  # a forward pass takes a third of the time, and its results travel back


def balanced_ranks(
    lengths: Sequence[int], ranks: Sequence[int], num_ranks: int, tolerance: float = TOLERANCE
) -> list[int]:
    """Return the data-parallel rank of every sample, given where they are now (``ranks``).

    lengths: tokens of each sample. tolerance: of the mean tokens of a rank.
    """
    result = list(ranks)
    if num_ranks == 1 or not result:
        return result
    loads = np.bincount(result, weights=lengths, minlength=num_ranks)
    limit = loads.mean() * (1 + tolerance)
    crowded = np.flatnonzero(loads > limit).tolist()
    if not crowded:
        return result
    held: dict[int, list[int]] = {rank: [] for rank in crowded}
    for index, rank in enumerate(result):
        if rank in held:
            held[rank].append(index)
    targets = [(float(load), rank) for rank, load in enumerate(loads) if load <= limit]
    heapq.heapify(targets)
    for rank in sorted(crowded, key=lambda rank: (-loads[rank], rank)):
        load = float(loads[rank])
        # Longest first: fewest messages. A sample moves only if its new rank has fewer tokens than this one had.
        for index in sorted(held[rank], key=lambda index: (-lengths[index], index)):
            least, target = targets[0]
            if load <= limit:
                break
            if least + lengths[index] < load and load - lengths[index] >= least:
                heapq.heapreplace(targets, (least + lengths[index], target))
                result[index] = target
                load -= lengths[index]
    return result
