"""Policy loss: clipped surrogate, penalty to a reference, and the correction of the engine's mismatch (methods.md M1).

All arguments are per sampled token, [C], natural logarithms at the sampling temperature. A ratio is never clamped
beyond its clip range: one that overflows makes the loss infinite, and the training loop refuses that.

Left out: how advantages come about (``advantages.py``), and sums over tokens (``terms.py``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch

from megatron_s2d.columns import TokenColumns, refuse_sampled_k1
from megatron_s2d.errors import UserError
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.objectives.mismatch import gap_metrics, k3
from megatron_s2d.objectives.terms import Metric, Objective, Term

RolloutCorrectionMode = Literal["off", "tis", "mask"]


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """Settings of the policy loss. Defaults: S2D table 8."""

    clip_ratio_low: float = 0.2  # ratios below 1 - clip_ratio_low are cut where the advantage is negative
    clip_ratio_high: float = (
        0.2  # ratios above 1 + clip_ratio_high are cut where it is positive; 0.28 is DAPO's clip-higher
    )
    clip_ratio_c: float | None = None  # largest ratio where the advantage is negative, above 1; None: unbounded
    rollout_correction: RolloutCorrectionMode = "off"  # correction of the gap between engine and trainer
    rollout_correction_cap: float = 5.0  # C: larger importance weights are truncated (tis) or set to zero (mask)
    on_policy: bool = False  # the weights before the update are the current ones: old_log_probs are not needed

    def __post_init__(self) -> None:
        if not (0 < self.clip_ratio_low < 1 and 0 < self.clip_ratio_high < math.inf):
            raise UserError(
                f"clip_ratio_low {self.clip_ratio_low}, clip_ratio_high {self.clip_ratio_high}: give 0 < clip_ratio_low < 1 and clip_ratio_high > 0"
            )
        if self.clip_ratio_c is not None and not 1 < self.clip_ratio_c < math.inf:
            raise UserError(f"clip_ratio_c {self.clip_ratio_c}: give a number above 1, or leave it out")
        if self.rollout_correction not in ("off", "tis", "mask"):
            raise UserError(f"rollout_correction {self.rollout_correction!r}: choose off, tis or mask")
        if not 0 < self.rollout_correction_cap < math.inf:
            raise UserError(f"rollout_correction_cap {self.rollout_correction_cap}: give a positive number")

    def old_log_probs(self, log_probs: torch.Tensor, columns: TokenColumns) -> torch.Tensor:
        """Log-probabilities under the weights before the update."""
        return log_probs.detach() if self.on_policy else columns.old_log_probs


@dataclasses.dataclass(frozen=True, eq=False)
class ClipRegions:
    """Where the surrogate is flat: bool [C] each, disjoint."""

    low: torch.Tensor  # negative advantage, ratio below 1 - clip_ratio_low
    high: torch.Tensor  # positive advantage, ratio above 1 + clip_ratio_high
    dual: torch.Tensor  # negative advantage, ratio above clip_ratio_c


def clip_regions(log_ratio: torch.Tensor, advantages: torch.Tensor, settings: Surrogate) -> ClipRegions:
    """The regions for log ratios [C] and advantages [C]."""
    positive, negative = advantages > 0, advantages < 0
    dual = math.inf if settings.clip_ratio_c is None else math.log(settings.clip_ratio_c)
    return ClipRegions(
        low=negative & (log_ratio < math.log1p(-settings.clip_ratio_low)),
        high=positive & (log_ratio > math.log1p(settings.clip_ratio_high)),
        dual=negative & (log_ratio > dual),
    )


def clipped_surrogate(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, settings: Surrogate
) -> torch.Tensor:
    """-min(ratio A, clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high) A) [C], ratio = pi_S / pi_old (methods.md M1).

    With ``clip_ratio_c`` c the value for a negative advantage is at most -c A. Differentiable in ``log_probs``; where the
    surrogate is flat the gradient is 0. Advantages that carry a gradient are refused.
    """
    refuse_sampled_k1(advantages, "advantages")
    log_ratio = log_probs - old_log_probs.detach()
    regions = clip_regions(log_ratio.detach(), advantages, settings)
    flat = regions.low | regions.high | regions.dual | (advantages == 0)
    # The exponential of what is cut away is not formed: an infinite value times a zero slope would be NaN.
    ratio = torch.exp(torch.where(flat, 0.0, log_ratio))
    ratio = torch.where(regions.low, 1.0 - settings.clip_ratio_low, ratio)
    ratio = torch.where(regions.high, 1.0 + settings.clip_ratio_high, ratio)
    if settings.clip_ratio_c is not None:
        ratio = torch.where(regions.dual, settings.clip_ratio_c, ratio)
    return -advantages * ratio


def importance_weight(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, *, mode: RolloutCorrectionMode, cap: float
) -> torch.Tensor:
    """min(pi_old / pi_rollout, cap) per token [C], detached (methods.md M1).

    Both probabilities are of the same weights, by the trainer and by the engine. truncate: larger weights become
    ``cap``. mask: they become 0. off: all are 1.
    """
    if mode == "off":
        return torch.ones_like(old_log_probs)
    ratio = torch.exp((old_log_probs - rollout_log_probs).detach())
    return ratio.clamp(max=cap) if mode == "tis" else torch.where(ratio > cap, 0.0, ratio)


def policy_term(settings: Surrogate) -> Term:
    """Clipped surrogate times importance weight, by ``policy_weight``."""
    required = {"advantages"}
    if not settings.on_policy:
        required.add("old_log_probs")
    if settings.rollout_correction != "off":
        required.add("rollout_log_probs")

    def values(outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        old = settings.old_log_probs(outputs.log_probs, columns)
        loss = clipped_surrogate(outputs.log_probs, old, columns.advantages, settings)
        if settings.rollout_correction == "off":
            return loss
        weight = importance_weight(
            old, columns.rollout_log_probs, mode=settings.rollout_correction, cap=settings.rollout_correction_cap
        )
        return weight * loss

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        old = settings.old_log_probs(outputs.log_probs, columns)
        found = surrogate_metrics(outputs.log_probs - old, columns.advantages, active, settings)
        if columns.rollout_log_probs is not None:
            found |= mismatch_metrics(old, columns.rollout_log_probs, active, settings)
        return found

    return Term("policy", "policy_weight", frozenset({"log_probs"}), frozenset(required), values, metrics)


def surrogate_metrics(
    log_ratio: torch.Tensor, advantages: torch.Tensor, active: torch.Tensor, settings: Surrogate
) -> dict[str, Metric]:
    """Ratios, fractions of tokens without gradient, and approx_kl, the k3 estimate of KL(pi_old || pi_S)."""
    ratio, regions = torch.exp(log_ratio), clip_regions(log_ratio, advantages, settings)
    found = {
        "ratio_mean": Metric.over(ratio, active),
        "ratio_max": Metric.over(ratio, active, "max"),
        "ratio_min": Metric.over(ratio, active, "min"),
        "clip_fraction_low": Metric.over(regions.low, active),
        "clip_fraction_high": Metric.over(regions.high, active),
        "approx_kl": Metric.over(k3(log_ratio), active),
        "advantage_mean": Metric.over(advantages, active),
        "advantage_abs_mean": Metric.over(advantages.abs(), active),
    }
    if settings.clip_ratio_c is not None:
        found["clip_fraction_dual"] = Metric.over(regions.dual, active)
    return found


def mismatch_metrics(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, active: torch.Tensor, settings: Surrogate
) -> dict[str, Metric]:
    """The gap between engine and trainer at the same weights, whatever is done about it (``mismatch.py``).

    importance_ratio: pi_old / pi_rollout before any cut. importance_clipped_fraction: of tokens beyond the cap.
    """
    ratio = torch.exp(old_log_probs - rollout_log_probs)
    weight = importance_weight(
        old_log_probs, rollout_log_probs, mode=settings.rollout_correction, cap=settings.rollout_correction_cap
    )
    return {
        "importance_ratio_mean": Metric.over(ratio, active),
        "importance_ratio_max": Metric.over(ratio, active, "max"),
        "importance_clipped_fraction": Metric.over(ratio > settings.rollout_correction_cap, active),
        "importance_weight_mean": Metric.over(weight, active),
    } | gap_metrics(old_log_probs, rollout_log_probs, active)


def reference_term(kl_loss_coef: float) -> Term:
    """``kl_loss_coef`` times the k3 estimate of KL(pi_S || pi_ref), by ``policy_weight`` (methods.md M1)."""

    def values(outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        return k3(columns.reference_log_probs - outputs.log_probs)

    def metrics(outputs: TokenOutputs, columns: TokenColumns, active: torch.Tensor) -> dict[str, Metric]:
        return {"reference_kl": Metric.over(values(outputs, columns), active)}

    return Term(
        "reference",
        "policy_weight",
        frozenset({"log_probs"}),
        frozenset({"reference_log_probs"}),
        values,
        metrics,
        kl_loss_coef,
    )


def grpo_objective(surrogate: Surrogate = Surrogate(), *, kl_loss_coef: float = 5e-4) -> Objective:
    """GRPO (stages 1 and 3): the policy term with a penalty to the reference; a coefficient of 0 needs no reference."""
    if not (math.isfinite(kl_loss_coef) and kl_loss_coef >= 0):
        raise UserError(f"kl_loss_coef {kl_loss_coef}: give a number of at least 0")
    if kl_loss_coef == 0:
        return Objective((policy_term(surrogate),))
    return Objective(
        (policy_term(surrogate), reference_term(kl_loss_coef)),
        kl_metric="reference_kl",
        token_kl=lambda outputs, columns: k3(columns.reference_log_probs - outputs.log_probs),
    )
