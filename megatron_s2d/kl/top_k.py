"""Divergences to a teacher known on a few tokens per position only, shard-local and merged with one all-gather.

K is the support (the ids that the teacher's log-probabilities were kept for), q_K and p_K the teacher's and student's
mass on it, q_bar and p_bar the rest. What becomes of the rest is a named choice (methods.md M2):
    bucket       one more outcome with mass q_bar against p_bar: a lower bound of the full divergence, monotone in K
    renormalise  both sides conditioned on K; student mass outside K is neither seen nor moved
    truncate     the sum over K as it stands, tail left out; not a divergence (it may be negative)
Left out: mixtures (jsd, skew) on a support.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_s2d.kl.torch_backend import Merged, Plan, _combine, _finite, _max, _weighted, block_rows, row_sum

TAILS = ("bucket", "renormalise", "truncate")


@dataclasses.dataclass
class SupportChunk:
    """Support of a chunk of C tokens on one shard; [C, k] tensors in the dtype of the computation."""

    local: torch.Tensor  # [C, k] int64 local column, 0 where foreign
    owned: torch.Tensor  # [C, k] bool: the id is one of this shard's columns
    log_q: torch.Tensor  # [C, k] teacher log-probabilities
    log_tail: torch.Tensor  # [C] log of the teacher's mass outside the support, -inf for none
    tail: str


def support_columns(plan: Plan) -> tuple[str, ...]:
    """Names of the exchanged statistics: those of the student alone, and five sums over the support and its rest."""
    student = [name for name in plan.columns if name in ("m", "ta", "e", "target")]
    return (*student, "on", "off", "q", "q_cross", "p_cross")


def support_statistics(z, support: SupportChunk, target, owned, plan: Plan) -> torch.Tensor:
    """[C, len(support_columns(plan))] statistics of a shard; with d = (z - m) - log q on the support,

    on = sum_K exp(z - m), off = the same over the other columns (K left out, not subtracted), q = sum_K q,
    q_cross = sum_K q d, p_cross = sum_K exp(z - m) d.
    """
    columns = support_columns(plan)
    found = z.new_zeros(z.shape[0], len(columns), dtype=torch.float64)
    if z.shape[1] == 0:
        found[:, 0] = -torch.inf
        return found
    rows = block_rows(z)
    for start in range(0, z.shape[0], rows):
        block = slice(start, start + rows)
        part = SupportChunk(
            support.local[block], support.owned[block], support.log_q[block], support.log_tail[block], support.tail
        )
        values = _block(z[block], part, plan)
        if "target" in columns:
            picked = z[block].gather(1, target[block].unsqueeze(1)).squeeze(1)
            values["target"] = picked.masked_fill(~owned[block], 0.0)
        found[block] = torch.stack([values[name].double() for name in columns], dim=1)
    return found


def _block(z: torch.Tensor, support: SupportChunk, plan: Plan) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    found["m"], k = _max(z)
    m = _finite(found["m"], True).unsqueeze(1)
    a = z - m
    exp_a = a.exp()
    if "entropy" in plan.outputs:
        found["e"] = (exp_a * a).masked_fill_(exp_a == 0, 0.0).sum(1)
    found["ta"] = row_sum(exp_a.scatter_(1, k.unsqueeze(1), 0.0))
    owned = support.owned
    rows, places = owned.nonzero(as_tuple=True)
    exp_a[rows, support.local[rows, places]] = 0.0
    maximum_is_off = ~((support.local == k.unsqueeze(1)) & owned).any(1) & (found["m"] > -torch.inf)
    found["off"] = row_sum(exp_a) + maximum_is_off
    on = z.gather(1, support.local) - m
    exp_on = on.exp().masked_fill_(~owned, 0.0)
    q = support.log_q.exp().masked_fill_(~owned, 0.0)
    difference = on - support.log_q
    found["on"], found["q"] = exp_on.double().sum(1), q.double().sum(1)
    found["q_cross"] = (q * difference).masked_fill_(q == 0, 0.0).double().sum(1)
    found["p_cross"] = (exp_on * difference).masked_fill_(exp_on == 0, 0.0).double().sum(1)
    return found


@dataclasses.dataclass
class SupportMerged(Merged):
    """``Merged`` with what the gradient on and off the support needs, all [C]."""

    log_p_on: torch.Tensor | None = None  # log of the student's mass on the support
    log_p_off: torch.Tensor | None = None
    log_q_on: torch.Tensor | None = None


def support_merge(gathered: torch.Tensor, support: SupportChunk, plan: Plan) -> SupportMerged:
    """Statistics of all shards [T, C, columns] to outputs and gradient constants, added in rank order."""
    part = dict(zip(support_columns(plan), gathered.unbind(2), strict=True))
    max_z, _, shift, scale, count, rest = _combine(part["m"], part["ta"])
    log_a = torch.log1p(rest)
    merged = SupportMerged(max_z, log_a)
    out = merged.outputs
    if "e" in part:
        out["entropy"] = log_a - _weighted(scale, part["e"] + count * shift) / (1 + rest)
    if "target" in part:
        out["log_probs"] = (part["target"].sum(0) - max_z) - log_a
    merged.log_p_on = _weighted(scale, part["on"]).log() - log_a
    merged.log_p_off = _weighted(scale, part["off"]).log() - log_a
    q_on = part["q"].sum(0)
    merged.log_q_on = q_on.log()
    out["captured_mass"], out["student_captured_mass"] = q_on, merged.log_p_on.exp()
    if "forward_kl" in plan.outputs:
        # sum_K q (log q - log p)
        cross = q_on * log_a - (part["q_cross"] + part["q"] * shift).sum(0)
        out["forward_kl"] = _close(cross, merged.log_q_on, merged.log_p_on, support.log_tail, merged.log_p_off, support)
    if "reverse_kl" in plan.outputs:
        p_on = merged.log_p_on.exp()
        cross = _weighted(scale, part["p_cross"] + part["on"] * shift) / (1 + rest) - p_on * log_a
        out["reverse_kl"] = _close(cross, merged.log_p_on, merged.log_q_on, merged.log_p_off, support.log_tail, support)
    return merged


def _close(cross, log_from_on, log_to_on, log_from_off, log_to_off, support: SupportChunk) -> torch.Tensor:
    """The support's sum of f (log f - log t), completed by the tail rule; f is the side that weights."""
    if support.tail == "truncate":
        return cross
    if support.tail == "renormalise":
        return cross / log_from_on.exp() - log_from_on + log_to_on
    weight = log_from_off.exp()
    return cross + (weight * (log_from_off - log_to_off)).masked_fill(weight == 0, 0.0)


def support_gradient(z, support: SupportChunk, target, owned, merged: SupportMerged, cotangents) -> torch.Tensor:
    """d(sum of cotangent * output)/dz of a shard, [C, columns]; written over ``z``."""
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
        mine = cotangents["log_probs"].masked_fill(~owned, 0.0).unsqueeze(1)
        pull.scatter_add_(1, target.unsqueeze(1), mine)
        extra = pull if extra is None else extra.add_(pull)
    delta = p.mul_(off_factor.unsqueeze(1))
    delta[hit[0], columns] = on_value[hit]
    return delta if extra is None else delta.add_(extra)


def _forward_slope(on_log_p, support: SupportChunk, merged: SupportMerged) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor of p off the support [C] and gradient on it [C, k] of the forward divergence."""
    p, q = on_log_p.exp(), support.log_q.exp()
    if support.tail == "bucket":
        ratio = (support.log_tail - merged.log_p_off).exp()
        return 1 - ratio.masked_fill(support.log_tail == -torch.inf, 0.0), p - q
    q_on = merged.log_q_on.exp()
    if support.tail == "truncate":
        return q_on, q_on.unsqueeze(1) * p - q
    return torch.zeros_like(q_on), p / merged.log_p_on.exp().unsqueeze(1) - q / q_on.unsqueeze(1)


def _reverse_slope(on_log_p, support: SupportChunk, merged: SupportMerged) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor of p off the support [C] and gradient on it [C, k] of the reverse divergence."""
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
