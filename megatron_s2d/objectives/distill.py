"""Supervised and distillation objectives: cross-entropy, divergences over the vocabulary, sampled distillation.

methods.md M2, M3, M4, M5. The divergences themselves are made in ``kl``; here they become terms. What distinguishes
OPD, G-OPD and SG-OPD of sampled tokens lies in the advantages (``advantages.py``): they share one objective. The
full-vocabulary form of G-OPD is ``reverse_kl`` to a geometric target, which ``kl`` is given as the teacher.

Left out: which teacher, and the choice of a top-k support (``kl`` warns of a reverse KL on the teacher's tokens only).
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_s2d.columns import TokenColumns
from megatron_s2d.errors import UserError
from megatron_s2d.kl.outputs import sampled_reverse_kl, support_metrics
from megatron_s2d.kl.outputs import DIVERGENCES, TokenOutputs
from megatron_s2d.objectives.mismatch import gap_metrics
from megatron_s2d.objectives.policy import Surrogate, policy_term
from megatron_s2d.objectives.terms import Metric, Objective, Term


def cross_entropy_term() -> Term:
    """-log pi_S of the given tokens, by ``supervised_weight`` (methods.md M2; M5 for the anchor)."""

    def values(outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        return -outputs.log_probs

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        return {"cross_entropy": Metric.over(-outputs.log_probs, active)}

    return Term("supervised", "supervised_weight", frozenset({"log_probs"}), frozenset(), values, metrics)


def divergence_term(kind: str, *, tail: str | None = None, measure_rollouts: bool = False) -> Term:
    """The divergence ``kind`` (a field of ``TokenOutputs``) by ``divergence_weight``; arguments as below."""
    if kind not in DIVERGENCES:
        raise UserError(
            f"divergence {kind!r}: choose one of {', '.join(DIVERGENCES)}; the log-ratio of sampled tokens is not one "
            "(its gradient does not depend on the teacher): use it as the advantage of policy_distillation_objective"
        )
    needs = {kind} if tail is None else {kind, "captured_mass", "student_captured_mass"}
    needs |= {"log_probs"} if measure_rollouts else set()

    def values(outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        return getattr(outputs, kind)

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        divergence = getattr(outputs, kind)
        found = {kind: Metric.over(divergence, active), f"{kind}_max": Metric.over(divergence, active, "max")}
        if tail is not None:
            for name, (total, count) in support_metrics(outputs, active, tail).items():
                found[name] = Metric(total.to(torch.float64), count.to(torch.float64), "mean")
        if measure_rollouts and columns.rollout_log_probs is not None:
            found |= gap_metrics(outputs.log_probs, columns.rollout_log_probs, active)
        return found

    return Term(f"divergence_{kind}", "divergence_weight", frozenset(needs), frozenset(), values, metrics)


def sft_objective() -> Objective:
    """Cross-entropy on given tokens: base training, SFT, teacher-sample SFT and SeqKD (methods.md M2)."""
    return Objective((cross_entropy_term(),))


def divergence_objective(kind: str, *, tail: str | None = None, measure_rollouts: bool = False) -> Objective:
    """A divergence to the teacher's distribution at every token: stage 2a, full or top-k OPD, GKD (methods.md M2, M3).

    kind: one of ``kl.outputs.DIVERGENCES``. tail: the tail rule where the teacher is a top-k support; it adds the
    probability mass that the support captures to the metrics. measure_rollouts: the student sampled the tokens, so
    that the gap between engine and trainer can be measured where its weights are still those that sampled. Raises
    ``UserError`` for the sampled log-ratio.
    """
    term = divergence_term(kind, tail=tail, measure_rollouts=measure_rollouts)
    return Objective((term,), kl_metric=kind, token_kl=lambda outputs, _: getattr(outputs, kind))


def policy_distillation_objective(surrogate: Surrogate = Surrogate(), *, anchor: bool = False) -> Objective:
    """OPD, G-OPD and SG-OPD on sampled tokens: the policy term with their advantages (methods.md M3, M4, M5).

    anchor: adds the cross-entropy on verified teacher responses; alpha(u) and the normaliser are in
    ``supervised_weight``, and those tokens have a policy weight of zero. ``kl`` is the mean of log pi_S - log pi_T over
    the sampled tokens.
    """
    policy = policy_term(surrogate)

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        log_ratio = sampled_reverse_kl(outputs.log_probs.detach(), columns.teacher_log_probs)
        return policy.metrics(outputs, columns, active) | {"teacher_kl": Metric.over(log_ratio, active)}

    scored = dataclasses.replace(policy, columns=policy.columns | {"teacher_log_probs"}, metrics=metrics)
    return Objective(
        (scored, cross_entropy_term()) if anchor else (scored,),
        kl_metric="teacher_kl",
        token_kl=lambda outputs, columns: sampled_reverse_kl(outputs.log_probs, columns.teacher_log_probs),
    )
