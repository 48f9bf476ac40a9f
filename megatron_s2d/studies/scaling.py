"""Fits power laws with bootstrap intervals to the points of a sweep, and computes scaling efficiency. No torch here.

A power law is fitted by least squares on the logarithms of x and y. Its interval is a percentile bootstrap over
problems (the same resample for every point) and over the seeds of each point, so it covers other problems and other
training runs. A loss from a single seed cannot be resampled and gets no interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_s2d.errors import UserError

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = scale * x ** exponent."""

    scale: float
    exponent: float
    interval: tuple[float, float] | None  # 95 %, of the exponent; None without anything to resample
    points: tuple[tuple[float, float], ...]  # (x, mean of y over seeds)
    r_squared: float  # of the logarithms
    dropped: int = 0  # resamples with a y that is not positive, left out of the interval

    def __call__(self, x: float) -> float:
        return self.scale * x**self.exponent


@dataclasses.dataclass(frozen=True)
class Observations:
    """Measurements at one x: one number per seed, or for accuracies one per seed and problem."""

    x: float
    values: np.ndarray  # [seeds] or [seeds, problems] float64

    @property
    def mean(self) -> float:
        return float(self.values.mean())


def fit_power_law(observed: Sequence[Observations], *, complement: bool = False, seed: int = 0) -> PowerLaw:
    """Fit the law through the means at three or more different x.

    With ``complement`` the law is that of 1 - y (errors from accuracies). Raises ``UserError`` for fewer points, or if
    a mean is not positive.
    """
    if len({item.x for item in observed}) < 3:
        raise UserError(f"a power law needs three different x; there are {len({item.x for item in observed})}")
    sign = -1.0 if complement else 1.0
    x = np.log([item.x for item in observed])
    y = np.array([complement + sign * item.mean for item in observed])
    if (y <= 0).any():
        first = observed[int((y <= 0).argmax())].x
        raise UserError(f"a power law needs positive values; at x = {first:g} it is {y.min():g}")
    exponent, offset = np.polyfit(x, np.log(y), 1)
    residuals = np.log(y) - (exponent * x + offset)
    deviations = np.log(y) - np.log(y).mean()
    variance = float(deviations @ deviations)
    r_squared = 1 - float(residuals @ residuals) / variance if variance > 0 else 1.0
    interval, dropped = _interval(observed, x, complement, np.random.default_rng(seed))
    points = tuple((item.x, float(value)) for item, value in zip(observed, y, strict=True))
    return PowerLaw(math.exp(offset), float(exponent), interval, points, r_squared, dropped)


def _interval(
    observed: Sequence[Observations], x: np.ndarray, complement: bool, generator: np.random.Generator
) -> tuple[tuple[float, float] | None, int]:
    by_problem = observed[0].values.ndim == 2
    if not by_problem and all(len(item.values) < 2 for item in observed):
        return None, 0
    exponents = []
    for _ in range(_RESAMPLES):
        if by_problem:
            count = observed[0].values.shape[1]
            problems = generator.integers(0, count, count)
        means = []
        for item in observed:
            drawn = item.values[generator.integers(0, len(item.values), len(item.values))]
            means.append(drawn[:, problems].mean() if by_problem else drawn.mean())
        y = 1 - np.array(means) if complement else np.array(means)
        if (y > 0).all():
            exponents.append(np.polyfit(x, np.log(y), 1)[0])
    dropped = _RESAMPLES - len(exponents)
    if dropped > _RESAMPLES // 10:
        return None, dropped
    low, high = np.quantile(exponents, [0.025, 0.975])
    return (float(low), float(high)), dropped


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Throughput of one layout, relative to the smallest."""

    label: str
    ranks: int
    tokens_per_step: float  # over all ranks
    tokens_per_second: float
    efficiency: float  # tokens per second and rank, relative to the layout with the fewest ranks


def scaling_kind(rows: Sequence[Efficiency]) -> str:
    """Return ``strong`` for equal tokens per step, ``weak`` for equal tokens per step and rank, else ``mixed``."""
    tokens = np.array([row.tokens_per_step for row in rows])
    per_rank = tokens / np.array([row.ranks for row in rows])
    if np.ptp(tokens) <= 0.1 * tokens.mean():
        return "strong"
    return "weak" if np.ptp(per_rank) <= 0.1 * per_rank.mean() else "mixed"


def efficiencies(measured: Mapping[str, tuple[int, float, float]]) -> list[Efficiency]:
    """Return efficiencies of label -> (ranks, tokens per step, tokens per second), fewest ranks first."""
    order = sorted(measured, key=lambda label: measured[label][0])
    ranks, _, rate = measured[order[0]]
    base = rate / ranks
    return [
        Efficiency(label, count, tokens, rate, rate / count / base)
        for label, (count, tokens, rate) in ((label, measured[label]) for label in order)
    ]
