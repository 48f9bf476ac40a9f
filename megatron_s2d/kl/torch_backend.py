"""Shard-local arithmetic of a chunk of logits in PyTorch, and the merge of the shards' statistics.

Three functions are all that a backend has to supply, with the signatures used here: ``statistics`` (a few numbers per
token and shard), ``divergence_sums`` (mixtures only, after the normalisers are known) and ``logits_gradient``. They
see valid columns only. p: student with logits z, q: teacher with logits y, both after temperature.

Per token and shard, with m = max z at column k, n = max y at column j:
    ta = sum over v != k of exp(z - m),  tb = sum over v != j of exp(y - n)
    e = sum exp(z - m) (z - m),  w = sum exp(y - n) ((y - n) - (z - m)),  u = sum exp(z - m) ((z - m) - (y - n))
A maximum's own term is left out of ta and tb, because log(1 + ta) keeps the digits of ta that log of the whole sum
loses: a confident student has ta near 1e-5, and its divergence lives there. Merging needs no second pass over columns.

A quantity is "masked" when minus infinities may occur; then 0 * inf is defined as 0, as the entropy convention says.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_s2d.buffer_sizes import ROW_BLOCK_ELEMENTS
from megatron_s2d.kl.jsd import MIXTURES, mixture_terms

_PIECE = 512  # elements of a row that are summed, or searched for the maximum, in one go


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one pass computes. ``outputs`` are names of ``TokenOutputs`` fields; ``beta`` belongs to mixtures."""

    outputs: tuple[str, ...]
    has_teacher: bool
    beta: float | None = None

    @property
    def mixture(self) -> str | None:
        """The one divergence that needs a second collective, if any was asked for."""
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
    """Per-token values [C], identical on all ranks, from which every column's gradient follows.

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

    def to(self, dtype: torch.dtype) -> Merged:
        """The per-token constants in the dtype of the columns; outputs are left out."""
        fields = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return type(self)(**fields)


def statistics(
    z: torch.Tensor, y: torch.Tensor | None, target: torch.Tensor | None, owned: torch.Tensor | None, plan: Plan
) -> tuple[torch.Tensor, bool]:
    """[C, len(plan.columns)] float64 statistics of a shard, and whether minus infinities were met.

    z, y: [C, columns] float32 or float64, not changed; target [C]: local column of the target id, valid where owned.
    """
    if z.shape[1] == 0:
        return _empty_statistics(z, plan), False
    found = _in_blocks(z, y, target, owned, plan, masked=False)
    if bool(torch.isfinite(found).all()):
        return found, False
    return _in_blocks(z, y, target, owned, plan, masked=True), True


def _empty_statistics(z: torch.Tensor, plan: Plan) -> torch.Tensor:
    found = z.new_zeros(z.shape[0], len(plan.columns), dtype=torch.float64)
    for index, name in enumerate(plan.columns):
        if name in ("m", "n"):
            found[:, index] = -torch.inf
    return found


def _in_blocks(z, y, target, owned, plan, *, masked):
    rows = block_rows(z)
    if z.shape[0] <= rows:
        return _block_statistics(z, y, target, owned, plan, masked)
    found = z.new_empty(z.shape[0], len(plan.columns), dtype=torch.float64)
    for start in range(0, z.shape[0], rows):
        block = slice(start, start + rows)
        part = [None if tensor is None else tensor[block] for tensor in (z, y, target, owned)]
        found[block] = _block_statistics(*part, plan, masked)
    return found


def block_rows(z: torch.Tensor) -> int:
    """Rows that are worked on together: all of them on an accelerator, a cache-sized block on a CPU."""
    return z.shape[0] if z.is_cuda else max(1, ROW_BLOCK_ELEMENTS // z.shape[1])


def _block_statistics(z, y, target, owned, plan, masked):
    columns = plan.columns
    found: dict[str, torch.Tensor] = {}
    found["m"], k = _max(z)
    a = z - _finite(found["m"], masked).unsqueeze(1)
    exp_a = a.exp()
    if "e" in columns:
        found["e"] = _dot(exp_a, a, masked)
    if plan.has_teacher:
        found["n"], j = _max(y)
        n = _finite(found["n"], masked)
        exp_b = (y - n.unsqueeze(1)).exp_()
        # y - z first: it is exact where the models nearly agree, which the distances from the maxima are not.
        difference = (y - z).sub_((n - _finite(found["m"], masked)).unsqueeze(1))
        if "w" in columns:
            found["w"] = _dot(exp_b, difference, masked)
        if "u" in columns:
            found["u"] = -_dot(exp_a, difference, masked)
        if "y_at_k" in columns:
            found["y_at_k"] = y.gather(1, k.unsqueeze(1)).squeeze(1)
        found["tb"] = row_sum(exp_b.scatter_(1, j.unsqueeze(1), 0.0))
    found["ta"] = row_sum(exp_a.scatter_(1, k.unsqueeze(1), 0.0))
    if "target" in columns:
        found["target"] = z.gather(1, target.unsqueeze(1)).squeeze(1).masked_fill(~owned, 0.0)
    return torch.stack([found[name].double() for name in columns], dim=1)


def row_sum(values: torch.Tensor) -> torch.Tensor:
    """float64 sums of rows: pieces in the rows' own dtype, which is fast, and float64 over the pieces."""
    pieces = values.shape[1] // _PIECE
    if pieces < 4:
        return values.sum(1, dtype=torch.float64)
    body, tail = values[:, : pieces * _PIECE], values[:, pieces * _PIECE :]
    return body.unflatten(1, (pieces, _PIECE)).sum(2).sum(1, dtype=torch.float64) + tail.sum(1)


def _max(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row maximum and its column; on long rows by way of vectorised maxima of pieces."""
    pieces = z.shape[1] // _PIECE
    if z.is_cuda or pieces < 4 or not z.is_contiguous():
        return z.max(dim=1)
    body = z[:, : pieces * _PIECE].unflatten(1, (pieces, _PIECE))
    best, where = body.amax(2).max(dim=1)
    column = body.gather(1, where.view(-1, 1, 1).expand(-1, 1, _PIECE)).squeeze(1).argmax(1) + where * _PIECE
    if z.shape[1] > pieces * _PIECE:
        tail, place = z[:, pieces * _PIECE :].max(dim=1)
        column = torch.where(tail > best, place + pieces * _PIECE, column)
        best = torch.maximum(best, tail)
    return best, column


def _finite(maximum: torch.Tensor, masked: bool) -> torch.Tensor:
    return maximum.masked_fill(maximum == -torch.inf, 0.0) if masked else maximum


def _dot(weight: torch.Tensor, value: torch.Tensor, masked: bool) -> torch.Tensor:
    product = weight * value
    if masked:
        product.masked_fill_(weight == 0, 0.0)
    return row_sum(product)


def merge(gathered: torch.Tensor, plan: Plan) -> Merged:
    """Statistics of all shards [T, C, columns], added in rank order so that every rank gets the same bits.

    float64: a few numbers per token, whose differences are the divergence.
    """
    part = dict(zip(plan.columns, gathered.unbind(2), strict=True))
    max_z, winner, shift, scale, count, rest = _combine(part["m"], part["ta"])
    log_a = torch.log1p(rest)
    merged = Merged(max_z, log_a)
    out = merged.outputs
    if "e" in part:
        out["entropy"] = log_a - _weighted(scale, part["e"] + count * shift) / (1 + rest)
    if "target" in part:
        out["log_probs"] = (part["target"].sum(0) - max_z) - log_a
    if plan.has_teacher:
        max_y, _, shift_y, scale_y, count_y, rest_y = _combine(part["n"], part["tb"])
        log_b = torch.log1p(rest_y)
        merged.max_y, merged.log_sum_y = max_y, log_b
        # log_a - log_b, without rounding either logarithm first
        ratio = torch.log1p((rest - rest_y) / (1 + rest_y))
        merged.gap, merged.log_sum_ratio = max_z - max_y, ratio
        if "w" in part or "u" in part:
            between = (part["n"] - part["m"]) - (max_y - max_z)  # of a shard's maxima, against the global ones
            between.masked_fill_((part["n"] == -torch.inf) | (part["m"] == -torch.inf), 0.0)
        if "w" in part:
            out["forward_kl"] = _weighted(scale_y, part["w"] + count_y * between) / (1 + rest_y) + ratio
        if "u" in part:
            out["reverse_kl"] = _weighted(scale, part["u"] - count * between) / (1 + rest) - ratio
        if "y_at_k" in part:
            y_at_k = part["y_at_k"].gather(0, winner).squeeze(0)
            merged.log_q_at_k = (y_at_k - max_y) - log_b
            merged.difference_at_k = (y_at_k - max_y) + ratio
    return merged


def _combine(maxima: torch.Tensor, rests: torch.Tensor):
    """Global maximum M, the rank that has it, m - M, exp(m - M), 1 + rest, and the global sum without M's own term."""
    if maxima.shape[0] == 1:
        zero = torch.zeros_like(maxima)
        return maxima[0], zero.long(), zero, zero + 1, 1 + rests, rests[0]
    maximum, winner = maxima.max(dim=0, keepdim=True)
    scale = (maxima - maximum).exp()
    # An empty shard has maximum -inf: its scale is 0, and its distance must not turn 0 * inf into NaN.
    shift = (maxima - maximum).masked_fill(maxima == -torch.inf, 0.0)
    count = 1 + rests
    rest = (scale * count).scatter_(0, winner, rests.gather(0, winner)).sum(0)
    return maximum.squeeze(0), winner, shift, scale, count, rest


def _weighted(scale: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (scale * value).masked_fill_(scale == 0, 0.0).sum(0)


def divergence_sums(
    z: torch.Tensor, y: torch.Tensor, merged: Merged, plan: Plan, masked: bool
) -> tuple[torch.Tensor, bool]:
    """[C, 2] of a shard: the mixture divergence's terms, and sum of p (c - c at the student's most likely token).

    Also whether minus infinities have been met, here or (``masked``) in ``statistics``.
    """
    if z.shape[1] == 0:
        return z.new_zeros(z.shape[0], 2, dtype=torch.float64), masked
    sums = _mixture_sums(z, y, merged, plan, masked)
    if masked or bool(torch.isfinite(sums).all()):
        return sums, masked
    return _mixture_sums(z, y, merged, plan, True), True


def _mixture_sums(z, y, merged: Merged, plan: Plan, masked: bool) -> torch.Tensor:
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
    """c at the student's most likely token [C]; subtracting it everywhere keeps confident tokens exact in float32."""
    at_k = (-merged.log_sum_z, merged.log_q_at_k, merged.difference_at_k)
    return mixture_terms(*at_k, plan.mixture, plan.beta, True)[1]


def _log_probs(z, y, merged, block):
    log_p = (z[block] - merged.max_z[block].unsqueeze(1)).sub_(merged.log_sum_z[block].unsqueeze(1))
    return log_p, (y[block] - merged.max_y[block].unsqueeze(1)).sub_(merged.log_sum_y[block].unsqueeze(1))


def _columns(merged: Merged, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    return merged.gap[block].unsqueeze(1), merged.log_sum_ratio[block].unsqueeze(1)


def _log_ratio(z, y, gap, log_sum_ratio):
    """log p - log q; z - y first, which is exact where the models nearly agree."""
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
    """d(sum of cotangent * output)/dz of a shard, written to ``out`` [C, columns], which may be ``z``.

    cotangents: [C] by output name.
    """
    if z.shape[1] == 0:
        return out
    rows = block_rows(z)
    constants = _GradientConstants(merged, cotangents, plan, z.dtype)
    for start in range(0, z.shape[0], rows):
        block = slice(start, start + rows)
        delta = _block_gradient(z[block], None if y is None else y[block], constants.rows(block), masked)
        if "log_probs" in cotangents:
            hit = cotangents["log_probs"][block].masked_fill(~owned[block], 0.0).unsqueeze(1)
            delta.scatter_add_(1, target[block].unsqueeze(1), hit)
        out[block] = delta
    return out


class _GradientConstants:
    """Per-token numbers of the gradient as columns [C, 1]; each is ``None`` where its term does not occur.

    With s = z - max z and t = y - max y, the gradient is
        forward exp(t) expm1(x) + exp(s) (reverse x + entropy s + mixture c + level),    x = log p - log q,
    where the normalisers exp(-log_sum) are folded into the row factors.
    """

    def __init__(self, merged: Merged, cotangents: dict[str, torch.Tensor], plan: Plan, dtype):
        self.plan, out = plan, merged.outputs
        scale_p = torch.exp(-merged.log_sum_z)
        self.max_z, self.max_y = merged.max_z, merged.max_y
        self.gap, self.log_sum_ratio = merged.gap, merged.log_sum_ratio
        self.log_sum_z, self.log_sum_y = merged.log_sum_z, merged.log_sum_y
        self.forward = self.reverse = self.entropy = self.mixture = None
        level = torch.zeros_like(merged.max_z)
        if "forward_kl" in cotangents:
            self.forward = cotangents["forward_kl"] * torch.exp(-merged.log_sum_y)
            self.forward_p = cotangents["forward_kl"] * scale_p
        if "reverse_kl" in cotangents:
            self.reverse = cotangents["reverse_kl"] * scale_p
            level = level - self.reverse * out["reverse_kl"]
        if "entropy" in cotangents:
            self.entropy = -cotangents["entropy"] * scale_p
            level = level + self.entropy * (out["entropy"] - merged.log_sum_z)
        if plan.mixture in cotangents:
            self.mixture = cotangents[plan.mixture] * scale_p
            level = level - self.mixture * (mixture_slope_at_k(merged, plan) + merged.expected_slope)
        if "log_probs" in cotangents:
            level = level - cotangents["log_probs"] * scale_p
        self.level = level if set(cotangents) != {"forward_kl"} else None
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(dtype))

    def rows(self, block: slice) -> _GradientConstants:
        """The constants of a block of tokens, as columns."""
        part = object.__new__(_GradientConstants)
        for name, value in vars(self).items():
            setattr(part, name, value[block].unsqueeze(1) if isinstance(value, torch.Tensor) else value)
        return part


def _block_gradient(z: torch.Tensor, y: torch.Tensor | None, row: _GradientConstants, masked: bool) -> torch.Tensor:
    delta = None
    ratio = None
    if row.forward is not None or row.reverse is not None or row.mixture is not None:
        ratio = _log_ratio(z, y, row.gap, row.log_sum_ratio)
    if row.forward is not None:
        delta = _p_minus_q(z, y, ratio, row, masked)
    if row.level is None:
        return delta
    factor = None  # of exp(s)
    if row.entropy is not None:
        factor = (z - row.max_z).mul_(row.entropy)
    if row.mixture is not None:
        log_p, log_q = (z - row.max_z).sub_(row.log_sum_z), (y - row.max_y).sub_(row.log_sum_y)
        slope = mixture_terms(log_p, log_q, -ratio, row.plan.mixture, row.plan.beta, masked)[1].mul_(row.mixture)
        factor = slope if factor is None else factor.add_(slope)
    if row.reverse is not None:
        pull = ratio.mul_(row.reverse)
        factor = pull if factor is None else factor.add_(pull)
    factor = row.level if factor is None else factor.add_(row.level)
    p = (z - row.max_z).exp_()
    impossible = p == 0 if masked else None
    p.mul_(factor)
    if masked:
        p.masked_fill_(impossible, 0.0)
    return p if delta is None else delta.add_(p)


def _p_minus_q(z, y, ratio: torch.Tensor, row: _GradientConstants, masked: bool) -> torch.Tensor:
    """cotangent * (p - q) through expm1 of log p - log q: exact to rounding where p and q nearly agree."""
    if not ratio.is_cuda and not masked and bool(ratio.amax() < 30.0):
        return torch.expm1(ratio).mul_((y - row.max_y).exp_()).mul_(row.forward)
    # max(p, q) expm1(-|log p - log q|): the larger side leads, so that nothing overflows
    if masked:
        ratio = torch.nan_to_num(ratio, nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    p, q = (z - row.max_z).exp_().mul_(row.forward_p), (y - row.max_y).exp_().mul_(row.forward)
    larger = torch.where(ratio > 0, p, q)
    return torch.expm1(-ratio.abs()).mul_(larger).mul_(-torch.sign(ratio))
