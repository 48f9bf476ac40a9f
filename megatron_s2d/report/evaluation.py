"""Graded samples of an evaluation (``evaluation.jsonl``) and their endpoints: avg@k, pass@k, paired comparisons.

The unit of all uncertainty is the problem (methods.md M6): samples of one problem are averaged first, so the intervals
say how the result would move with other problems of the same kind, not with other training seeds. No torch here.

Shapes: n problems, k samples of each problem.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_s2d.artifacts.files import read_jsonl
from megatron_s2d.errors import UserError
from megatron_s2d.report.statistics import (
    Estimate,
    PairedComparison,
    compare_paired,
    mean_over_problems,
    unbiased_pass_at_k,
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Graded samples of n problems: k of each, the same within a domain; NaN where another domain has more."""

    source: str  # file that it was read from, for messages
    problem_ids: tuple[str, ...]  # n
    domains: tuple[str, ...]  # n
    rewards: np.ndarray  # [n, k] float64
    response_lengths: np.ndarray  # [n, k] float64, tokens
    finish_reasons: tuple[tuple[str, ...], ...]  # n times k

    @property
    def k(self) -> int:
        """Samples of each problem; the fewest where domains differ."""
        return int(self.counts.min())

    @property
    def counts(self) -> np.ndarray:
        """[n] int64: samples of every problem."""
        return (~np.isnan(self.rewards)).sum(axis=1)

    @property
    def means(self) -> np.ndarray:
        """[n] float64: mean reward of every problem's samples."""
        return np.nanmean(self.rewards, axis=1)

    @property
    def num_problems(self) -> int:
        """Number of problems, n."""
        return self.rewards.shape[0]

    @property
    def truncated_fraction(self) -> float:
        """Share of the samples that reached the length limit."""
        reasons = [reason for row in self.finish_reasons for reason in row]
        return sum(reason == "length" for reason in reasons) / len(reasons)

    def of_domain(self, domain: str) -> Evaluation:
        """Return the problems of one domain."""
        return self._rows([index for index, name in enumerate(self.domains) if name == domain], domain)

    def of_problems(self, problem_ids: Sequence[str]) -> Evaluation:
        """Return the problems ``problem_ids``, in this order; each must be among the evaluated ones."""
        row_of = {problem: row for row, problem in enumerate(self.problem_ids)}
        return self._rows([row_of[problem] for problem in problem_ids], f"{len(problem_ids)} problems")

    def _rows(self, rows: Sequence[int], description: str) -> Evaluation:
        return Evaluation(
            f"{self.source} ({description})",
            tuple(self.problem_ids[row] for row in rows),
            tuple(self.domains[row] for row in rows),
            self.rewards[list(rows)],
            self.response_lengths[list(rows)],
            tuple(self.finish_reasons[row] for row in rows),
        )


def read_evaluation(path: str | Path) -> Evaluation:
    """Read a file with one row a problem: ``problem_id``, ``domain``, ``rewards``, ``response_lengths``,
    ``finish_reasons``, the last three with one entry a sample. ``UserError`` for anything else, naming the row."""
    return evaluation_from_rows(read_jsonl(path), str(path))


def evaluation_from_rows(rows: Sequence[Mapping[str, Any]], source: str) -> Evaluation:
    """Check rows as ``read_evaluation`` describes them and stack them; ``source`` names them in messages."""
    if not rows:
        raise UserError(f"{source}: no evaluated problem; run the evaluation first")
    seen: set[str] = set()
    sizes: dict[Any, int] = {}  # by domain
    for number, row in enumerate(rows, 1):
        _check_row(row, f"{source}:{number}", sizes.setdefault(row.get("domain"), len(row.get("rewards", ()))))
        if row["problem_id"] in seen:
            raise UserError(f"{source}:{number}: problem '{row['problem_id']}' comes twice; evaluate it once")
        seen.add(row["problem_id"])
    return Evaluation(
        source,
        tuple(row["problem_id"] for row in rows),
        tuple(row["domain"] for row in rows),
        _pad_with_nan([row["rewards"] for row in rows]),
        _pad_with_nan([row["response_lengths"] for row in rows]),
        tuple(tuple(row["finish_reasons"]) for row in rows),
    )


def _pad_with_nan(rows: Sequence[Sequence[float]]) -> np.ndarray:
    padded = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _check_row(row: Mapping[str, Any], location: str, k: int) -> None:
    for name in ("problem_id", "domain", "rewards", "response_lengths", "finish_reasons"):
        if name not in row:
            raise UserError(f"{location}: no '{name}'; this is not a file of evaluation rows")
    lists = {name: row[name] for name in ("rewards", "response_lengths", "finish_reasons")}
    for name, values in lists.items():
        if not isinstance(values, list) or not values or len(values) != k:
            raise UserError(f"{location}: '{name}' must list one entry for each of the {k or 'k > 0'} samples")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in row["rewards"]):
        raise UserError(f"{location}: rewards must be finite numbers")


def avg_at_k(evaluation: Evaluation) -> Estimate:
    """Return the mean over problems of the mean reward of their k samples, with its standard error (M6)."""
    return mean_over_problems(evaluation.means)


def pass_at_k(evaluation: Evaluation, ks: Iterable[int] | None = None) -> dict[int, Estimate]:
    """Return the unbiased pass@k for every k of ``ks``.

    ``ks`` defaults to the powers of two up to the fewest samples of a problem, and that number. Rewards must be 0 or 1;
    a k above that number is a ``UserError``.
    """
    fewest = evaluation.k
    ks = sorted({2**power for power in range(fewest.bit_length())} | {fewest}) if ks is None else list(ks)
    if not np.isin(evaluation.rewards[~np.isnan(evaluation.rewards)], (0.0, 1.0)).all():
        raise UserError(f"{evaluation.source}: pass@k needs rewards of 0 and 1; these have other values")
    num_correct = np.nansum(evaluation.rewards, axis=1).astype(int)
    estimates = {}
    for k in ks:
        if not 1 <= k <= fewest:
            raise UserError(
                f"{evaluation.source}: pass@{k} needs 1 to {fewest} samples of a problem; there are {fewest}"
            )
        estimates[k] = mean_over_problems(unbiased_pass_at_k(evaluation.counts, num_correct, k))
    return estimates


def paired_comparison(
    a: Evaluation, b: Evaluation, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> PairedComparison:
    """Compare avg@k of ``a`` with that of ``b``, problem by problem (M6).

    Runs on different problems or with different k are a ``UserError``.
    """
    return compare_paired(_paired_differences(a, b), k=a.k, seed=seed, resamples=resamples, level=level)


def _paired_differences(a: Evaluation, b: Evaluation) -> np.ndarray:
    """[n] float64: mean reward in ``a`` minus mean reward in ``b``, in the order of ``a``."""
    only_a, only_b = set(a.problem_ids) - set(b.problem_ids), set(b.problem_ids) - set(a.problem_ids)
    if only_a or only_b:
        example = min(only_a or only_b)
        raise UserError(
            f"{a.source} and {b.source} are on different problems ({len(only_a)} only in the first, {len(only_b)} only "
            f"in the second, for example '{example}'): evaluate both on the same set"
        )
    row_in_b = {problem: row for row, problem in enumerate(b.problem_ids)}
    order = [row_in_b[problem] for problem in a.problem_ids]
    if (a.counts != b.counts[order]).any():
        raise UserError(f"{a.source} has k = {a.k} and {b.source} has k = {b.k}: evaluate both with the same k")
    return a.means - b.means[order]
