"""Which implementation each part of the trainer takes on this machine, and what it would gain from another.

Choices follow what imports and what the chip has (``parallel/device.py``); none is a setting. Printed by ``s2d doctor``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from megatron_s2d.config.precision import RECIPES, Fp8Config, check_chip
from megatron_s2d.errors import UserError

if TYPE_CHECKING:
    from megatron_s2d.parallel.device import Capabilities

_INSTALL = "install megatron-s2d[gpu] (docs/gpu.md)"


@dataclasses.dataclass(frozen=True)
class ActivePath:
    """One part of the trainer."""

    part: str
    active: str  # what is used
    cost: str  # what it lacks beside the fastest, and how to get that; empty where it is the fastest


def active_paths(found: Capabilities, *, triton: bool) -> list[ActivePath]:
    """One line a part; ``triton``: whether it imports."""
    return [
        _layers(found),
        _attention(found),
        _fp8(found),
        _optimizer(found),
        _gradient_accumulation(found),
        _kl(found, triton),
    ]


def _layers(found: Capabilities) -> ActivePath:
    if found.transformer_engine:
        return ActivePath("layers", "Transformer Engine: norm and product fused, fused rotation and activation", "")
    cost = "norms, rotation and activation are kernels of their own that keep more for the backward pass"
    return ActivePath("layers", "Megatron's linear layers, PyTorch's norm", _with_remedy(found, cost))


def _attention(found: Capabilities) -> ActivePath:
    if found.transformer_engine:
        return ActivePath("attention", "Transformer Engine (cuDNN or FlashAttention); packed sequences in one call", "")
    cost = "packed sequences are one call each, and key heads are repeated where a kernel needs it"
    return ActivePath("attention", "PyTorch's scaled_dot_product_attention", _with_remedy(found, cost))


def _fp8(found: Capabilities) -> ActivePath:
    if not found.transformer_engine:
        return ActivePath("FP8", "none", _with_remedy(found, "products run in bfloat16 or float32"))
    usable = [name for name in RECIPES if _refusal(name, found) is None]
    if not usable:
        return ActivePath("FP8", "none", _refusal("tensorwise", found))
    lacking = [name for name in RECIPES if name not in usable]
    note = "" if not lacking else f"not on this machine: {', '.join(lacking)}"
    return ActivePath("FP8", f"{', '.join(usable)} (where a workflow sets fp8)", note)


def _refusal(name: str, found: Capabilities) -> str | None:
    if found.cuda_version < RECIPES[name].least_cuda:
        return f"{name} needs CUDA {'.'.join(map(str, RECIPES[name].least_cuda))}"
    try:
        check_chip(Fp8Config(recipe=name), found.compute_capability, found.device_name)
    except UserError as error:
        return str(error)
    return None


def _optimizer(found: Capabilities) -> ActivePath:
    if found.transformer_engine:
        return ActivePath("optimizer", "Transformer Engine's fused Adam", "")
    if found.apex:
        return ActivePath("optimizer", "apex's fused Adam", "")
    cost = "an update reads and writes the state in several passes, and clipping is one operation a tensor"
    return ActivePath("optimizer", "PyTorch's AdamW", _with_remedy(found, cost))


def _gradient_accumulation(found: Capabilities) -> ActivePath:
    if found.transformer_engine or found.apex_gradient_accumulation:
        owner = "Transformer Engine's" if found.transformer_engine else "apex's"
        return ActivePath("gradient accumulation", f"{owner} products add to the float32 buffers", "")
    cost = "each weight gradient is made first and then added: its memory, and one more pass over it"
    return ActivePath("gradient accumulation", "autograd, then an addition", _with_remedy(found, cost))


def _kl(found: Capabilities, triton: bool) -> ActivePath:
    if found.cuda and triton:
        return ActivePath("divergences", "Triton kernels, one pass over a chunk of logits", "")
    if found.cuda:
        return ActivePath("divergences", "PyTorch", "several passes over every chunk of logits; install triton")
    return ActivePath("divergences", "PyTorch, in blocks that fit a CPU's cache", "")


def _with_remedy(found: Capabilities, cost: str) -> str:
    return f"{cost}; {_INSTALL}" if found.cuda else f"{cost}; no CUDA device"
