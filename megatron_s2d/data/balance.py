"""Which data-parallel rank trains on which sample: each on its own, except where one rank has too many tokens.

Moving a sample costs a message, and leaving it costs the other ranks time, so samples move only from ranks above the
mean number of tokens by more than a tolerance, and no rank sends or receives more than a share of the tokens that it
had: the shares of scoring and of training add up to one, so a step moves at most a rank's own samples. Every rank
computes the same result from lengths alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

TOLERANCE, SHARE = 0.15, 0.65  # in training: of the mean tokens of a rank, and of a rank's own
SCORING_TOLERANCE, SCORING_SHARE = 0.5, 0.35  # a forward pass takes a third of the time, and its results travel back


def balanced_ranks(
    lengths: Sequence[int],
    ranks: Sequence[int],
    num_ranks: int,
    tolerance: float = TOLERANCE,
    share: float = math.inf,
) -> list[int]:
    """Return the data-parallel rank of every sample, given where they are now (``ranks``).

    lengths: tokens of each sample. tolerance: of the mean tokens of a rank. share: of a rank's tokens, that it may send
    and that it may receive (a rank without samples: of the mean); infinite where nothing is sent.
    """
    result = list(ranks)
    if num_ranks == 1 or not result:
        return result
    loads = np.bincount(result, weights=lengths, minlength=num_ranks)
    mean = loads.mean()
    limit = mean * (1 + tolerance)
    crowded = np.flatnonzero(loads > limit).tolist()
    held: dict[int, list[int]] = {rank: [] for rank in crowded}
    for index, rank in enumerate(result):
        if rank in held:
            held[rank].append(index)
    targets = np.flatnonzero(loads <= limit)
    filled = loads[targets]
    room = np.full(len(targets), math.inf) if math.isinf(share) else share * np.where(filled == 0, mean, filled)
    for rank in sorted(crowded, key=lambda rank: (-loads[rank], rank)):
        load, to_send = float(loads[rank]), math.inf if math.isinf(share) else share * float(loads[rank])
        # Longest first: fewest messages. A sample moves only if its new rank has fewer tokens than this one had.
        for index in sorted(held[rank], key=lambda index: (-lengths[index], index)):
            length = lengths[index]
            if load <= limit:
                break
            fits = np.flatnonzero((filled + length < load) & (length <= room)) if length <= to_send else ()
            if len(fits):
                target = fits[filled[fits].argmin()]
                result[index] = int(targets[target])
                filled[target] += length
                room[target] -= length
                load, to_send = load - length, to_send - length
    return result
