"""Supervised and distillation objectives: cross-entropy, divergences over the vocabulary, sampled distillation.

methods.md M2, M3, M4, M5. ``kl`` computes the divergences; here they become terms of a loss. OPD, G-OPD and SG-OPD of
sampled tokens differ in their advantages only (``advantages.py``), so they share one objective. The full-vocabulary
form of G-OPD is ``reverse_kl`` with a ``GeometricTarget`` as teacher.

Shapes: t tokens of a micro-batch, or of a chunk of one.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_s2d.columns import TokenColumns
from megatron_s2d.errors import UserError
from megatron_s2d.kl.outputs import DIVERGENCES, TokenOutputs, sampled_reverse_kl, support_metrics
from megatron_s2d.objectives.policy import (
    DEFAULT_SURROGATE,
    Surrogate,
    entropy_term,
    mismatch_metrics,
    policy_term,
    reference_term,
)
from megatron_s2d.objectives.terms import Metric, Objective, Term


def cross_entropy_term() -> Term:
    """Return the term -log pi_S of target tokens, weighted by ``supervised_weight`` (methods.md M2; anchor: M5)."""

    def values(outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        return -outputs.require("log_probs")

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        return {"cross_entropy": Metric.over(-outputs.require("log_probs"), active)}

    return Term("supervised", "supervised_weight", frozenset({"log_probs"}), frozenset(), values, metrics)


def divergence_term(kind: str, *, tail: str | None = None, measure_rollouts: bool = False) -> Term:
    """Return the divergence ``kind`` as a term, by ``divergence_weight``; arguments as in ``divergence_objective``."""
    if kind not in DIVERGENCES:
        raise UserError(
            f"divergence {kind!r}: choose one of {', '.join(DIVERGENCES)}; the log-ratio of sampled tokens is not one "
            "(its gradient does not depend on the teacher): use it as the advantage of policy_distillation_objective"
        )
    needs = {kind} if tail is None else {kind, "captured_mass", "student_captured_mass"}
    if measure_rollouts:
        needs |= {"log_probs"} if tail is not None else {"log_probs", "teacher_log_probs"}

    def values(outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        return outputs.require(kind)

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        divergence = outputs.require(kind)
        result = {kind: Metric.over(divergence, active), f"{kind}_max": Metric.over(divergence, active, "max")}
        if tail is not None:
            for name, (total, count) in support_metrics(outputs, active, tail).items():
                result[name] = Metric(total.to(torch.float64), count.to(torch.float64), "mean")
        if measure_rollouts and columns.rollout_log_probs is not None:
            result |= mismatch_metrics(outputs.require("log_probs"), columns.rollout_log_probs, active)
        return result

    return Term(f"divergence_{kind}", "divergence_weight", frozenset(needs), frozenset(), values, metrics)


def sft_objective() -> Objective:
    """Return the cross-entropy objective of base training, SFT, teacher-sample SFT and SeqKD (methods.md M2)."""
    return Objective((cross_entropy_term(),))


def divergence_objective(kind: str, *, tail: str | None = None, measure_rollouts: bool = False) -> Objective:
    """Return a divergence to the teacher's distribution at every token: stage 2a, full or top-k OPD, GKD (M2, M3).

    kind: one of ``kl.outputs.DIVERGENCES``. tail: the tail rule of a top-k teacher; adds the probability mass on the
    support to the metrics. measure_rollouts: the student sampled the tokens, so the mismatch between engine and trainer
    is measured while the weights are those that sampled. Raises ``UserError`` for the sampled log-ratio.
    """
    term = divergence_term(kind, tail=tail, measure_rollouts=measure_rollouts)
    return Objective((term,), kl_metric=kind, token_kl=lambda outputs, _: outputs.require(kind))


def policy_distillation_objective(
    surrogate: Surrogate = DEFAULT_SURROGATE,
    *,
    entropy_coeff: float = 0.0,
    kl_loss_coef: float = 0.0,
    anchor: bool = False,
) -> Objective:
    """Return OPD, G-OPD or SG-OPD on sampled tokens: the policy term with their advantages (methods.md M3, M4, M5).

    Also GRPO with a teacher's term in its advantages. entropy_coeff, kl_loss_coef: as in ``grpo_objective``.
    anchor: add the cross-entropy on verified teacher responses; ``supervised_weight`` contains alpha(u) and the
    normaliser, and those tokens have a policy weight of zero. The metric ``kl`` is the mean of log pi_S - log pi_T over
    the sampled tokens.
    """
    policy = policy_term(surrogate)

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        log_ratio = sampled_reverse_kl(outputs.require("log_probs").detach(), columns.get("teacher_log_probs"))
        return policy.metrics(outputs, columns, active) | {"teacher_kl": Metric.over(log_ratio, active)}

    scored = dataclasses.replace(policy, columns=policy.columns | {"teacher_log_probs"}, metrics=metrics)
    terms: tuple[Term, ...] = (scored,)
    if entropy_coeff != 0:
        terms += (entropy_term(entropy_coeff),)
    if kl_loss_coef != 0:
        terms += (reference_term(kl_loss_coef),)
    return Objective(
        (*terms, cross_entropy_term()) if anchor else terms,
        kl_metric="teacher_kl",
        token_kl=lambda outputs, columns: sampled_reverse_kl(
            outputs.require("log_probs"), columns.get("teacher_log_probs")
        ),
    )
