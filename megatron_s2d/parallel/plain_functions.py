"""Imported before Megatron-Core: without a GPU, its small fused functions stay plain PyTorch.

Megatron compiles them (``torch.compile``) where its modules define them. On a CPU the first call of each then needs a
C++ compiler and some seconds, and loading PyTorch's own compiler takes a sixth of the time in which a run starts.
Kernels for GPUs that SGLang installs, and which Megatron imports where it finds them, take a quarter of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_s2d.parallel.cuda_variables import installed_gpus

_GPU_KERNELS = ("flashinfer", "quack", "flash_attn")


def _same(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stand for ``torch.compile``, as a decorator with and without arguments."""
    return _same if function is None else function


def _import_for_cpu() -> None:
    hidden = [name for name in _GPU_KERNELS if name not in sys.modules]
    compile_ = torch.compile
    torch.compile = _same
    sys.modules |= dict.fromkeys(hidden)  # their imports fail
    try:
        import megatron.core.jit
        import megatron.core.models.gpt.gpt_layer_specs  # and all that it needs
    finally:
        torch.compile = compile_
        for name in hidden:
            del sys.modules[name]
    megatron.core.jit.disable_jit_fuser()  # for what is imported later


# PyTorch is asked only where there is no driver: its answer starts CUDA, and processes are forked after the imports.
if "megatron.core" not in sys.modules and installed_gpus() is None and not torch.cuda.is_available():
    _import_for_cpu()
