"""Endpoints of arms as numbers: avg@k, pass@k, paired comparisons, and the check that compared arms are matched.

Evaluation and its statistics are methods.md M6, the rule that a contrast's arms differ in the declared factor only is
M7. The unit of all uncertainty is the problem: samples of one problem are averaged first, so the intervals say how the
result would move with other problems of the same kind, not with other training seeds. No torch here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_s2d.artifacts.files import read_jsonl
from megatron_s2d.config.base import dump
from megatron_s2d.config.workflow import ContrastConfig, WorkflowConfig
from megatron_s2d.errors import UserError

_CHUNK = 1000  # resamples drawn at once: bounds memory to _CHUNK x num_problems numbers

Arm = Sequence[Mapping[str, Any]]
"""Resolved configurations of all stages that lead to an endpoint, its teacher's included, each with a ``role``."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Graded samples of each of n problems: k of each, the same within a domain; NaN where another domain has more."""

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
        """Share of the samples that ran into the length limit."""
        reasons = [reason for row in self.finish_reasons for reason in row]
        return sum(reason == "length" for reason in reasons) / len(reasons)

    def of_domain(self, domain: str) -> Evaluation:
        """The problems of one domain."""
        return self._rows([index for index, name in enumerate(self.domains) if name == domain], domain)

    def of_problems(self, problem_ids: Sequence[str]) -> Evaluation:
        """Some of the problems, in the order given; all of them are among the evaluated ones."""
        place = {problem: row for row, problem in enumerate(self.problem_ids)}
        return self._rows([place[problem] for problem in problem_ids], f"{len(problem_ids)} problems")

    def _rows(self, rows: Sequence[int], what: str) -> Evaluation:
        return Evaluation(
            f"{self.source} ({what})",
            tuple(self.problem_ids[row] for row in rows),
            tuple(self.domains[row] for row in rows),
            self.rewards[list(rows)],
            self.response_lengths[list(rows)],
            tuple(self.finish_reasons[row] for row in rows),
        )


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
        _padded([row["rewards"] for row in rows]),
        _padded([row["response_lengths"] for row in rows]),
        tuple(tuple(row["finish_reasons"]) for row in rows),
    )


def _padded(rows: Sequence[Sequence[float]]) -> np.ndarray:
    found = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found


def _check_row(row: Mapping[str, Any], where: str, k: int) -> None:
    for name in ("problem_id", "domain", "rewards", "response_lengths", "finish_reasons"):
        if name not in row:
            raise UserError(f"{where}: no '{name}'; this is not a file of evaluation rows")
    lists = {name: row[name] for name in ("rewards", "response_lengths", "finish_reasons")}
    for name, values in lists.items():
        if not isinstance(values, list) or not values or len(values) != k:
            raise UserError(f"{where}: '{name}' must list one entry for each of the {k or 'k > 0'} samples")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in row["rewards"]):
        raise UserError(f"{where}: rewards must be finite numbers")


def avg_at_k(evaluation: Evaluation) -> Estimate:
    """Mean over problems of the mean reward of their k samples, with its standard error over problems (M6)."""
    return _estimate(evaluation.means)


def pass_at_k(evaluation: Evaluation, ks: Iterable[int] | None = None) -> dict[int, Estimate]:
    """Unbiased pass@k from n samples with c right: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    ``ks`` defaults to the powers of two up to n, and n, the fewest samples of a problem. Rewards must be 0 or 1; a k
    above n is a ``UserError``.
    """
    n = evaluation.k
    ks = sorted({2**power for power in range(n.bit_length())} | {n}) if ks is None else list(ks)
    if not np.isin(evaluation.rewards[~np.isnan(evaluation.rewards)], (0.0, 1.0)).all():
        raise UserError(f"{evaluation.source}: pass@k needs rewards of 0 and 1; these have other values")
    pairs = list(zip(evaluation.counts.tolist(), np.nansum(evaluation.rewards, axis=1).astype(int).tolist()))
    result = {}
    for k in ks:
        if not 1 <= k <= n:
            raise UserError(f"{evaluation.source}: pass@{k} needs 1 to {n} samples of a problem; there are {n}")
        result[k] = _estimate(np.array([1 - math.comb(size - c, k) / math.comb(size, k) for size, c in pairs]))
    return result


def paired_comparison(
    a: Evaluation, b: Evaluation, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> PairedComparison:
    """avg@k of ``a`` minus that of ``b``, problem by problem (M6).

    The interval is the percentile bootstrap over problems; the p-value is the share of random sign flips of the
    per-problem differences whose mean is at least as far from 0. Both are seeded. Runs on other problems or with
    another k are refused. Percentile intervals are somewhat too narrow below about 30 problems.
    """
    differences = _paired_differences(a, b)
    generator = np.random.default_rng(seed)
    n = len(differences)
    means, extreme = [], 0
    observed = abs(differences.mean())
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        means.append(generator.multinomial(n, np.full(n, 1 / n), size=size) @ differences / n)
        signs = generator.integers(0, 2, size=(size, n)) * 2.0 - 1.0
        # The slack keeps flips that only round differently from the observed mean.
        extreme += int((np.abs(signs @ differences) / n >= observed - 1e-12).sum())
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    estimate = _estimate(differences)
    return PairedComparison(
        difference=estimate.mean,
        std_err=estimate.std_err,
        interval=(float(low), float(high)),
        level=level,
        p_value=(extreme + 1) / (resamples + 1),
        num_problems=n,
        k=a.k,
    )


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


def _estimate(values: np.ndarray) -> Estimate:
    n = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None, n)


@dataclasses.dataclass(frozen=True)
class Difference:
    """One dotted key, ``role.key.key``, in which two arms differ; the role alone where one arm lacks the stage."""

    key: str
    text: str  # for people: the key with both values

    def __str__(self) -> str:
        return self.text


def arm_of(config: WorkflowConfig, name: str) -> list[dict[str, Any]]:
    """The stages of the arm ``name`` of a workflow, inputs first, with the stages they refer to named by role."""
    arm = []
    for stage_name in config.chain(config.arms[name]):
        stage = config.stages[stage_name]
        settings = dump(stage)
        for relation, other in stage.inputs().items():
            field, _, place = relation.partition(".")  # "teacher.math" is a key of the mapping, "tuned.0" of the list
            if place:
                settings[field][int(place) if place.isdigit() else place] = config.stages[other].role
            else:
                settings[field] = config.stages[other].role
        arm.append(settings)
    return arm


def arm_differences(arm_a: Arm, arm_b: Arm) -> list[Difference]:
    """Where two arms differ, role by role: stages that one lacks, values that differ, and another order of stages.

    Stages refer to other stages by role (``opd.teacher: teacher_grpo``), as ``arm_of`` has it, because a stage's name
    may be used in one arm only.
    """
    a, b = _by_role(arm_a), _by_role(arm_b)
    found = []
    for role in [*a, *(role for role in b if role not in a)]:
        if role not in a or role not in b:
            found.append(Difference(role, f"{role}: only {'the second' if role not in a else 'the first'} arm has it"))
            continue
        flat_a, flat_b = _flatten(a[role], role), _flatten(b[role], role)
        for key in [*flat_a, *(key for key in flat_b if key not in flat_a)]:
            left, right = flat_a.get(key, _ABSENT), flat_b.get(key, _ABSENT)
            if left != right:
                found.append(Difference(key, f"{key}: {_show(left)} against {_show(right)}"))
    shared_a, shared_b = [role for role in a if role in b], [role for role in b if role in a]
    if shared_a != shared_b:
        found.append(Difference("order", f"order: {' -> '.join(shared_a)} against {' -> '.join(shared_b)}"))
    return found


def check_matched(contrast: ContrastConfig, arms: Mapping[str, Arm]) -> list[Difference]:
    """The declared differences of a contrast's arms; a ``UserError`` that names every difference beyond these.

    ``contrast.differs`` holds shell patterns over dotted keys (``*`` also crosses dots). Arms that differ in nothing
    are refused too: what they would show is noise.
    """
    title = f"contrast {contrast.a} against {contrast.b} ({contrast.factor})"
    for name in (contrast.a, contrast.b):
        if name not in arms:
            raise UserError(f"{title}: there is no arm '{name}' (arms: {', '.join(arms)})")
    differences = arm_differences(arms[contrast.a], arms[contrast.b])
    if not differences:
        raise UserError(f"{title}: refused, the two arms are configured alike; name two arms that differ")
    unexpected = [
        difference.text
        for difference in differences
        if not any(fnmatch.fnmatchcase(difference.key, pattern) for pattern in contrast.differs)
    ]
    if unexpected:
        raise UserError(
            f"{title}: refused, the arms also differ in {'; '.join(unexpected)}. "
            "Make them equal, or declare the keys in the contrast's `differs`"
        )
    return differences


class _Absent:
    """A key that one side lacks: different from every value, also from null."""


_ABSENT = _Absent()


def _by_role(arm: Arm) -> dict[str, dict[str, Any]]:
    stages: dict[str, dict[str, Any]] = {}
    for stage in arm:
        role = stage.get("role")
        if not isinstance(role, str) or not role:
            raise UserError("a stage of an arm has no role; set stages.<name>.role")
        if role in stages:
            raise UserError(f"two stages of one arm have the role '{role}'; give each a role of its own")
        stages[role] = {key: value for key, value in stage.items() if key != "role"}
    return stages


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
    """Dotted key -> leaf; an empty mapping is a leaf, a list is compared as a whole."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}")
    return flat


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False, default=str)
