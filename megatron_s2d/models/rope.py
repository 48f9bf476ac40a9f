"""Frequencies of rotary embeddings, and rotation of packed sequences without a wait for the device.

Megatron-Core rotates each sequence of a packed batch by itself, and asks the device for the lengths in every layer, for
queries and for keys. Here the position of every token is computed on the device, and all are rotated at once.

Shapes: t packed tokens of this context-parallel rank, n heads, d head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import rope_utils

from megatron_s2d.config.model_spec import LinearScaling, ModelSpec, RopeScaling, YarnScaling


def rotary_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Return the angular frequencies of a model's rotary table: [head_dim / 2] float32.

    Followed by as many for layers with a sliding window, if these have a base of their own.
    """
    frequencies = rope_frequencies(spec)
    if spec.sliding_rope_theta is None:
        return frequencies
    return torch.cat([frequencies, _unscaled(spec.sliding_rope_theta, spec.head_dim)])


def attention_factor(spec: ModelSpec) -> float:
    """Return the factor of rotated queries and keys."""
    return spec.rope_scaling.attention_factor if isinstance(spec.rope_scaling, YarnScaling) else 1.0


def rope_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Return the angular frequency of each pair of channels: [head_dim / 2] float32."""
    frequencies = _unscaled(spec.rope_theta, spec.head_dim)
    match spec.rope_scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case YarnScaling() as scaling:
            return _yarn(scaling, frequencies, spec)
        case RopeScaling() as scaling:
            return _llama3(scaling, frequencies)


def _unscaled(theta: float, dim: int) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / (theta**exponents)


def _llama3(scaling: RopeScaling, frequencies: torch.Tensor) -> torch.Tensor:
    """Return ``frequencies`` [d / 2] as Llama 3 scales them.

    Wavelengths shorter than original / high_freq_factor are unchanged, those longer than original / low_freq_factor are
    stretched by ``factor``, and between them the two blend linearly in 1 / wavelength.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(scaling: YarnScaling, frequencies: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """Return ``frequencies`` [d / 2] as YaRN scales them (Peng et al. 2023, section 3.2).

    Pairs that turn more often than beta_fast over the original positions are unchanged, those that turn less often than
    beta_slow are stretched by ``factor``, and between them the two blend linearly in the index of the pair.
    """

    def pair_with(turns: float) -> float:
        radians = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return spec.head_dim * math.log(radians) / (2 * math.log(spec.rope_theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    pairs = torch.arange(len(frequencies), dtype=torch.float32)
    stretched = ((pairs - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def packed_positions(cu_seqlens: torch.Tensor, num_tokens: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the position of every token of this rank in its sequence: [t] int64.

    cu_seqlens: int32 [sequences + 1], of all context ranks. With context parallelism a sequence is cut into twice as
    many pieces as there are ranks; rank r has the r-th from the front and from the back.
    """
    starts = (cu_seqlens // cp_size).long()  # of the sequences in this rank's tokens
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(starts, tokens, right=True) - 1
    index = tokens - starts[sequence]
    if cp_size == 1:
        return index
    half = (starts[sequence + 1] - starts[sequence]) // 2
    front = index < half
    return torch.where(front, cp_rank * half + index, (2 * cp_size - 1 - cp_rank) * half + index - half)


class _Rotation(torch.autograd.Function):
    """x cos + (-x2, x1) sin for halves x1, x2 of a head; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), signed_sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        turned = upstream.roll(upstream.shape[-1] // 2, -1)
        return torch.addcmul(upstream * cos, turned, signed_sin, value=-1), None, None


def rotate(
    t: torch.Tensor,
    freqs: torch.Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    **_unused: Any,
) -> torch.Tensor:
    """Replace Megatron's ``_apply_rotary_pos_emb_bshd``: rotate t [s, b, n, d] by ``freqs`` [s, b or 1, 1, d].

    In three passes over ``t`` instead of seven. Whole heads, in halves.
    """
    assert freqs.shape[-1] == t.shape[-1] and not rotary_interleaved and not mla_rotary_interleaved
    cos, signed_sin = torch.cos(freqs), torch.sin(freqs)
    signed_sin[..., : freqs.shape[-1] // 2].neg_()
    if mscale != 1.0:
        cos, signed_sin = cos * mscale, signed_sin * mscale
    rotated: torch.Tensor = _Rotation.apply(t, cos.to(t.dtype), signed_sin.to(t.dtype))  # type: ignore[no-untyped-call]
    return rotated


def rotate_packed(
    t: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    cp_group: dist.ProcessGroup | None = None,
    **_unused: Any,
) -> torch.Tensor:
    """Replace Megatron's ``_apply_rotary_pos_emb_thd``: rotate t [t, n, d] by ``freqs`` [positions, 1, 1, d]."""
    assert cp_group is not None
    positions = packed_positions(cu_seqlens, t.size(0), cp_group.size(), cp_group.rank())
    rotated = rotate(
        t.unsqueeze(1),
        freqs[positions],
        rotary_interleaved=rotary_interleaved,
        mla_rotary_interleaved=mla_rotary_interleaved,
        mscale=mscale,
    )
    return rotated.squeeze(1)


def use_own_rotation() -> None:
    """Make Megatron's attention rotate by ``rotate``, and packed sequences by ``rotate_packed``; idempotent."""
    rope_utils._apply_rotary_pos_emb_bshd = rotate
    rope_utils._apply_rotary_pos_emb_thd = rotate_packed
