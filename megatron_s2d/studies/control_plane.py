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


# The median of ranks, steps and six kinds of stages, 8 responses a rank, of 2,560 tokens on average, and prompts of 13;
# on two CPU cores that other programs used too. docs/scaling.md has the same rows (tests/unit/studies/test_scaling.py).
_TOKENS = 8 * (2560 + 13)
MEASURED = (
    HostCost(2, 0.0227, _TOKENS),
    HostCost(4, 0.0263, _TOKENS),
    HostCost(8, 0.0345, _TOKENS),
    HostCost(16, 0.0478, _TOKENS),
    HostCost(32, 0.0669, _TOKENS),
)


def growth(rows: Sequence[HostCost] = MEASURED) -> float:
    """Return the exponent e of seconds ~ ranks^e, by least squares on logarithms."""
    slope, _ = np.polyfit(np.log([row.ranks for row in rows]), np.log([row.seconds for row in rows]), 1)
    return float(slope)


def host_seconds(ranks: int, tokens: float, rows: Sequence[HostCost] = MEASURED) -> float:
    """Return the seconds of a step on each of ``ranks`` data-parallel ranks with ``tokens`` tokens of its own.

    Proportional to the tokens (packing, encoding), and to ranks^``growth`` (records and sums of all ranks).
    """
    exponent = growth(rows)
    logs = [np.log(row.seconds / row.tokens) - exponent * np.log(row.ranks) for row in rows]
    return float(tokens * np.exp(np.mean(logs)) * ranks**exponent)


def checkpoint_seconds(num_bytes: float, writers: int, bandwidth: float, shared_bandwidth: float) -> float:
    """Return the time to write ``num_bytes``, split over ``writers`` nodes of ``bandwidth`` bytes/s each.

    shared_bandwidth: of the file system, over all of them.
    """
    return num_bytes / min(writers * bandwidth, shared_bandwidth)
