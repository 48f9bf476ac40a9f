"""Statistics over problems: means with standard errors, pass@k, paired intervals and sign-flip test (methods.md M6).

Arrays in, numbers out. Randomness is NumPy's, with a seed. Not ``scipy.stats.bootstrap`` and ``permutation_test``: they
draw other random numbers, which would change every interval and p-value that a run has recorded. No torch here.

Shapes: n problems, k samples of each problem.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

_RESAMPLES_PER_BLOCK = 1000  # drawn at once: bounds memory to this times the number of problems
EXACT_PROBLEMS = 20  # up to so many problems, all 2 ** n sign flips are looked at
SIGNIFICANCE = 0.05  # largest p-value of a difference that is called one
_NORMAL_975, _NORMAL_80 = 1.959964, 0.841621  # quantiles: a two-sided test at 5 %, a power of 80 %


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
    interval: tuple[float, float]  # see ``compare_paired``
    level: float  # of the interval: 0.95, or the most that very few problems allow
    p_value: float  # two-sided sign-flip test over problems
    num_problems: int
    k: int

    @property
    def order(self) -> str:
        """``a>b`` or ``a<b`` where interval and p-value both say so, otherwise ``a~b``: not distinguishable."""
        low, high = self.interval
        if self.p_value > SIGNIFICANCE:
            return "a~b"
        return "a>b" if low > 0 else "a<b" if high < 0 else "a~b"

    def problems_needed(self, difference: float = 0.05) -> int | None:
        """Return how many problems of this kind show a ``difference`` at 5 % with a power of 80 %, by normal theory.

        None for a single problem, and where all differ by the same, as when no answer is right: the spread is unknown.
        """
        if not self.std_err:
            return None
        variance = self.std_err**2 * self.num_problems
        return max(2, math.ceil(variance * ((_NORMAL_975 + _NORMAL_80) / difference) ** 2))


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

    The p-value is the share of sign flips of the differences whose mean is at least as far from 0. Up to
    ``EXACT_PROBLEMS`` problems it is over all flips, and the interval has the values that the same test does not
    refuse, so the two agree; with more, flips are drawn and the interval is the percentile bootstrap over problems.
    """
    if len(differences) <= EXACT_PROBLEMS:
        return _compare_exactly(differences, k, level)
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


def _compare_exactly(differences: np.ndarray, k: int, level: float) -> PairedComparison:
    """Compare by all sign flips. The interval inverts the test: its ends are means of subsets of the differences.

    Flipping the signs of a subset leaves the distance of the mean from a value theta at least as large if and only if
    the subset's mean is at most theta, or its complement's (Hartigan, Using subsample values as typical values, 1969).
    """
    n = len(differences)
    sums, sizes = np.zeros(1), np.zeros(1, dtype=np.int64)
    for value in differences:
        sums, sizes = np.concatenate([sums, sums + value]), np.concatenate([sizes, sizes + 1])
    observed = abs(differences.sum())
    # A flip of a subset turns the sum S into S - 2 s; the slack counts flips that only round differently.
    extreme = np.abs(differences.sum() - 2 * sums) >= observed - 1e-12 * n
    means = np.sort(sums[1:] / sizes[1:])
    tail = max(1, int((1 - level) / 2 * 2**n))  # of the 2 ** n gaps between the means, left out at each end
    estimate = mean_over_problems(differences)
    return PairedComparison(
        difference=estimate.mean,
        std_err=estimate.std_err,
        interval=(float(means[tail - 1]), float(means[-tail])),
        level=min(level, 1 - 2 * tail / 2**n),
        p_value=float(extreme.mean()),
        num_problems=n,
        k=k,
    )
