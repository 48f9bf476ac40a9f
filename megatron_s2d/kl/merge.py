"""The plan of one pass, and the merge of the shards' statistics to per-token values; shared by all backends.

p: student with logits z, q: teacher with logits y, both after temperature.

Statistics per token and shard, with m = max z at column k, n = max y at column j:
    ta = sum over v != k of exp(z - m),  tb = sum over v != j of exp(y - n)
    e = sum exp(z - m) (z - m),  w = sum exp(y - n) ((y - n) - (z - m)),  u = sum exp(z - m) ((z - m) - (y - n))
A maximum's own term is left out of ta and tb, because log(1 + ta) keeps the digits of ta that log of the whole sum
loses: a confident student has ta near 1e-5, and its divergence is made of those digits. Merging needs no second pass
over columns.

Shapes: c tokens of the chunk, tp shards.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch

from megatron_s2d.kl.jsd import MIXTURES


@dataclasses.dataclass(frozen=True)
class Plan:
    """Outputs (names of ``TokenOutputs`` fields) and statistics of one pass; ``beta`` belongs to mixtures."""

    outputs: tuple[str, ...]
    has_teacher: bool
    beta: float | None = None

    @property
    def mixture(self) -> str | None:
        """The requested divergence that needs a second collective, if any."""
        return next((name for name in self.outputs if name in MIXTURES), None)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the statistics that are exchanged."""
        wanted = {
            "m": True, "ta": True, "e": "entropy" in self.outputs, "n": self.has_teacher, "tb": self.has_teacher,
            "w": "forward_kl" in self.outputs, "u": "reverse_kl" in self.outputs,
            "y_at_k": self.mixture is not None, "target": "log_probs" in self.outputs,
        }  # fmt: skip
        return tuple(name for name, needed in wanted.items() if needed)


@dataclasses.dataclass
class Merged:
    """Per-token values [c], identical on all ranks, from which every column's gradient follows.

    log p = (z - max_z) - log_sum_z and log q = (y - max_y) - log_sum_y; the sums are close to 1 for confident tokens.
    """

    max_z: torch.Tensor
    log_sum_z: torch.Tensor
    max_y: torch.Tensor | None = None
    log_sum_y: torch.Tensor | None = None
    # log p - log q = ((z - y) - gap) - log_sum_ratio, in this order: exact at a common most likely token
    gap: torch.Tensor | None = None  # max_z - max_y
    log_sum_ratio: torch.Tensor | None = None  # log_sum_z - log_sum_y
    log_q_at_k: torch.Tensor | None = None  # log q at the student's most likely token
    difference_at_k: torch.Tensor | None = None  # log q - log p there
    expected_slope: torch.Tensor | None = None  # of the mixture: sum of p (c - c at k)
    outputs: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Self:
        """Return the per-token constants in the dtype of the columns, without the outputs."""
        fields: dict[str, Any] = {
            name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return type(self)(**fields)


def empty_statistics(z: torch.Tensor, plan: Plan) -> torch.Tensor:
    stats = z.new_zeros(z.shape[0], len(plan.columns), dtype=torch.float64)
    for index, name in enumerate(plan.columns):
        if name in ("m", "n"):
            stats[:, index] = -torch.inf
    return stats


def merge(gathered: torch.Tensor, plan: Plan) -> Merged:
    """Merge the statistics of all shards [tp, c, columns], in rank order so that every rank gets the same bits.

    float64: a few numbers per token, whose differences are the divergence.
    """
    part = dict(zip(plan.columns, gathered.unbind(2), strict=True))
    max_z, winner, shift, scale, count, residual = combine_maxima(part["m"], part["ta"])
    log_a = torch.log1p(residual)
    merged = Merged(max_z, log_a)
    out = merged.outputs
    if "e" in part:
        out["entropy"] = log_a - weighted_sum(scale, part["e"] + count * shift) / (1 + residual)
    if "target" in part:
        out["log_probs"] = (part["target"].sum(0) - max_z) - log_a
    if plan.has_teacher:
        max_y, _, _, scale_y, count_y, residual_y = combine_maxima(part["n"], part["tb"])
        log_b = torch.log1p(residual_y)
        merged.max_y, merged.log_sum_y = max_y, log_b
        # log_a - log_b, without rounding either logarithm first
        ratio = torch.log1p((residual - residual_y) / (1 + residual_y))
        merged.gap, merged.log_sum_ratio = max_z - max_y, ratio
        if "w" in part or "u" in part:
            between = (part["n"] - part["m"]) - (max_y - max_z)  # of a shard's maxima, against the global ones
            between.masked_fill_((part["n"] == -torch.inf) | (part["m"] == -torch.inf), 0.0)
        if "w" in part:
            out["forward_kl"] = weighted_sum(scale_y, part["w"] + count_y * between) / (1 + residual_y) + ratio
        if "u" in part:
            out["reverse_kl"] = weighted_sum(scale, part["u"] - count * between) / (1 + residual) - ratio
        if "y_at_k" in part:
            y_at_k = part["y_at_k"].gather(0, winner).squeeze(0)
            merged.log_q_at_k = (y_at_k - max_y) - log_b
            merged.difference_at_k = (y_at_k - max_y) + ratio
    return merged


def combine_maxima(maxima: torch.Tensor, residuals: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the global maximum M, its rank, m - M, exp(m - M), 1 + residual, and the global sum without M's own term.

    maxima, residuals: m and ta (or n and tb) of all shards, [tp, c].
    """
    if maxima.shape[0] == 1:
        zero = torch.zeros_like(maxima)
        return maxima[0], zero.long(), zero, zero + 1, 1 + residuals, residuals[0]
    maximum, winner = maxima.max(dim=0, keepdim=True)
    scale = (maxima - maximum).exp()
    # An empty shard has maximum -inf: its scale is 0, and its distance must not turn 0 * inf into NaN.
    shift = (maxima - maximum).masked_fill(maxima == -torch.inf, 0.0)
    count = 1 + residuals
    residual = (scale * count).scatter_(0, winner, residuals.gather(0, winner)).sum(0)
    return maximum.squeeze(0), winner, shift, scale, count, residual


def weighted_sum(scale: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (scale * value).masked_fill_(scale == 0, 0.0).sum(0)
