"""Shard-local arithmetic of a chunk of logits in PyTorch: statistics, sums of mixtures, and the logits' gradient.

A backend implements three functions (``chunk.Backend``): ``statistics`` (a few numbers per token and shard),
``divergence_sums`` (mixtures only, after the normalisers are known) and ``logits_gradient``. They get valid columns
only. p: student with logits z, q: teacher with logits y, both after temperature.

The statistics m, n, ta, tb, e, w and u are defined in ``kl/merge.py``. ``masked``: minus infinities may occur; then
0 * inf is defined as 0, by the convention of the entropy.

Shapes: c tokens of the chunk, v_tp local vocabulary columns.
"""

from __future__ import annotations

import functools

import torch

from megatron_s2d.buffer_sizes import ROW_BLOCK_ELEMENTS
from megatron_s2d.kl.jsd import mixture_terms
from megatron_s2d.kl.merge import Merged, Plan, empty_statistics

_PIECE = 512  # elements of a row that are summed, or searched for the maximum, at once


def statistics(
    z: torch.Tensor, y: torch.Tensor | None, target: torch.Tensor | None, owned: torch.Tensor | None, plan: Plan
) -> tuple[torch.Tensor, bool]:
    """Return float64 statistics of a shard [c, len(plan.columns)], and whether minus infinities occurred.

    z, y: [c, v_tp] float32 or float64, not modified. target: [c] local column of the target id, valid where owned.
    """
    if z.shape[1] == 0:
        return empty_statistics(z, plan), False
    stats = _in_blocks(z, y, target, owned, plan, masked=False)
    if bool(torch.isfinite(stats).all()):
        return stats, False
    return _in_blocks(z, y, target, owned, plan, masked=True), True


def _in_blocks(
    z: torch.Tensor,
    y: torch.Tensor | None,
    target: torch.Tensor | None,
    owned: torch.Tensor | None,
    plan: Plan,
    *,
    masked: bool,
) -> torch.Tensor:
    rows = block_rows(z)
    if z.shape[0] <= rows:
        return _block_statistics(z, y, target, owned, plan, masked)
    stats = z.new_empty(z.shape[0], len(plan.columns), dtype=torch.float64)
    for start in range(0, z.shape[0], rows):
        block = slice(start, start + rows)
        y_block, target_block, owned_block = (None if x is None else x[block] for x in (y, target, owned))
        stats[block] = _block_statistics(z[block], y_block, target_block, owned_block, plan, masked)
    return stats


def block_rows(z: torch.Tensor) -> int:
    """Return the number of rows processed together: all on an accelerator, a cache-sized block on a CPU."""
    return z.shape[0] if z.is_cuda else max(1, ROW_BLOCK_ELEMENTS // z.shape[1])


def _block_statistics(
    z: torch.Tensor,
    y: torch.Tensor | None,
    target: torch.Tensor | None,
    owned: torch.Tensor | None,
    plan: Plan,
    masked: bool,
) -> torch.Tensor:
    columns = plan.columns
    sums: dict[str, torch.Tensor] = {}
    sums["m"], k = row_max(z)
    a = z - finite_max(sums["m"], masked).unsqueeze(1)
    exp_a = a.exp()
    if "e" in columns:
        sums["e"] = _dot(exp_a, a, masked)
    if plan.has_teacher:
        assert y is not None
        sums["n"], j = row_max(y)
        n = finite_max(sums["n"], masked)
        exp_b = (y - n.unsqueeze(1)).exp_()
        # y - z first: it is exact where the models nearly agree, which the distances from the maxima are not.
        difference = (y - z).sub_((n - finite_max(sums["m"], masked)).unsqueeze(1))
        if "w" in columns:
            sums["w"] = _dot(exp_b, difference, masked)
        if "u" in columns:
            sums["u"] = -_dot(exp_a, difference, masked)
        if "y_at_k" in columns:
            sums["y_at_k"] = y.gather(1, k.unsqueeze(1)).squeeze(1)
        sums["tb"] = row_sum(exp_b.scatter_(1, j.unsqueeze(1), 0.0))
    sums["ta"] = row_sum(exp_a.scatter_(1, k.unsqueeze(1), 0.0))
    if "target" in columns:
        assert target is not None and owned is not None
        sums["target"] = z.gather(1, target.unsqueeze(1)).squeeze(1).masked_fill(~owned, 0.0)
    return torch.stack([sums[name].double() for name in columns], dim=1)


def row_sum(values: torch.Tensor) -> torch.Tensor:
    """Return float64 sums of rows: pieces in the rows' dtype, which is fast, and float64 over the pieces."""
    pieces = values.shape[1] // _PIECE
    if pieces < 4:
        return values.sum(1, dtype=torch.float64)
    body, tail = values[:, : pieces * _PIECE], values[:, pieces * _PIECE :]
    return torch.unflatten(body, 1, (pieces, _PIECE)).sum(2).sum(1, dtype=torch.float64) + tail.sum(1)


def row_max(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row maximum and its column; on long rows through vectorised maxima of pieces."""
    pieces = z.shape[1] // _PIECE
    if z.is_cuda or pieces < 4 or not z.is_contiguous():
        return z.max(dim=1)
    body = torch.unflatten(z[:, : pieces * _PIECE], 1, (pieces, _PIECE))
    best, piece = body.amax(2).max(dim=1)
    column = body.gather(1, piece.view(-1, 1, 1).expand(-1, 1, _PIECE)).squeeze(1).argmax(1) + piece * _PIECE
    if z.shape[1] > pieces * _PIECE:
        tail, tail_column = z[:, pieces * _PIECE :].max(dim=1)
        column = torch.where(tail > best, tail_column + pieces * _PIECE, column)
        best = torch.maximum(best, tail)
    return best, column


def finite_max(maximum: torch.Tensor, masked: bool) -> torch.Tensor:
    return maximum.masked_fill(maximum == -torch.inf, 0.0) if masked else maximum


def _dot(weight: torch.Tensor, value: torch.Tensor, masked: bool) -> torch.Tensor:
    product = weight * value
    if masked:
        product.masked_fill_(weight == 0, 0.0)
    return row_sum(product)


def divergence_sums(
    z: torch.Tensor, y: torch.Tensor, merged: Merged, plan: Plan, masked: bool
) -> tuple[torch.Tensor, bool]:
    """Return a shard's sums [c, 2] of the mixture divergence's terms and of p (c - c at the student's likeliest token).

    Also whether minus infinities occurred, here or (``masked``) in ``statistics``.
    """
    if z.shape[1] == 0:
        return z.new_zeros(z.shape[0], 2, dtype=torch.float64), masked
    sums = _mixture_sums(z, y, merged, plan, masked)
    if masked or bool(torch.isfinite(sums).all()):
        return sums, masked
    return _mixture_sums(z, y, merged, plan, True), True


def _mixture_sums(z: torch.Tensor, y: torch.Tensor, merged: Merged, plan: Plan, masked: bool) -> torch.Tensor:
    assert plan.mixture is not None and plan.beta is not None
    sums = z.new_empty(z.shape[0], 2, dtype=torch.float64)
    merged, slope_at_k = merged.to(z.dtype), mixture_slope_at_k(merged, plan).to(z.dtype)
    rows = block_rows(z)
    for start in range(0, z.shape[0], rows):
        block = slice(start, start + rows)
        log_p, log_q = _log_probs(z, y, merged, block)
        difference = _log_ratio(z[block], y[block], *_columns(merged, block)).neg_()
        terms, slope = mixture_terms(log_p, log_q, difference, plan.mixture, plan.beta, masked)
        sums[block, 0] = row_sum(terms)
        slope -= slope_at_k[block].unsqueeze(1)
        sums[block, 1] = _dot(log_p.exp(), slope, masked)
    return sums


def mixture_slope_at_k(merged: Merged, plan: Plan) -> torch.Tensor:
    """Return c at the student's likeliest token [c]; subtracting it keeps confident tokens exact in float32."""
    assert plan.mixture is not None and plan.beta is not None
    assert merged.log_q_at_k is not None and merged.difference_at_k is not None
    at_k = (-merged.log_sum_z, merged.log_q_at_k, merged.difference_at_k)
    return mixture_terms(*at_k, plan.mixture, plan.beta, True)[1]


def _log_probs(z: torch.Tensor, y: torch.Tensor, merged: Merged, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    assert merged.max_y is not None and merged.log_sum_y is not None
    log_p = (z[block] - merged.max_z[block].unsqueeze(1)).sub_(merged.log_sum_z[block].unsqueeze(1))
    return log_p, (y[block] - merged.max_y[block].unsqueeze(1)).sub_(merged.log_sum_y[block].unsqueeze(1))


def _columns(merged: Merged, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    assert merged.gap is not None and merged.log_sum_ratio is not None
    return merged.gap[block].unsqueeze(1), merged.log_sum_ratio[block].unsqueeze(1)


def _log_ratio(z: torch.Tensor, y: torch.Tensor, gap: torch.Tensor, log_sum_ratio: torch.Tensor) -> torch.Tensor:
    """Return log p - log q; z - y first, which is exact where the models nearly agree."""
    return (z - y).sub_(gap).sub_(log_sum_ratio)


def logits_gradient(
    z: torch.Tensor,
    y: torch.Tensor | None,
    target: torch.Tensor | None,
    owned: torch.Tensor | None,
    merged: Merged,
    cotangents: dict[str, torch.Tensor],
    plan: Plan,
    masked: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write d(sum of cotangent * output)/dz of a shard to ``out`` [c, v_tp], which may be ``z``.

    cotangents: [c] by output name.
    """
    if z.shape[1] == 0:
        return out
    rows = block_rows(z)
    constants = GradientConstants(merged, cotangents, plan, z.dtype)
    for start in range(0, z.shape[0], rows):
        block = slice(start, start + rows)
        delta = _block_gradient(z[block], None if y is None else y[block], constants.rows(block), masked)
        if "log_probs" in cotangents:
            assert target is not None and owned is not None
            on_target = cotangents["log_probs"][block].masked_fill(~owned[block], 0.0).unsqueeze(1)
            delta.scatter_add_(1, target[block].unsqueeze(1), on_target)
        out[block] = delta
    return out


class GradientConstants:
    """Per-token numbers of the gradient [c], or columns [c, 1]; ``None`` for terms that do not occur.

    With s = z - max z and t = y - max y, the gradient is
        forward exp(t) expm1(x) + exp(s) (reverse x + entropy s + mixture c + level),    x = log p - log q,
    where the normalisers exp(-log_sum) are folded into the row factors.
    """

    forward: torch.Tensor | None = None
    forward_p: torch.Tensor | None = None
    reverse: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mixture: torch.Tensor | None = None
    level: torch.Tensor | None = None

    def __init__(self, merged: Merged, cotangents: dict[str, torch.Tensor], plan: Plan, dtype: torch.dtype) -> None:
        self.plan, out = plan, merged.outputs
        scale_p = torch.exp(-merged.log_sum_z)
        self.max_z, self.max_y = merged.max_z, merged.max_y
        self.gap, self.log_sum_ratio = merged.gap, merged.log_sum_ratio
        self.log_sum_z, self.log_sum_y = merged.log_sum_z, merged.log_sum_y
        level = torch.zeros_like(merged.max_z)
        if "forward_kl" in cotangents:
            assert merged.log_sum_y is not None
            self.forward = cotangents["forward_kl"] * torch.exp(-merged.log_sum_y)
            self.forward_p = cotangents["forward_kl"] * scale_p
        if "reverse_kl" in cotangents:
            self.reverse = cotangents["reverse_kl"] * scale_p
            level = level - self.reverse * out["reverse_kl"]
        if "entropy" in cotangents:
            self.entropy = -cotangents["entropy"] * scale_p
            level = level + self.entropy * (out["entropy"] - merged.log_sum_z)
        if plan.mixture is not None and plan.mixture in cotangents:
            assert merged.expected_slope is not None
            self.mixture = cotangents[plan.mixture] * scale_p
            level = level - self.mixture * (mixture_slope_at_k(merged, plan) + merged.expected_slope)
        if "log_probs" in cotangents:
            level = level - cotangents["log_probs"] * scale_p
        self.level = level if set(cotangents) != {"forward_kl"} else None
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(dtype))

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the gradient depends on the teacher's logits."""
        return self.forward is not None or self.reverse is not None or self.mixture is not None

    def rows(self, block: slice) -> GradientConstants:
        """Return the constants of a block of tokens, as columns."""
        part = object.__new__(GradientConstants)
        for name, value in vars(self).items():
            setattr(part, name, value[block].unsqueeze(1) if isinstance(value, torch.Tensor) else value)
        return part


def _block_gradient(z: torch.Tensor, y: torch.Tensor | None, row: GradientConstants, masked: bool) -> torch.Tensor:
    if not row.needs_teacher:
        assert row.level is not None
        factor = row.level
        if row.entropy is not None:
            factor = (z - row.max_z).mul_(row.entropy).add_(row.level)
        return _times_p(factor, z, row, masked)
    assert y is not None and row.gap is not None and row.log_sum_ratio is not None
    ratio = _log_ratio(z, y, row.gap, row.log_sum_ratio)
    delta = None
    if row.forward is not None:
        delta = _p_minus_q(z, y, ratio, row, masked)
        if row.level is None:
            return delta
    assert row.level is not None
    terms: list[torch.Tensor] = []  # whose sum multiplies exp(s)
    if row.entropy is not None:
        terms.append((z - row.max_z).mul_(row.entropy))
    if row.mixture is not None:
        terms.append(_mixture_slope(z, y, ratio, row, masked).mul_(row.mixture))
    if row.reverse is not None:
        terms.append(ratio.mul_(row.reverse))
    factor = row.level
    if terms:
        factor = functools.reduce(torch.Tensor.add_, terms).add_(row.level)
    with_p = _times_p(factor, z, row, masked)
    return with_p if delta is None else delta.add_(with_p)


def _times_p(factor: torch.Tensor, z: torch.Tensor, row: GradientConstants, masked: bool) -> torch.Tensor:
    """Return exp(z - max z) * factor; columns of probability 0 get 0."""
    p = (z - row.max_z).exp_()
    impossible = p == 0 if masked else None
    p.mul_(factor)
    return p if impossible is None else p.masked_fill_(impossible, 0.0)


def _mixture_slope(
    z: torch.Tensor, y: torch.Tensor, ratio: torch.Tensor, row: GradientConstants, masked: bool
) -> torch.Tensor:
    assert row.plan.mixture is not None and row.plan.beta is not None
    assert row.max_y is not None and row.log_sum_y is not None
    log_p, log_q = (z - row.max_z).sub_(row.log_sum_z), (y - row.max_y).sub_(row.log_sum_y)
    return mixture_terms(log_p, log_q, -ratio, row.plan.mixture, row.plan.beta, masked)[1]


def _p_minus_q(
    z: torch.Tensor, y: torch.Tensor, ratio: torch.Tensor, row: GradientConstants, masked: bool
) -> torch.Tensor:
    """Return cotangent * (p - q) through expm1 of log p - log q: exact to rounding where p and q nearly agree."""
    assert row.forward is not None and row.forward_p is not None and row.max_y is not None
    if not ratio.is_cuda and not masked and bool(ratio.amax() < 30.0):
        return torch.expm1(ratio).mul_((y - row.max_y).exp_()).mul_(row.forward)
    # max(p, q) expm1(-|log p - log q|): the larger side leads, so that nothing overflows
    if masked:
        ratio = torch.nan_to_num(ratio, nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    p, q = (z - row.max_z).exp_().mul_(row.forward_p), (y - row.max_y).exp_().mul_(row.forward)
    larger = torch.where(ratio > 0, p, q)
    return torch.expm1(-ratio.abs()).mul_(larger).mul_(-torch.sign(ratio))
