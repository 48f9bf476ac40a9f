"""Products of Megatron's linear layers in passes without gradients, on a CPU: scores and hidden states.

See ``matrix_products.py``. Training is in ``weight_gradients.py``, decoding in ``models/packed_weights.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_s2d import matrix_products
from megatron_s2d.parallel import device


def replace_frozen_products(chunks: Sequence[torch.nn.Module]) -> None:
    """Let linear layers multiply by ``matrix_products`` where no gradient is asked for; on a GPU leave them alone."""
    if device.capabilities().cuda:
        return
    for module in itertools.chain.from_iterable(chunk.modules() for chunk in chunks):
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module._forward_impl = _Forward(module._forward_impl)


class _Forward:
    """Replaces the product of one of Megatron's linear layers."""

    def __init__(self, original: Any):
        self._original = original

    def __call__(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options: Any
    ) -> torch.Tensor:
        """Return ``input`` [..., in] times ``weight`` [out, in], plus ``bias``; options: Megatron's."""
        if torch.is_grad_enabled() or options["sequence_parallel"]:
            return self._original(input=input, weight=weight, bias=bias, **options)
        return matrix_products.linear(input, weight, bias)
