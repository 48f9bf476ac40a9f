"""Triton kernels with the signatures of the shard-local functions of ``kl/torch_backend.py``, for float32 CUDA logits.

Each is one pass over the chunk's logits: ``statistics`` reads both sides once, online; ``logits_gradient`` reads both
and writes the gradient in the dtype of the next product. Minus infinities are always masked, so no kernel waits for the
host. Sums are float32 per lane and then a tree; merging is shared with the PyTorch backend.

Not supported: float64, and top-k supports (few columns, computed in PyTorch).

Shapes: c tokens of the chunk, v_tp local vocabulary columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_s2d.errors import UserError
from megatron_s2d.kl.merge import Merged, Plan, empty_statistics
from megatron_s2d.kl.torch_backend import GradientConstants, mixture_slope_at_k

_KINDS = {None: 0, "jsd": 1, "skew_forward_kl": 2, "skew_reverse_kl": 3}
_STATISTICS = ("m", "ta", "e", "n", "tb", "w", "u", "y_at_k", "target")
_CONSTANTS = (
    "max_z", "log_sum_z", "max_y", "log_sum_y", "gap", "forward", "forward_p", "reverse", "entropy", "mixture",
    "level", "log_sum_ratio",
)  # fmt: skip
_STATISTICS_BLOCK = 2048
_BLOCK = 1024


def require(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``UserError`` for float64, and for devices that Triton does not compile for (its interpreter takes any)."""
    if dtype != torch.float32:
        raise UserError(f"backend triton computes in float32, not {dtype}: use backend auto or torch")
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise UserError(f"backend triton needs CUDA tensors, got {device.type}: use backend auto or torch")


def statistics(
    z: torch.Tensor, y: torch.Tensor | None, target: torch.Tensor | None, owned: torch.Tensor | None, plan: Plan
) -> tuple[torch.Tensor, bool]:
    """As ``torch_backend.statistics``; always reports that minus infinities may occur."""
    if z.shape[1] == 0:
        return empty_statistics(z, plan), True
    stats = torch.empty(z.shape[0], len(_STATISTICS), dtype=torch.float32, device=z.device)
    has_teacher = plan.has_teacher
    teacher = y if y is not None and has_teacher else z
    if z.shape[0]:
        _statistics_kernel[(z.shape[0],)](
            z, teacher, stats, z.stride(0), teacher.stride(0),
            COLUMNS=z.shape[1], WIDTH=len(_STATISTICS), HAS_TEACHER=has_teacher, BLOCK=_block(z, _STATISTICS_BLOCK),
            num_warps=8,
        )  # fmt: skip
    if "target" in plan.columns:
        assert target is not None and owned is not None
        stats[:, -1] = z.gather(1, target.unsqueeze(1)).squeeze(1).masked_fill(~owned, 0.0)
    # An index by list would be copied from the host.
    return torch.stack([stats[:, _STATISTICS.index(name)] for name in plan.columns], dim=1).double(), True


def divergence_sums(
    z: torch.Tensor, y: torch.Tensor, merged: Merged, plan: Plan, masked: bool
) -> tuple[torch.Tensor, bool]:
    """As ``torch_backend.divergence_sums``."""
    sums = torch.zeros(z.shape[0], 2, dtype=torch.float32, device=z.device)
    if z.shape[1] and z.shape[0]:
        rows = merged.to(torch.float32)
        assert rows.max_y is not None and rows.log_sum_y is not None
        assert rows.gap is not None and rows.log_sum_ratio is not None
        constants = [rows.max_z, rows.log_sum_z, rows.max_y, rows.log_sum_y, rows.gap, rows.log_sum_ratio]
        table = torch.stack([*constants, mixture_slope_at_k(merged, plan).float()], dim=1)
        _sums_kernel[(z.shape[0],)](
            z, y, table, sums, z.stride(0), y.stride(0), plan.beta, COLUMNS=z.shape[1],
            KIND=_KINDS[plan.mixture], BLOCK=_block(z, _BLOCK), num_warps=4,
        )  # fmt: skip
    return sums.double(), True


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
    """As ``torch_backend.logits_gradient``."""
    if not z.numel():
        return out
    row = GradientConstants(merged, cotangents, plan, torch.float32)
    zero = torch.zeros_like(row.max_z)
    values = [getattr(row, name, None) for name in _CONSTANTS]
    on_target = zero
    if "log_probs" in cotangents:
        assert owned is not None
        on_target = cotangents["log_probs"].masked_fill(~owned, 0.0)
    table = torch.stack([*(zero if value is None else value for value in values), on_target.float()], dim=1)
    teacher = y if row.needs_teacher else None
    block = _block(z, _BLOCK)
    _gradient_kernel[(z.shape[0], triton.cdiv(z.shape[1], block))](
        z, z if teacher is None else teacher, out, table, table if target is None else target,
        z.stride(0), (z if teacher is None else teacher).stride(0), out.stride(0), plan.beta or 0.0, z.shape[1],
        WIDTH=len(_CONSTANTS) + 1, HAS_TEACHER=teacher is not None, FORWARD=row.forward is not None,
        REVERSE=row.reverse is not None, ENTROPY=row.entropy is not None, FACTOR=row.level is not None,
        KIND=_KINDS[plan.mixture] if row.mixture is not None else 0,
        ON_TARGET="log_probs" in cotangents, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def _block(z: torch.Tensor, largest: int) -> int:
    return min(largest, int(triton.next_power_of_2(z.shape[1])))


@triton.jit
def _expm1(x):
    # Below 0.5 a polynomial: exp(x) - 1 would lose the digits that the divergence is made of.
    small = 1 / 40320 + x * (1 / 362880)
    small = 1 / 5040 + x * small
    small = 1 / 720 + x * small
    small = 1 / 120 + x * small
    small = 1 / 24 + x * small
    small = 1 / 6 + x * small
    small = 0.5 + x * small
    return tl.where(tl.abs(x) < 0.5, x + x * x * small, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    # 2 atanh(x / (2 + x)) for -0.5 <= x <= 0; the fast logarithm near 1 has a fixed absolute error.
    s = x / (2.0 + x)
    square = s * s
    series = 1 / 13 + square * (1 / 15)
    series = 1 / 11 + square * series
    series = 1 / 9 + square * series
    series = 1 / 7 + square * series
    series = 1 / 5 + square * series
    series = 1 / 3 + square * series
    return tl.where(x > -0.5, 2.0 * s * (1.0 + square * series), tl.log(1.0 + x))


@triton.jit
def _times(weight, value):
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _mixture(log_p, log_q, difference, beta, KIND: tl.constexpr):
    """Terms and slope of ``jsd.mixture_terms``; difference = log q - log p."""
    if KIND == 3:
        log_p, log_q = log_q, log_p
        difference = -difference
    infinity = float("inf")
    difference = tl.where((log_p == -infinity) & (log_q == -infinity), 0.0, difference)
    decay = _expm1(-tl.abs(difference))
    first = difference > 0
    mixed = tl.where(first, 1.0 - beta, beta) * decay
    log_mixed = _log1p(mixed)
    log_q_over_m = tl.where(first, 0.0, difference) - log_mixed
    log_p_over_m = tl.where(first, -difference, 0.0) - log_mixed
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == 1:
        terms = beta * _times(q, log_q_over_m) + (1.0 - beta) * _times(p, log_p_over_m)
        slope = (1.0 - beta) * log_p_over_m
    else:
        signed = tl.where(first, -(1.0 - beta) * decay, (1.0 - beta) * decay)
        excess = signed / (1.0 + mixed)
        terms = _times(q, log_q_over_m) - signed * tl.exp(tl.maximum(log_p, log_q))
        if KIND == 2:
            slope = -(1.0 - beta) * excess
        else:
            slope = log_q_over_m - beta * excess
    return terms, slope


@triton.jit
def _moved(old, best):
    """Merge a running maximum with that of another block.

    Returns the new maximum, the same made finite, the step from the old one to it, exp of the step, and the weight with
    which a replaced maximum is added to the sums.
    """
    new = tl.maximum(old, best)
    finite = tl.where(new == -float("inf"), 0.0, new)
    step = tl.where(old == -float("inf"), 0.0, old - finite)
    scale = tl.exp(step)
    joined = tl.where((old > -float("inf")) & (best > old), scale, 0.0)
    return new, finite, step, scale, joined


@triton.jit
def _statistics_kernel(
    z_ptr, y_ptr, out_ptr, z_stride, y_stride,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, online: when a maximum grows, all sums move to the new reference, the cross terms linearly.

    The lanes' sums leave out the running maxima, at columns k and j; a replaced maximum is added to the scalars
    ``*_x``. One function, because a helper would take and return all sixteen running values.
    """
    row = tl.program_id(0).to(tl.int64)
    infinity = float("inf")
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float32)
    zero = tl.full([], 0.0, tl.float32)
    ta, e, u, tb, w = zeros, zeros, zeros, zeros, zeros
    ta_x, e_x, u_x, tb_x, w_x, y_at_k, z_at_j = zero, zero, zero, zero, zero, zero, zero
    m, n = zero - infinity, zero - infinity
    k, j = tl.full([], -1, tl.int32), tl.full([], -1, tl.int32)
    for start in range(0, COLUMNS, BLOCK):
        columns = start + lanes
        z = tl.load(z_ptr + row * z_stride + columns, mask=columns < COLUMNS, other=-infinity)
        best = tl.max(z, 0)
        grows = best > m
        if HAS_TEACHER:
            y = tl.load(y_ptr + row * y_stride + columns, mask=columns < COLUMNS, other=-infinity)
            best_y = tl.max(y, 0)
            grows = grows | (best_y > n)
        if grows:  # a few times a row; all other blocks only add
            k = tl.where(best > m, start + tl.argmax(z, 0), k)
            m, m_safe, dz, scale, joined = _moved(m, best)
            if HAS_TEACHER:
                j = tl.where(best_y > n, start + tl.argmax(y, 0), j)
                grown, grown_y = columns == k, columns == j
                n, n_safe, dy, scale_y, joined_y = _moved(n, best_y)
                u = scale * (u + ta * (dz - dy))
                u_x = scale * (u_x + ta_x * (dz - dy)) + _times(joined, dz - (y_at_k - n_safe))
                w = scale_y * (w + tb * (dy - dz))
                w_x = scale_y * (w_x + tb_x * (dy - dz)) + _times(joined_y, dy - (z_at_j - m_safe))
                tb = scale_y * tb
                tb_x = scale_y * tb_x + joined_y
                y_at_k = tl.where(k >= start, tl.sum(tl.where(grown, y, 0.0), 0), y_at_k)
                z_at_j = tl.where(j >= start, tl.sum(tl.where(grown_y, z, 0.0), 0), z_at_j)
            e = scale * (e + ta * dz)
            e_x = scale * (e_x + ta_x * dz) + _times(joined, dz)
            ta = scale * ta
            ta_x = scale * ta_x + joined
        m_safe = tl.where(m == -infinity, 0.0, m)
        a = z - m_safe
        pa = tl.where(columns == k, 0.0, tl.exp(a))
        if HAS_TEACHER:
            n_safe = tl.where(n == -infinity, 0.0, n)
            difference = (y - z) - (n_safe - m_safe)
            pb = tl.where(columns == j, 0.0, tl.exp(y - n_safe))
            u -= _times(pa, difference)
            w += _times(pb, difference)
            tb += pb
        e += _times(pa, a)
        ta += pa
    out = out_ptr + row * WIDTH
    tl.store(out, m)
    tl.store(out + 1, tl.sum(ta, 0) + ta_x)
    tl.store(out + 2, tl.sum(e, 0) + e_x)
    if HAS_TEACHER:
        # The maxima's own terms: weight 1, distance 0 from one maximum, the rest from the other.
        final_u = tl.where(m == -infinity, 0.0, n - y_at_k)
        final_w = tl.where(n == -infinity, 0.0, m - z_at_j)
        tl.store(out + 3, n)
        tl.store(out + 4, tl.sum(tb, 0) + tb_x)
        tl.store(out + 5, tl.sum(w, 0) + w_x + final_w)
        tl.store(out + 6, tl.sum(u, 0) + u_x + final_u)
        tl.store(out + 7, y_at_k)


@triton.jit
def _sums_kernel(
    z_ptr, y_ptr, table_ptr, out_ptr, z_stride, y_stride, beta,
    COLUMNS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    max_z = tl.load(table_ptr + row * 7)
    log_sum_z = tl.load(table_ptr + row * 7 + 1)
    max_y = tl.load(table_ptr + row * 7 + 2)
    log_sum_y = tl.load(table_ptr + row * 7 + 3)
    gap = tl.load(table_ptr + row * 7 + 4)
    log_sum_ratio = tl.load(table_ptr + row * 7 + 5)
    slope_at_k = tl.load(table_ptr + row * 7 + 6)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    expected = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        columns = start + lanes
        valid = columns < COLUMNS
        z = tl.load(z_ptr + row * z_stride + columns, mask=valid, other=-float("inf"))
        y = tl.load(y_ptr + row * y_stride + columns, mask=valid, other=-float("inf"))
        log_p = (z - max_z) - log_sum_z
        difference = log_sum_ratio - ((z - y) - gap)
        terms, slope = _mixture(log_p, (y - max_y) - log_sum_y, difference, beta, KIND)
        total += tl.where(valid, terms, 0.0)
        expected += _times(tl.exp(log_p), slope - slope_at_k)
    tl.store(out_ptr + row * 2, tl.sum(total, 0))
    tl.store(out_ptr + row * 2 + 1, tl.sum(expected, 0))


@triton.jit
def _gradient_kernel(
    z_ptr, y_ptr, delta_ptr, table_ptr, target_ptr, z_stride, y_stride, delta_stride, beta, columns_total,
    WIDTH: tl.constexpr, HAS_TEACHER: tl.constexpr, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
    ENTROPY: tl.constexpr, FACTOR: tl.constexpr, KIND: tl.constexpr, ON_TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one row; the columns of the table are ``_CONSTANTS`` and the cotangent of the target."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < columns_total
    table = table_ptr + row * WIDTH
    z = tl.load(z_ptr + row * z_stride + columns, mask=valid, other=0.0)
    a = z - tl.load(table)
    delta = tl.zeros([BLOCK], tl.float32)
    if HAS_TEACHER:
        y = tl.load(y_ptr + row * y_stride + columns, mask=valid, other=0.0)
        b = y - tl.load(table + 2)
        ratio = ((z - y) - tl.load(table + 4)) - tl.load(table + 11)
        ratio = tl.where((z == -float("inf")) & (y == -float("inf")), 0.0, ratio)
        if FORWARD:
            student_leads = ratio > 0
            larger = tl.where(student_leads, tl.exp(a) * tl.load(table + 6), tl.exp(b) * tl.load(table + 5))
            part = _expm1(-tl.abs(ratio)) * larger
            delta += tl.where(student_leads, -part, part)
    if FACTOR:
        factor = tl.zeros([BLOCK], tl.float32) + tl.load(table + 10)
        if ENTROPY:
            factor += tl.load(table + 8) * a
        if HAS_TEACHER:
            if REVERSE:
                factor += tl.load(table + 7) * ratio
            if KIND > 0:
                _, slope = _mixture(a - tl.load(table + 1), b - tl.load(table + 3), -ratio, beta, KIND)
                factor += tl.load(table + 9) * slope
        delta += _times(tl.exp(a), factor)
    if ON_TARGET:
        delta += tl.where(columns == tl.load(target_ptr + row), tl.load(table + WIDTH - 1), 0.0)
    tl.store(delta_ptr + row * delta_stride + columns, delta.to(delta_ptr.dtype.element_ty), mask=valid)
