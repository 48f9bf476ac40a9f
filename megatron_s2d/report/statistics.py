"""Statistics over problems: means with standard errors, pass@k, paired bootstrap and sign-flip test (methods.md M6).

Arrays in, numbers out. Randomness is NumPy's, with a seed. Not ``scipy.stats.bootstrap`` and ``permutation_test``: they
draw other random numbers, which would change every interval and p-value that a run has recorded. No torch here.

Shapes: n problems, k samples of each problem.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

_RESAMPLES_PER_BLOCK = 1000  # drawn at once: bounds memory to this times the number of problems


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over problems."""

    mean: float
    std_err: float | None  # sample standard deviation over problems / sqrt(n); None for a single problem
    num_problems: int


@dataclasses.dataclass(frozen=True)
class PairedComparison:
    """Run a minus run b, on the same problems."""

    difference: float
    std_err: float | None  # of the per-problem differences; None for a single problem
    interval: tuple[float, float]  # percentile bootstrap over problems
    level: float  # of the interval, for example 0.95
    p_value: float  # two-sided sign-flip test over problems
    num_problems: int
    k: int

    @property
    def order(self) -> str:
        """``a>b`` or ``a<b`` where the interval leaves out 0, otherwise ``a~b``: not distinguishable."""
        low, high = self.interval
        return "a>b" if low > 0 else "a<b" if high < 0 else "a~b"


def mean_over_problems(values: np.ndarray) -> Estimate:
    """Return the mean of ``values`` [n] with its standard error over problems."""
    n = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None, n)


def unbiased_pass_at_k(num_samples: np.ndarray, num_correct: np.ndarray, k: int) -> np.ndarray:
    """Return pass@k of every problem [n]: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    num_samples, num_correct: [n] int, of every problem; ``k`` is at most the smallest of ``num_samples``.
    """
    pairs = zip(num_samples.tolist(), num_correct.tolist(), strict=True)
    return np.array([1 - math.comb(samples - correct, k) / math.comb(samples, k) for samples, correct in pairs])


def compare_paired(differences: np.ndarray, *, k: int, seed: int, resamples: int, level: float) -> PairedComparison:
    """Compare two runs by their per-problem ``differences`` [n] of ``k`` samples each.

    The interval is the percentile bootstrap over problems; the p-value is the share of random sign flips of the
    differences whose mean is at least as far from 0. Percentile intervals are somewhat too narrow below about 30
    problems.
    """
    generator = np.random.default_rng(seed)
    n = len(differences)
    means, num_extreme = [], 0
    observed = abs(differences.mean())
    for start in range(0, resamples, _RESAMPLES_PER_BLOCK):
        size = min(_RESAMPLES_PER_BLOCK, resamples - start)
        means.append(generator.multinomial(n, np.full(n, 1 / n), size=size) @ differences / n)
        signs = generator.integers(0, 2, size=(size, n)) * 2.0 - 1.0
        # The slack counts flips that only round differently from the observed mean.
        num_extreme += int((np.abs(signs @ differences) / n >= observed - 1e-12).sum())
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    estimate = mean_over_problems(differences)
    return PairedComparison(
        difference=estimate.mean,
        std_err=estimate.std_err,
        interval=(float(low), float(high)),
        level=level,
        p_value=(num_extreme + 1) / (resamples + 1),
        num_problems=n,
        k=k,
    )
