"""Divergences to a teacher known on a few tokens per position only (top-k): shard statistics, merge and gradient.

K is the support (the ids whose teacher log-probabilities are stored), q_K and p_K the teacher's and student's mass on
it, q_bar and p_bar the mass outside. ``tail`` selects what is done with the mass outside (methods.md M2):
    bucket       one more outcome with mass q_bar against p_bar: a lower bound of the full divergence, monotone in K
    renormalise  both sides conditioned on K; student mass outside K gets no loss and no gradient
    truncate     the sum over K alone; not a divergence (it may be negative)
Not supported: mixtures (jsd, skew) on a support.

Shapes: c tokens of the chunk, v_tp local vocabulary columns, k top-k entries, tp shards.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_s2d.kl.merge import Merged, Plan, combine_maxima, weighted_sum
from megatron_s2d.kl.torch_backend import block_rows, finite_max, row_max, row_sum

TAILS = ("bucket", "renormalise", "truncate")


@dataclasses.dataclass
class SupportChunk:
    """Support of a chunk of tokens on one shard, in the dtype of the computation."""

    local: torch.Tensor  # [c, k] int64 local column, 0 for ids of other shards
    owned: torch.Tensor  # [c, k] bool: the id is one of this shard's columns
    log_q: torch.Tensor  # [c, k] teacher log-probabilities
    log_tail: torch.Tensor  # [c] log of the teacher's mass outside the support, -inf for none
    tail: str


def support_columns(plan: Plan) -> tuple[str, ...]:
    """Return the names of the exchanged statistics: those of the student, and five sums on and off the support."""
    student = [name for name in plan.columns if name in ("m", "ta", "e", "target")]
    return (*student, "on", "off", "q", "q_cross", "p_cross")


def support_statistics(
    z: torch.Tensor, support: SupportChunk, target: torch.Tensor | None, owned: torch.Tensor | None, plan: Plan
) -> torch.Tensor:
    """Return the statistics of a shard, [c, len(support_columns(plan))]. With d = (z - m) - log q on the support,

    on = sum_K exp(z - m), off = the same over the other columns (K left out, not subtracted), q = sum_K q,
    q_cross = sum_K q d, p_cross = sum_K exp(z - m) d.
    """
    columns = support_columns(plan)
    stats = z.new_zeros(z.shape[0], len(columns), dtype=torch.float64)
    if z.shape[1] == 0:
        stats[:, 0] = -torch.inf
        return stats
    rows = block_rows(z)
    for start in range(0, z.shape[0], rows):
        block = slice(start, start + rows)
        part = SupportChunk(
            support.local[block], support.owned[block], support.log_q[block], support.log_tail[block], support.tail
        )
        values = _block(z[block], part, plan)
        if "target" in columns:
            assert target is not None and owned is not None
            picked = z[block].gather(1, target[block].unsqueeze(1)).squeeze(1)
            values["target"] = picked.masked_fill(~owned[block], 0.0)
        stats[block] = torch.stack([values[name].double() for name in columns], dim=1)
    return stats


def _block(z: torch.Tensor, support: SupportChunk, plan: Plan) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    sums["m"], k = row_max(z)
    m = finite_max(sums["m"], True).unsqueeze(1)
    a = z - m
    exp_a = a.exp()
    if "entropy" in plan.outputs:
        sums["e"] = (exp_a * a).masked_fill_(exp_a == 0, 0.0).sum(1)
    sums["ta"] = row_sum(exp_a.scatter_(1, k.unsqueeze(1), 0.0))
    owned = support.owned
    rows, entries = owned.nonzero(as_tuple=True)
    exp_a[rows, support.local[rows, entries]] = 0.0
    maximum_is_off = ~((support.local == k.unsqueeze(1)) & owned).any(1) & (sums["m"] > -torch.inf)
    sums["off"] = row_sum(exp_a) + maximum_is_off
    on = z.gather(1, support.local) - m
    exp_on = on.exp().masked_fill_(~owned, 0.0)
    q = support.log_q.exp().masked_fill_(~owned, 0.0)
    difference = on - support.log_q
    sums["on"], sums["q"] = exp_on.double().sum(1), q.double().sum(1)
    sums["q_cross"] = (q * difference).masked_fill_(q == 0, 0.0).double().sum(1)
    sums["p_cross"] = (exp_on * difference).masked_fill_(exp_on == 0, 0.0).double().sum(1)
    return sums


@dataclasses.dataclass
class SupportMerged(Merged):
    """``Merged`` with the masses that the gradient on and off the support needs, all [c]."""

    log_p_on: torch.Tensor = dataclasses.field(kw_only=True)  # log of the student's mass on the support
    log_p_off: torch.Tensor = dataclasses.field(kw_only=True)
    log_q_on: torch.Tensor = dataclasses.field(kw_only=True)


def support_merge(gathered: torch.Tensor, support: SupportChunk, plan: Plan) -> SupportMerged:
    """Merge the statistics of all shards [tp, c, columns], in rank order, to outputs and gradient constants."""
    part = dict(zip(support_columns(plan), gathered.unbind(2), strict=True))
    max_z, _, shift, scale, count, residual = combine_maxima(part["m"], part["ta"])
    log_a = torch.log1p(residual)
    log_p_on = weighted_sum(scale, part["on"]).log() - log_a
    log_p_off = weighted_sum(scale, part["off"]).log() - log_a
    q_on = part["q"].sum(0)
    merged = SupportMerged(max_z, log_a, log_p_on=log_p_on, log_p_off=log_p_off, log_q_on=q_on.log())
    out = merged.outputs
    if "e" in part:
        out["entropy"] = log_a - weighted_sum(scale, part["e"] + count * shift) / (1 + residual)
    if "target" in part:
        out["log_probs"] = (part["target"].sum(0) - max_z) - log_a
    out["captured_mass"], out["student_captured_mass"] = q_on, merged.log_p_on.exp()
    if "forward_kl" in plan.outputs:
        # sum_K q (log q - log p)
        cross = q_on * log_a - (part["q_cross"] + part["q"] * shift).sum(0)
        out["forward_kl"] = _close(cross, merged.log_q_on, merged.log_p_on, support.log_tail, merged.log_p_off, support)
    if "reverse_kl" in plan.outputs:
        p_on = merged.log_p_on.exp()
        cross = weighted_sum(scale, part["p_cross"] + part["on"] * shift) / (1 + residual) - p_on * log_a
        out["reverse_kl"] = _close(cross, merged.log_p_on, merged.log_q_on, merged.log_p_off, support.log_tail, support)
    return merged


def _close(
    cross: torch.Tensor,
    log_from_on: torch.Tensor,
    log_to_on: torch.Tensor,
    log_from_off: torch.Tensor,
    log_to_off: torch.Tensor,
    support: SupportChunk,
) -> torch.Tensor:
    """Apply the tail rule to the support's sum of f (log f - log t) [c]; f is the side that weights."""
    if support.tail == "truncate":
        return cross
    if support.tail == "renormalise":
        return cross / log_from_on.exp() - log_from_on + log_to_on
    weight = log_from_off.exp()
    return cross + (weight * (log_from_off - log_to_off)).masked_fill(weight == 0, 0.0)


def support_gradient(
    z: torch.Tensor,
    support: SupportChunk,
    target: torch.Tensor | None,
    owned: torch.Tensor | None,
    merged: SupportMerged,
    cotangents: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Return d(sum of cotangent * output)/dz of a shard, [c, v_tp], written over ``z``."""
    if z.shape[1] == 0:
        return z
    outputs = {name: value.to(z.dtype) for name, value in merged.outputs.items()}
    merged = dataclasses.replace(merged.to(z.dtype), outputs=outputs)
    on_log_p = (z.gather(1, support.local) - merged.max_z.unsqueeze(1)) - merged.log_sum_z.unsqueeze(1)
    off_factor = torch.zeros_like(merged.max_z)
    on_value = torch.zeros_like(on_log_p)
    for name, slope in (("forward_kl", _forward_slope), ("reverse_kl", _reverse_slope)):
        if name in cotangents:
            off, on = slope(on_log_p, support, merged)
            off_factor = off_factor + cotangents[name] * off
            on_value = on_value + cotangents[name].unsqueeze(1) * on
    hit = support.owned.nonzero(as_tuple=True)
    columns = support.local[hit]
    log_p = z.sub_(merged.max_z.unsqueeze(1)).sub_(merged.log_sum_z.unsqueeze(1))
    extra = None
    if "entropy" in cotangents:
        value = merged.outputs["entropy"].unsqueeze(1)
        p = log_p.exp()
        extra = (p * (log_p + value)).masked_fill_(p == 0, 0.0).mul_(-cotangents["entropy"].unsqueeze(1))
    p = log_p.exp_()
    if "log_probs" in cotangents:
        pull = p * -cotangents["log_probs"].unsqueeze(1)
        assert target is not None and owned is not None
        on_target = cotangents["log_probs"].masked_fill(~owned, 0.0).unsqueeze(1)
        pull.scatter_add_(1, target.unsqueeze(1), on_target)
        extra = pull if extra is None else extra.add_(pull)
    delta = p.mul_(off_factor.unsqueeze(1))
    delta[hit[0], columns] = on_value[hit]
    return delta if extra is None else delta.add_(extra)


def _forward_slope(
    on_log_p: torch.Tensor, support: SupportChunk, merged: SupportMerged
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor of p off the support [c] and the gradient on it [c, k] of the forward divergence."""
    p, q = on_log_p.exp(), support.log_q.exp()
    if support.tail == "bucket":
        ratio = (support.log_tail - merged.log_p_off).exp()
        return 1 - ratio.masked_fill(support.log_tail == -torch.inf, 0.0), p - q
    q_on = merged.log_q_on.exp()
    if support.tail == "truncate":
        return q_on, q_on.unsqueeze(1) * p - q
    return torch.zeros_like(q_on), p / merged.log_p_on.exp().unsqueeze(1) - q / q_on.unsqueeze(1)


def _reverse_slope(
    on_log_p: torch.Tensor, support: SupportChunk, merged: SupportMerged
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor of p off the support [c] and the gradient on it [c, k] of the reverse divergence."""
    value = merged.outputs["reverse_kl"]
    p = on_log_p.exp()
    ratio = (on_log_p - support.log_q).masked_fill(p == 0, 0.0)
    if support.tail == "bucket":
        off = (merged.log_p_off - support.log_tail).masked_fill(merged.log_p_off == -torch.inf, 0.0)
        return off - value, p * (ratio - value.unsqueeze(1))
    p_on = merged.log_p_on.exp()
    if support.tail == "truncate":
        return -(value + p_on), p * (ratio + (1 - value - p_on).unsqueeze(1))
    conditioned = ratio - (merged.log_p_on - merged.log_q_on).unsqueeze(1)
    return torch.zeros_like(value), p / p_on.unsqueeze(1) * (conditioned - value.unsqueeze(1))
