"""Graded samples of an evaluation (``evaluation.jsonl``) and their endpoints: avg@k, pass@k, paired comparisons.

The unit of all uncertainty is the problem (methods.md M6): samples of one problem are averaged first, so the intervals
say how the result would move with other problems of the same kind, not with other training seeds. No torch here.

Shapes: n problems, k samples of each problem.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_s2d.artifacts.files import read_jsonl
from megatron_s2d.artifacts.shapes import EvaluationRow, checked
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
    correct: np.ndarray  # [n, k] float64: 1 for a correct response, else 0; a reward where the file does not say
    response_lengths: np.ndarray  # [n, k] float64, tokens
    finish_reasons: tuple[tuple[str, ...], ...]  # n times k
    verifier_labels: tuple[tuple[str, ...], ...] = ()  # n times k verdicts; empty if the file has none

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

    @property
    def verdict_shares(self) -> dict[str, float]:
        """Verdict -> its share of all samples, the most frequent one first; empty if the file has none."""
        counts = collections.Counter(label for row in self.verifier_labels for label in row)
        return {label: count / counts.total() for label, count in counts.most_common()}

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
            self.correct[list(rows)],
            self.response_lengths[list(rows)],
            tuple(self.finish_reasons[row] for row in rows),
            tuple(self.verifier_labels[row] for row in rows) if self.verifier_labels else (),
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
    sizes: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        _check_row(row, f"{source}:{number}", sizes)
        if row["problem_id"] in seen:
            raise UserError(f"{source}:{number}: problem '{row['problem_id']}' comes twice; evaluate it once")
        seen.add(row["problem_id"])
    return Evaluation(
        source,
        tuple(row["problem_id"] for row in rows),
        tuple(row["domain"] for row in rows),
        _pad_with_nan([row["rewards"] for row in rows]),
        _pad_with_nan([row["rewards"] if row.get("correct") is None else row["correct"] for row in rows]),
        _pad_with_nan([row["response_lengths"] for row in rows]),
        tuple(tuple(row["finish_reasons"]) for row in rows),
        tuple(tuple(row["verifier_labels"]) for row in rows) if all(row.get("verifier_labels") for row in rows) else (),
    )


def _pad_with_nan(rows: Sequence[Sequence[float]]) -> np.ndarray:
    padded = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _check_row(row: Mapping[str, Any], location: str, sizes: dict[str, int]) -> None:
    """sizes: domain -> samples of its first problem; a row of another domain is added."""
    missing = [name for name, field in EvaluationRow.model_fields.items() if field.is_required() and name not in row]
    if missing:
        raise UserError(f"{location}: no '{missing[0]}'; this is not a file of evaluation rows")
    checked(row, EvaluationRow, location)
    k = sizes.setdefault(row["domain"], len(row["rewards"]))
    optional = [name for name in ("correct", "verifier_labels") if row.get(name) is not None]
    for name in ("rewards", "response_lengths", "finish_reasons", *optional):
        if not row[name] or len(row[name]) != k:
            raise UserError(f"{location}: '{name}' must list one entry for each of the {k or 'k > 0'} samples")


def avg_at_k(evaluation: Evaluation) -> Estimate:
    """Return the mean over problems of the mean reward of their k samples, with its standard error (M6)."""
    return mean_over_problems(evaluation.means)


def pass_rate(evaluation: Evaluation) -> Estimate:
    """Return the mean over problems of the share of their k samples that are correct, with its standard error."""
    return mean_over_problems(np.nanmean(evaluation.correct, axis=1))


def mean_length(evaluation: Evaluation) -> Estimate:
    """Return the mean over problems of the mean length of their k responses, in tokens, with its standard error."""
    return mean_over_problems(np.nanmean(evaluation.response_lengths, axis=1))


def pass_at_k(evaluation: Evaluation, ks: Iterable[int] | None = None) -> dict[int, Estimate]:
    """Return the unbiased pass@k for every k of ``ks``.

    ``ks`` defaults to the powers of two up to the fewest samples of a problem, and that number. Rewards must be 0 or 1
    where the file does not say which responses are correct; a k above that number is a ``UserError``.
    """
    fewest = evaluation.k
    ks = sorted({2**power for power in range(fewest.bit_length())} | {fewest}) if ks is None else list(ks)
    if not np.isin(evaluation.correct[~np.isnan(evaluation.correct)], (0.0, 1.0)).all():
        raise UserError(f"{evaluation.source}: pass@k needs rewards of 0 and 1; these have other values")
    num_correct = np.nansum(evaluation.correct, axis=1).astype(int)
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
