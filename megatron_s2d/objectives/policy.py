"""Policy losses (GRPO, GSPO, CISPO), penalty to a reference, entropy bonus, mismatch of engine and trainer (M1).

All arguments are per sampled token, natural logarithms at the sampling temperature. A ratio is never clamped beyond
its clip range: a ratio that overflows makes the loss infinite, and the training loop raises an error. Settings are
validated by ``config``. The formulas are in methods.md M1.

Mismatch: two forward passes of the same weights, by trainer and engine, should give the same numbers. With p = log pi
of a sampled token under the trainer and r the engine's, before top-k and top-p, it is measured as |p - r|, and as
exp(p - r) - (p - r) - 1, the k3 estimate of KL(pi_engine || pi_trainer).

Shapes: t tokens of a micro-batch, or of a chunk of one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch

from megatron_s2d.columns import TokenColumns, refuse_sampled_k1
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.objectives.terms import Metric, Objective, Term, in_bins

RolloutCorrectionMode = Literal["off", "tis", "mask"]
PolicyLoss = Literal["grpo", "gspo", "cispo"]

# Column of GSPO: log of a response's ratio at each of its tokens, from a pass over the output layer before the loss.
SEQUENCE_LOG_RATIOS = "sequence_log_ratios"

MISMATCH_HISTOGRAM = "mismatch/hist/"  # share of tokens with |p - r| of at least this edge, and below the next one
# Half a decade apart, rounded; float32 rounding is at the low end, bfloat16 in the middle, other weights at the top.
MISMATCH_EDGES = (0.0, *(float(f"{digit}e{power}") for power in range(-7, 1) for digit in (1, 3)), 10.0)


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """Settings of the policy loss. Defaults: S2D table 8."""

    # grpo, gspo: negative advantages get no gradient for ratios below 1 - clip_ratio_low, positive ones none above
    # 1 + clip_ratio_high. cispo: the weights' range, whatever the advantage; clip_ratio_low 1 sets no lower bound.
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float | None = None  # negative advantages: largest ratio, above 1; None: unbounded
    rollout_correction: RolloutCorrectionMode = "off"  # importance weight of trainer against engine
    rollout_correction_cap: float = 5.0  # larger importance weights are truncated (tis) or set to zero (mask)
    on_policy: bool = False  # the current weights sampled the tokens: old_log_probs are not needed
    # grpo: the ratio of every token is clipped; gspo: that of the response; cispo: a detached weight of every token.
    policy_loss: PolicyLoss = "grpo"

    def old_log_probs(self, log_probs: torch.Tensor, columns: TokenColumns) -> torch.Tensor:
        """Return log-probabilities [t] under the weights before the update."""
        return log_probs.detach() if self.on_policy else columns.get("old_log_probs")

    def log_ratio(self, log_probs: torch.Tensor, columns: TokenColumns) -> torch.Tensor:
        """Return log ratios [t], differentiable in ``log_probs``: log pi_S / pi_old of the token.

        gspo: their mean over the response, with the slope of the token's own: summed over the response's tokens by
        weights 1 / length, the gradient is that of the response's ratio (GSPO-token, arXiv 2507.18071, eq. 14).
        """
        if self.policy_loss == "gspo" and not self.on_policy:
            return columns.get(SEQUENCE_LOG_RATIOS) + (log_probs - log_probs.detach())
        return log_probs - self.old_log_probs(log_probs, columns)

    @property
    def columns(self) -> frozenset[str]:
        """Columns that the loss needs, without its weight."""
        columns = {"advantages"}
        if not self.on_policy:
            columns |= {"old_log_probs"} | ({SEQUENCE_LOG_RATIOS} if self.policy_loss == "gspo" else set())
        if self.rollout_correction != "off":
            columns.add("rollout_log_probs")
        return frozenset(columns)


DEFAULT_SURROGATE = Surrogate()


@dataclasses.dataclass(frozen=True, eq=False)
class ClipRegions:
    """Where a ratio is clipped, bool [t] each, disjoint. There the surrogate is flat, but not CISPO's loss."""

    low: torch.Tensor  # negative advantage (cispo: any), ratio below 1 - clip_ratio_low
    high: torch.Tensor  # positive advantage (cispo: any), ratio above 1 + clip_ratio_high
    dual: torch.Tensor  # negative advantage, ratio above clip_ratio_c


def clip_regions(log_ratio: torch.Tensor, advantages: torch.Tensor, settings: Surrogate) -> ClipRegions:
    """Return the clip regions of log ratios [t] and advantages [t]."""
    positive, negative = advantages > 0, advantages < 0
    if settings.policy_loss == "cispo":
        positive = negative = torch.ones_like(positive)
    low = -math.inf if settings.clip_ratio_low >= 1 else math.log1p(-settings.clip_ratio_low)
    dual = math.inf if settings.clip_ratio_c is None else math.log(settings.clip_ratio_c)
    return ClipRegions(
        low=negative & (log_ratio < low),
        high=positive & (log_ratio > math.log1p(settings.clip_ratio_high)),
        dual=negative & (log_ratio > dual),
    )


def clipped_surrogate(log_ratio: torch.Tensor, advantages: torch.Tensor, settings: Surrogate) -> torch.Tensor:
    """Return -min(ratio A, clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high) A) [t], ratio = pi_S / pi_old (M1).

    With ``clip_ratio_c`` c the value for a negative advantage is at most -c A. Differentiable in ``log_ratio``; where
    the surrogate is flat the gradient is 0. Raises ``UserError`` for advantages that carry a gradient.
    """
    refuse_sampled_k1(advantages, "advantages")
    regions = clip_regions(log_ratio.detach(), advantages, settings)
    flat = regions.low | regions.high | regions.dual | (advantages == 0)
    # Clipped ratios are not exponentiated: an infinite value times a zero slope would be NaN.
    ratio = torch.exp(torch.where(flat, 0.0, log_ratio))
    ratio = torch.where(regions.low, 1.0 - settings.clip_ratio_low, ratio)
    ratio = torch.where(regions.high, 1.0 + settings.clip_ratio_high, ratio)
    if settings.clip_ratio_c is not None:
        ratio = torch.where(regions.dual, settings.clip_ratio_c, ratio)
    return -advantages * ratio


def cispo_loss(
    log_probs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor, settings: Surrogate
) -> torch.Tensor:
    """Return -clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high) A log pi_S [t], the ratio being a constant (M1).

    Every token has a gradient, also one whose ratio is clipped. Differentiable in ``log_probs`` only. Raises
    ``UserError`` for advantages that carry a gradient. Source: CISPO, arXiv 2506.13585, eq. 4 and 5.
    """
    refuse_sampled_k1(advantages, "advantages")
    highest = math.log1p(settings.clip_ratio_high)
    weight = torch.exp(log_ratio.detach().clamp(max=highest)).clamp(min=1.0 - settings.clip_ratio_low)
    return -weight * advantages * log_probs


def importance_weight(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, settings: Surrogate
) -> torch.Tensor:
    """Return the importance weight pi_old / pi_rollout per token [t], detached (methods.md M1).

    Both probabilities are of the same weights, by the trainer and by the engine. tis: weights above ``cap`` become
    ``cap``. mask: they become 0. off: all are 1.
    """
    mode, cap = settings.rollout_correction, settings.rollout_correction_cap
    if mode == "off":
        return torch.ones_like(old_log_probs)
    ratio = torch.exp((old_log_probs - rollout_log_probs).detach())
    return ratio.clamp(max=cap) if mode == "tis" else torch.where(ratio > cap, 0.0, ratio)


def policy_term(settings: Surrogate) -> Term:
    """Return the policy loss times the importance weight as a term, by ``policy_weight``."""

    def values(outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        log_probs, advantages = outputs.require("log_probs"), columns.get("advantages")
        log_ratio = settings.log_ratio(log_probs, columns)
        if settings.policy_loss == "cispo":
            loss = cispo_loss(log_probs, log_ratio, advantages, settings)
        else:
            loss = clipped_surrogate(log_ratio, advantages, settings)
        if settings.rollout_correction == "off":
            return loss
        old = settings.old_log_probs(log_probs, columns)
        return importance_weight(old, columns.get("rollout_log_probs"), settings) * loss

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        log_probs = outputs.require("log_probs")
        old = settings.old_log_probs(log_probs, columns)
        log_ratio = settings.log_ratio(log_probs, columns)
        result = surrogate_metrics(log_ratio, columns.get("advantages"), active, settings)
        result["approx_kl"] = Metric.over(k3(log_probs - old), active)
        if columns.rollout_log_probs is not None:
            result |= importance_metrics(old, columns.rollout_log_probs, active, settings)
            result |= mismatch_metrics(old, columns.rollout_log_probs, active)
        return result

    return Term("policy", "policy_weight", frozenset({"log_probs"}), settings.columns, values, metrics)


def surrogate_metrics(
    log_ratio: torch.Tensor, advantages: torch.Tensor, active: torch.Tensor, settings: Surrogate
) -> dict[str, Metric]:
    """Return ratios (gspo: of the responses, token by token), clipped fractions of tokens, and advantages."""
    ratio, regions = torch.exp(log_ratio), clip_regions(log_ratio, advantages, settings)
    result = {
        "ratio_mean": Metric.over(ratio, active),
        "ratio_max": Metric.over(ratio, active, "max"),
        "ratio_min": Metric.over(ratio, active, "min"),
        "clip_fraction_low": Metric.over(regions.low, active),
        "clip_fraction_high": Metric.over(regions.high, active),
        "advantage_mean": Metric.over(advantages, active),
        "advantage_abs_mean": Metric.over(advantages.abs(), active),
    }
    if settings.clip_ratio_c is not None:
        result["clip_fraction_dual"] = Metric.over(regions.dual, active)
    return result


def importance_metrics(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, active: torch.Tensor, settings: Surrogate
) -> dict[str, Metric]:
    """Return importance_ratio (pi_old / pi_rollout before correction), importance_weight, and the clipped fraction."""
    ratio = torch.exp(old_log_probs - rollout_log_probs)
    weight = importance_weight(old_log_probs, rollout_log_probs, settings)
    return {
        "importance_ratio_mean": Metric.over(ratio, active),
        "importance_ratio_max": Metric.over(ratio, active, "max"),
        "importance_clipped_fraction": Metric.over(ratio > settings.rollout_correction_cap, active),
        "importance_weight_mean": Metric.over(weight, active),
    }


def mismatch_metrics(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, active: torch.Tensor
) -> dict[str, Metric]:
    """Return mean, maximum and histogram of the mismatch in nats, and mismatch/k3_kl, over ``active`` tokens [t].

    log_probs: [t] of the trainer under the weights that sampled. rollout_log_probs: [t] of the engine, or NaN for
    tokens that the engine did not sample (a teacher or a data set wrote them), which are left out.
    """
    active = active & ~rollout_log_probs.isnan()
    log_ratio = torch.where(active, log_probs.detach() - rollout_log_probs, 0.0)
    difference = log_ratio.abs()
    counts = (in_bins(difference.double(), MISMATCH_EDGES) & active).sum(1, dtype=torch.float64)
    total = active.sum(dtype=torch.float64)
    histogram = {
        f"{MISMATCH_HISTOGRAM}{edge:g}": Metric(count, total, "mean", omit="zero")
        for edge, count in zip(MISMATCH_EDGES, counts, strict=True)
    }
    return {
        "mismatch/log_prob_abs_diff_mean": Metric.over(difference, active),
        "mismatch/log_prob_abs_diff_max": Metric.over(difference, active, "max"),
        "mismatch/k3_kl": Metric.over(k3(log_ratio), active),
    } | histogram


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Return exp(d) - d - 1 [t], d = ``log_ratio`` = log q - log p at tokens sampled from p: an estimate of KL(p || q).

    Unbiased, never negative; expm1 keeps small values accurate. As a loss on log p its expected gradient on policy is
    that of KL(q || p), the mass-covering direction; it is the usual GRPO penalty all the same (methods.md M1).
    """
    return torch.expm1(log_ratio) - log_ratio


def reference_term(kl_loss_coef: float) -> Term:
    """Return ``kl_loss_coef`` times the k3 estimate of KL(pi_S || pi_ref) as a term, by ``policy_weight`` (M1)."""

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        return {"reference_kl": Metric.over(reference_kl(outputs, columns), active)}

    return Term(
        "reference",
        "policy_weight",
        frozenset({"log_probs"}),
        frozenset({"reference_log_probs"}),
        reference_kl,
        metrics,
        kl_loss_coef,
    )


def reference_kl(outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
    """Return the k3 estimate of KL(pi_S || pi_ref) per token [t]."""
    return k3(columns.get("reference_log_probs") - outputs.require("log_probs"))


def entropy_term(entropy_coeff: float) -> Term:
    """Return -``entropy_coeff`` times the entropy over the whole vocabulary as a term, by ``policy_weight`` (M1)."""

    def values(outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        return outputs.require("entropy")

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        return {}  # every objective reports the entropy

    return Term("entropy", "policy_weight", frozenset({"entropy"}), frozenset(), values, metrics, -entropy_coeff)


def grpo_objective(
    surrogate: Surrogate = DEFAULT_SURROGATE, *, kl_loss_coef: float = 5e-4, entropy_coeff: float = 0.0
) -> Objective:
    """Return the objective: policy term, penalty to the reference, entropy bonus; without the terms whose factor is 0.

    approx_kl is the k3 estimate of KL(pi_old || pi_S) from the tokens' own ratios, whatever the policy loss.
    """
    terms: tuple[Term, ...] = (policy_term(surrogate),)
    if entropy_coeff != 0:
        terms += (entropy_term(entropy_coeff),)
    if kl_loss_coef == 0:
        return Objective(terms)
    return Objective((*terms, reference_term(kl_loss_coef)), kl_metric="reference_kl", token_kl=reference_kl)
