"""Weights in the order in which the processor multiplies a few rows with them, for decoding on a CPU.

MKL brings a matrix into an order of its own before it multiplies, at every call. With a few rows that takes as long as
the product itself; here it is done once. Such a copy is for a number of rows; fewer are padded with zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_s2d import buffer_sizes

_ROWS = (8, 16, 32, 64)  # of copies; with more rows they gain nothing


@contextlib.contextmanager
def packed_weights(chunk: GPTModel) -> Iterator[None]:
    """Multiply with copies of the large float32 matrices of linear layers inside the block, on a CPU with MKL.

    Nothing may change the weights inside the block. Results change by rounding only. Costs a copy of the matrices, that
    of the embedding included if it is the output layer too.
    """
    replaced: list[tuple[torch.nn.Module, Any]] = []
    try:
        for module in chunk.modules():
            weight = _weight_of(module, chunk)
            if weight is not None and is_worth_packing(weight):
                replaced.append((module, vars(module).get("_forward_impl")))
                module._forward_impl = PackedProduct(weight, shrinks=not getattr(module, "is_expert", False))
        yield
    finally:
        for module, original in replaced:
            if original is None:
                del module._forward_impl
            else:
                module._forward_impl = original


def _weight_of(module: torch.nn.Module, chunk: GPTModel) -> torch.Tensor | None:
    """Return the matrix that a linear layer multiplies with; None for other modules."""
    if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
        return None
    if chunk.post_process and module is chunk.output_layer and chunk.share_embeddings_and_output_weights:
        return chunk.shared_embedding_or_output_weight()
    return module.weight


def is_worth_packing(weight: torch.Tensor) -> bool:
    """Return whether products with ``weight`` are faster with a copy."""
    if weight.is_cuda or weight.dtype != torch.float32 or not torch.backends.mkl.is_available():
        return False
    return weight.numel() >= buffer_sizes.FEWEST_PACKED_VALUES


class PackedProduct:
    """Replaces the product of one of Megatron's linear layers: input [..., in] to [..., out]."""

    def __init__(self, weight: torch.Tensor, *, shrinks: bool = True):
        """shrinks: whether far fewer rows than before stay few, so that a copy for them pays; those of experts vary."""
        self._weight, self._shrinks = weight.detach(), shrinks
        self._packed: torch.Tensor | None = None
        self._rows = 0  # that the copy is for

    def __call__(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **_unused: Any
    ) -> torch.Tensor:
        """Return ``input`` times the weight, plus ``bias``; the other arguments are Megatron's."""
        return self.multiply(input, bias)

    def multiply(self, input: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``input`` [..., in] times the weight [out, in], plus ``bias`` [out], as [..., out]."""
        rows = input.numel() // input.shape[-1]
        if not 0 < rows <= _ROWS[-1]:
            return F.linear(input, self._weight, bias)
        if rows > self._rows or (self._shrinks and 4 * rows <= self._rows > _ROWS[0]):
            self._pack(rows)
        if rows == self._rows:
            return torch.ops.mkl._mkl_linear(input, self._packed, self._weight, bias, rows)
        padded = F.pad(input.reshape(rows, -1), (0, 0, 0, self._rows - rows))
        output = torch.ops.mkl._mkl_linear(padded, self._packed, self._weight, bias, self._rows)
        return output[:rows].view(*input.shape[:-1], -1)

    def _pack(self, rows: int) -> None:
        self._rows, self._packed = next(size for size in _ROWS if size >= rows), None
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(self._weight, self._rows)
