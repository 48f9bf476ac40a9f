"""Reports which implementation each part of the trainer uses on this machine, and what a faster one needs.

The choice depends on the installed packages and on the chip (``parallel/device.py``); none is a setting. ``s2d doctor``
prints the report.
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
class Backend:
    """The implementation of one part of the trainer."""

    part: str
    active: str  # the implementation in use
    drawback: str  # what it lacks compared with the fastest one, and how to get that; empty for the fastest


def active_backends(capabilities: Capabilities, *, triton_problem: str) -> list[Backend]:
    """Return the implementation of every part; ``triton_problem``: why Triton cannot be used, empty if it can."""
    return [
        _layers(capabilities),
        _attention(capabilities),
        _fp8(capabilities),
        _optimizer(capabilities),
        _gradient_accumulation(capabilities),
        _kl(capabilities, triton_problem),
    ]


def _layers(capabilities: Capabilities) -> Backend:
    if capabilities.transformer_engine:
        return Backend("layers", "Transformer Engine: fused norm and GEMM, fused rotary embedding and activation", "")
    drawback = "norms, rotary embedding and activation run as separate kernels that save more for the backward pass"
    return Backend("layers", "Megatron's linear layers, PyTorch's norm", _with_remedy(capabilities, drawback))


def _attention(capabilities: Capabilities) -> Backend:
    if capabilities.transformer_engine:
        return Backend("attention", "Transformer Engine for packed sequences, PyTorch's kernels for others", "")
    if capabilities.cuda:
        drawback = "context-parallel ranks gather all keys and values instead of passing them on"
        return Backend(
            "attention",
            "PyTorch's FlashAttention and, with masks, its memory-efficient kernel",
            f"{drawback}; {_INSTALL}",
        )
    drawback = "one call for each packed sequence"
    return Backend("attention", "PyTorch's scaled_dot_product_attention", _with_remedy(capabilities, drawback))


def _fp8(capabilities: Capabilities) -> Backend:
    if not capabilities.transformer_engine:
        return Backend("FP8", "none", _with_remedy(capabilities, "GEMMs run in bfloat16 or float32"))
    usable = [name for name in RECIPES if _refusal(name, capabilities) is None]
    if not usable:
        return Backend("FP8", "none", _refusal("tensorwise", capabilities))
    unsupported = [name for name in RECIPES if name not in usable]
    note = f"not on this machine: {', '.join(unsupported)}" if unsupported else ""
    return Backend("FP8", f"{', '.join(usable)} (if the workflow sets fp8)", note)


def _refusal(name: str, capabilities: Capabilities) -> str | None:
    if capabilities.cuda_version < RECIPES[name].least_cuda:
        return f"{name} needs CUDA {'.'.join(map(str, RECIPES[name].least_cuda))}"
    try:
        check_chip(Fp8Config(recipe=name), capabilities.compute_capability, capabilities.device_name)
    except UserError as error:
        return str(error)
    return None


def _optimizer(capabilities: Capabilities) -> Backend:
    if capabilities.transformer_engine:
        return Backend("optimizer", "Transformer Engine's fused Adam", "")
    if capabilities.apex:
        return Backend("optimizer", "apex's fused Adam", "")
    drawback = "a step reads and writes the state in several passes, and clips gradients tensor by tensor"
    return Backend("optimizer", "PyTorch's AdamW", _with_remedy(capabilities, drawback))


def _gradient_accumulation(capabilities: Capabilities) -> Backend:
    if capabilities.transformer_engine or capabilities.apex_gradient_accumulation:
        owner = "Transformer Engine's" if capabilities.transformer_engine else "apex's"
        return Backend("gradient accumulation", f"{owner} GEMMs accumulate into the float32 buffers", "")
    drawback = "each weight gradient is materialised before it is added: more memory, and one more pass over it"
    return Backend("gradient accumulation", "autograd, then a separate addition", _with_remedy(capabilities, drawback))


def _kl(capabilities: Capabilities, triton_problem: str) -> Backend:
    if capabilities.cuda and not triton_problem:
        return Backend("divergences", "Triton kernels, one pass over each chunk of logits", "")
    if capabilities.cuda:
        return Backend("divergences", "PyTorch", f"several passes over each chunk of logits: {triton_problem}")
    return Backend("divergences", "PyTorch, in blocks that fit the CPU cache", "")


def _with_remedy(capabilities: Capabilities, drawback: str) -> str:
    return f"{drawback}; {_INSTALL if capabilities.cuda else 'no CUDA device'}"
