"""Imported before Megatron-Core: without a GPU, its small fused functions stay plain PyTorch.

Megatron compiles them (``torch.compile``) where its modules define them. On a CPU the first call of each then needs a
C++ compiler and some seconds, and loading PyTorch's own compiler takes a sixth of the time in which a run starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_s2d.parallel.cuda_variables import installed_gpus


def _same(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stand for ``torch.compile``, as a decorator with and without arguments."""
    return _same if function is None else function


def _import_uncompiled() -> None:
    compile_ = torch.compile
    torch.compile = _same
    try:
        import megatron.core.jit
        import megatron.core.transformer.moe.router  # which names torch.compile itself
    finally:
        torch.compile = compile_
    megatron.core.jit.disable_jit_fuser()  # for what is imported later


# PyTorch is asked only where there is no driver: its answer starts CUDA, and processes are forked after the imports.
if "megatron.core" not in sys.modules and installed_gpus() is None and not torch.cuda.is_available():
    _import_uncompiled()
