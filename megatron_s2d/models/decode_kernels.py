"""Triton kernels for the small operations of a decoded token: each does what takes PyTorch three to eleven launches.

Values are rounded where PyTorch's own operations round, so a decoded token sees the weights as a full forward does.
Import only where Triton can compile (``kl.chunk.triton_problem``); its interpreter runs them on a CPU in tests.

Shapes: b rows, n query heads, n_kv key/value heads, d head_dim, h hidden size, f columns of gate and of up, c columns
of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SWIGLU_BLOCK = 1024


def add_rms_norm(
    delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the RMSNorm of ``residual + delta`` and the sum itself, all [1, b, h].

    zero_centered: the norm multiplies by 1 + weight.
    """
    normed, total = torch.empty_like(residual), torch.empty_like(residual)
    columns = residual.shape[-1]
    block = triton.next_power_of_2(columns)
    _add_rms_norm_kernel[(residual.numel() // columns,)](
        delta.contiguous(), residual.contiguous(), weight, normed, total, eps,
        COLUMNS=columns, OFFSET=float(zero_centered), BLOCK=block, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return normed, total


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` [1, b, f] of the two halves of ``gate_up`` [1, b, 2 f]."""
    columns = gate_up.shape[-1] // 2
    output = gate_up.new_empty(*gate_up.shape[:-1], columns)
    grid = (output.numel() // columns, triton.cdiv(columns, _SWIGLU_BLOCK))
    _swiglu_kernel[grid](gate_up.contiguous(), output, columns, BLOCK=_SWIGLU_BLOCK, num_warps=4)
    return output


def norm_rotate_store(
    qkv: torch.Tensor,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    lengths: torch.Tensor,
    column: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
    zero_centered: bool = False,
) -> torch.Tensor:
    """Normalise and rotate queries and keys of one token, store key and value, and return the queries [1, b, n, d].

    qkv: [1, b, (n + 2 n_kv) d], by group: its queries, its key, its value. norm_weights: of queries and keys, [d] each;
    None: without norm. cos_sin: [positions, d] each, the sine of the first half negated. lengths: [b] int32, keys of
    each row with this one. column: [1] int64, where it is stored in ``keys`` and ``values`` [b, c, n_kv, d].
    """
    rows, capacity, num_groups, dim = keys.shape
    query = qkv.new_empty(1, rows, num_heads, dim)
    q_weight, k_weight = norm_weights or (cos_sin[0], cos_sin[0])
    _norm_rotate_store_kernel[(rows, num_heads + 2 * num_groups)](
        qkv.contiguous(), q_weight, k_weight, *cos_sin, lengths, column, query, keys, values, eps, capacity,
        HEADS=num_heads, GROUPS=num_groups, PER_GROUP=num_heads // num_groups, DIM=dim, NORM=norm_weights is not None,
        OFFSET=float(zero_centered), BLOCK=triton.next_power_of_2(dim), num_warps=1,
    )  # fmt: skip
    return query


@triton.jit
def _add_rms_norm_kernel(
    delta, residual, weight, normed, total, eps, COLUMNS: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    here = tl.program_id(0).to(tl.int64) * COLUMNS + columns
    added = tl.load(delta + here, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + here, rounded, mask=inside)
    wide = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / COLUMNS + eps)
    factor = OFFSET + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + here, (wide * scale * factor).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_kernel(gate_up, output, COLUMNS, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    gate = tl.load(gate_up + row * 2 * COLUMNS + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * COLUMNS + COLUMNS + columns, mask=inside, other=0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(output + row * COLUMNS + columns, product.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate_store_kernel(
    qkv, q_weight, k_weight, cos, sin, lengths, column, query, keys, values, eps, capacity,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, DIM: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)  # queries, then keys, then values
    dims = tl.arange(0, BLOCK)
    inside = dims < DIM
    partner = tl.where(dims < DIM // 2, dims + DIM // 2, dims - DIM // 2)  # the other half
    if head < HEADS:
        group = head // PER_GROUP
        slot = head % PER_GROUP
        weight = q_weight
    else:
        group = (head - HEADS) % GROUPS
        slot = PER_GROUP + (head - HEADS) // GROUPS
        weight = k_weight
    source = qkv + (row * GROUPS + group) * (PER_GROUP + 2) * DIM + slot * DIM
    x = tl.load(source + dims, mask=inside, other=0.0)
    if head < HEADS + GROUPS:
        other = tl.load(source + partner, mask=inside, other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / DIM + eps)
            factor = OFFSET + tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)
            x = (wide * scale * factor).to(x.dtype)
            factor = OFFSET + tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32)
            other = (other.to(tl.float32) * scale * factor).to(x.dtype)
        angle = (tl.load(lengths + row) - 1) * DIM + dims
        turned = (x.to(tl.float32) * tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        sine = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        x = (turned.to(tl.float32) + other.to(tl.float32) * sine).to(x.dtype)
    if head < HEADS:
        tl.store(query + (row * HEADS + head) * DIM + dims, x, mask=inside)
    else:
        stored = ((row * capacity + tl.load(column)) * GROUPS + group) * DIM + dims
        if head < HEADS + GROUPS:
            tl.store(keys + stored, x, mask=inside)
        else:
            tl.store(values + stored, x, mask=inside)
