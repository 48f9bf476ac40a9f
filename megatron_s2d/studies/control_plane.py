"""Cost of a step beside the models: samples exchanged and packed on the host, and checkpoints written. No torch here.

The rows are what ``benchmarks/control_plane.py`` measured; a power law through them gives other numbers of ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

COMMAND = "python benchmarks/control_plane.py --json ROWS"


@dataclasses.dataclass(frozen=True)
class HostCost:
    """A measured step: every data-parallel rank has the same samples at each number of ranks."""

    ranks: int
    seconds: float  # of a rank's process on its CPU
    tokens: int  # of a rank's samples, prompts included


# The median of ranks, steps and six kinds of stages, 8 responses a rank, with prompts of 13 tokens, and responses of
# 2,560 tokens on average or of 60 (--response-length 4096 and 96); on two CPU cores that other programs used too.
# docs/scaling.md has the same rows (tests/unit/studies/test_scaling.py).
_LONG, _SHORT = 8 * (2560 + 13), 8 * (60 + 13)
MEASURED = (
    HostCost(2, 0.0241, _LONG),
    HostCost(4, 0.0268, _LONG),
    HostCost(8, 0.0329, _LONG),
    HostCost(16, 0.05151, _LONG),
    HostCost(32, 0.0746, _LONG),
    HostCost(2, 0.0134, _SHORT),
    HostCost(4, 0.0189, _SHORT),
    HostCost(8, 0.0200, _SHORT),
    HostCost(16, 0.0297, _SHORT),
    HostCost(32, 0.0454, _SHORT),
)


def growth(rows: Sequence[HostCost] = MEASURED) -> float:
    """Return the exponent e of seconds ~ ranks^e, one for all numbers of tokens, by least squares on logarithms."""
    deviations = []
    for group in _by_tokens(rows).values():
        logs = np.log([(row.ranks, row.seconds) for row in group])
        deviations.append(logs - logs.mean(axis=0))
    ranks, seconds = np.concatenate(deviations).T
    return float(ranks @ seconds / (ranks @ ranks))


def host_seconds(ranks: int, tokens: float, rows: Sequence[HostCost] = MEASURED) -> float:
    """Return the seconds of a step on each of ``ranks`` data-parallel ranks with ``tokens`` tokens of its own.

    A line in the tokens (packing, encoding; at 0 what a step costs anyway), times ranks^``growth`` (records and sums of
    all ranks). With rows of a single number of tokens the cost is proportional to them.
    """
    exponent = growth(rows)
    points = {0: 0.0} if len(_by_tokens(rows)) == 1 else {}
    for measured, group in _by_tokens(rows).items():
        points[measured] = float(np.exp(np.mean([np.log(row.seconds) - exponent * np.log(row.ranks) for row in group])))
    slope, fixed = np.polyfit(list(points), list(points.values()), 1)
    return float((fixed + slope * tokens) * ranks**exponent)


def _by_tokens(rows: Sequence[HostCost]) -> dict[int, list[HostCost]]:
    groups: dict[int, list[HostCost]] = {}
    for row in rows:
        groups.setdefault(row.tokens, []).append(row)
    return groups


def checkpoint_seconds(num_bytes: float, writers: int, bandwidth: float, shared_bandwidth: float) -> float:
    """Return the time to write ``num_bytes``, split over ``writers`` nodes of ``bandwidth`` bytes/s each.

    shared_bandwidth: of the file system, over all of them.
    """
    return num_bytes / min(writers * bandwidth, shared_bandwidth)
