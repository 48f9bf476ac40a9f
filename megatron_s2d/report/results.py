"""Results of a run as plain data: arms, contrasts, stages, examples. Filled by the runner, printed by the report.

No torch here. Rewards are between 0 and 1; reports show them in per cent. Statistics are methods.md M6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.data.label_ledger import LedgerEntry
from megatron_s2d.report.evaluation import Evaluation, avg_at_k, pass_at_k
from megatron_s2d.report.paper_table import PaperTable
from megatron_s2d.report.statistics import Estimate, PairedComparison


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """The measured endpoint of an arm, or of a further stage such as a teacher."""

    name: str
    stage: str  # whose final weights were evaluated
    avg: Estimate  # avg@k
    k: int
    pass_at_k: Mapping[int, Estimate]  # k -> estimate
    response_length: float  # mean over all samples, tokens
    truncated_fraction: float  # samples that reached the length limit
    domains: Mapping[str, Estimate]  # avg@k by domain; empty for a single domain
    verdicts: Mapping[str, float] = dataclasses.field(default_factory=dict)  # verdict -> share of the samples

    @classmethod
    def from_evaluation(cls, name: str, stage: str, evaluation: Evaluation) -> ArmResult:
        """Summarise the graded samples of ``stage``."""
        domains = sorted(set(evaluation.domains))
        return cls(
            name=name,
            stage=stage,
            avg=avg_at_k(evaluation),
            k=evaluation.k,
            pass_at_k=pass_at_k(evaluation),
            response_length=float(np.nanmean(evaluation.response_lengths)),
            truncated_fraction=evaluation.truncated_fraction,
            domains={domain: avg_at_k(evaluation.of_domain(domain)) for domain in domains} if len(domains) > 1 else {},
            verdicts=evaluation.verdict_shares,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the entry of ``results.json``."""
        return {
            "avg_at_k": self.avg.mean,
            "std_err": self.avg.std_err,
            "k": self.k,
            "num_problems": self.avg.num_problems,
            "pass_at_k": {str(k): estimate.mean for k, estimate in self.pass_at_k.items()},
            "pass_at_k_std_err": {str(k): estimate.std_err for k, estimate in self.pass_at_k.items()},
            "response_length": self.response_length,
            "truncated_fraction": self.truncated_fraction,
            "domains": {
                name: {"avg_at_k": part.mean, "std_err": part.std_err, "num_problems": part.num_problems}
                for name, part in self.domains.items()
            },
            "stage": self.stage,
        } | ({"verdicts": dict(self.verdicts)} if self.verdicts else {})


def shares_text(verdicts: Mapping[str, float]) -> str:
    """Return ``correct 61.2 %, truncated 30.0 %, no_answer 8.8 %``; a dash without verdicts."""
    return ", ".join(f"{label} {100 * share:.1f} %" for label, share in verdicts.items()) or "-"


_MEASURED_ORDER = {"a>b": "a is better", "a<b": "b is better", "a~b": "not distinguishable from zero on these problems"}
_EXPECTED_ORDER = {"a>b": "a better", "a<b": "b better", "a~b": "no difference"}


@dataclasses.dataclass(frozen=True)
class ContrastResult:
    """A comparison of two matched arms."""

    a: str
    b: str
    factor: str  # what differs, in words
    expected: str  # "a>b", "a<b", "a~b" or "unknown"
    comparison: PairedComparison  # of a minus b
    differences: tuple[str, ...]  # every key in which the arms differ, all of them declared
    by_paper: bool = False  # whether ``expected`` is what a paper found; otherwise the user's expectation

    @property
    def agreement(self) -> str:
        """``agrees``, ``undecided`` or ``against``: the seen order beside the expected one; ``no expectation``."""
        seen = self.comparison.order
        if self.expected == "unknown":
            return "no expectation"
        if self.expected == seen:
            return "agrees"
        return "undecided" if seen == "a~b" else "against"

    @property
    def verdict(self) -> str:
        """Return one clause about a and b that claims no more than the interval supports."""
        seen = _MEASURED_ORDER[self.comparison.order]
        if self.agreement == "no expectation":
            return seen
        if self.agreement == "agrees" and self.expected != "a~b":
            return f"{seen}, as {'the paper found' if self.by_paper else 'you expected'}"
        whose, verb = ("the paper", "the paper found") if self.by_paper else ("your expectation", "you expected")
        against = f"AGAINST {whose}: " if self.agreement == "against" else ""
        return f"{against}{seen}; {verb} {_EXPECTED_ORDER[self.expected]}"

    def as_json(self) -> dict[str, Any]:
        """Return the entry of ``results.json``."""
        comparison = self.comparison
        return {
            "a": self.a,
            "b": self.b,
            "factor": self.factor,
            "difference": comparison.difference,
            "std_err": comparison.std_err,
            "interval": list(comparison.interval),
            "level": comparison.level,
            "p_value": comparison.p_value,
            "num_problems": comparison.num_problems,
            "problems_needed": comparison.problems_needed(),
            "k": comparison.k,
            "expected": self.expected,
            "seen": comparison.order,
            "agreement": self.agreement,
            "matched": True,
            "differences": list(self.differences),
        }


@dataclasses.dataclass(frozen=True)
class RefusedContrast:
    """A contrast that is not shown, because its arms are not matched or one was not measured."""

    a: str
    b: str
    factor: str
    reason: str


@dataclasses.dataclass(frozen=True)
class StageRun:
    """A stage of the run."""

    name: str
    directory: StageDirectory  # config, lineage and metrics are read from here
    seconds: float  # wall-clock, over all its resumes
    reused: bool  # it was finished before this run of the command
    state: Literal["done", "running", "waiting"] = "done"
    total: int = 0  # steps; 0 if not known


@dataclasses.dataclass(frozen=True)
class RolloutExample:
    """One response, shown as text. Everything but ``stage`` and numbers is untrusted."""

    stage: str
    problem_id: str
    prompt: str
    response: str
    answer: str | None  # the label, if any
    reward: float | None
    verifier_label: str
    finish_reason: str
    verifier_detail: str | None = None  # what a reward function or a judge said
    episode: Sequence[Mapping[str, str]] | None = None  # "role" and "text" of each part; None: a single response
    # Of each token "text", and where known "advantage", "log_ratio", "student_log_prob" and "teacher_log_prob".
    tokens: Sequence[Mapping[str, Any]] = ()
    source: str = "training"  # or "evaluation", or a validation set
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class RunResults:
    """Everything that a report shows."""

    name: str
    description: str
    seed: int
    wall_seconds: float  # of this run of the command
    arms: tuple[ArmResult, ...]
    contrasts: tuple[ContrastResult, ...]
    refused: tuple[RefusedContrast, ...] = ()
    also_evaluated: tuple[ArmResult, ...] = ()
    stages: tuple[StageRun, ...] = ()
    ledger: tuple[LedgerEntry, ...] = ()
    rollouts: tuple[RolloutExample, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # machine, versions, command
    warnings: tuple[str, ...] = ()  # such as a pass-rate gate that failed
    table: PaperTable | None = None  # the arms in a paper's form
    live: bool = False  # the run has not ended
    num_samples: int = 0  # that the run saved; ``rollouts`` may be a part of them

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``results.json``."""
        return {
            "wall_seconds": self.wall_seconds,
            "arms": {arm.name: arm.as_json() for arm in self.arms},
            "contrasts": [contrast.as_json() for contrast in self.contrasts],
        } | ({"table": self.table.as_json()} if self.table is not None else {})
