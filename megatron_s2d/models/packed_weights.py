"""Weights in the order in which the processor reads them, for decoding on a CPU.

``F.linear`` calls MKL, which brings a matrix into an order of its own before it multiplies, at every call: with a few
rows that takes as long as the product itself. On processors of AMD it also leaves half of their vector units unused.
oneDNN, which PyTorch brings along too, multiplies with a copy in its order, and makes use of both.
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

# oneDNN leaves a matrix as it is, and multiplies three times slower, if its number of output features is a multiple of
# the first number (elements; such lines of the transposed matrix would share few sets of the cache) and below the
# second, from which on it takes blocks. A few more features avoid that.
_SLOW_MULTIPLE, _BLOCKED, _ADDED = 1024, 16384, 16


@contextlib.contextmanager
def packed_weights(chunk: GPTModel) -> Iterator[None]:
    """Multiply with copies of the large float32 matrices of linear layers inside the block, on a CPU.

    Nothing may change the weights inside the block. Results change by rounding only. Costs a copy of the matrices, that
    of the embedding included if it is the output layer too.
    """
    replaced: list[tuple[torch.nn.Module, Any]] = []
    try:
        for module in chunk.modules():
            weight = _weight_of(module, chunk)
            if weight is not None and is_worth_packing(weight):
                replaced.append((module, vars(module).get("_forward_impl")))
                module._forward_impl = PackedProduct(weight)
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
    if weight.is_cuda or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False  # not measured
    return weight.numel() >= buffer_sizes.FEWEST_PACKED_VALUES


class PackedProduct:
    """Replaces the product of one of Megatron's linear layers: input [..., in] to [..., out]."""

    def __init__(self, weight: torch.Tensor):
        """weight: [out, in] float32. The copy is made when the first product needs it."""
        self._weight = weight.detach()
        self._packed: torch.Tensor | None = None
        out = len(weight)
        self._added = _ADDED if out % _SLOW_MULTIPLE == 0 and out < _BLOCKED else 0

    def __call__(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **_unused: Any
    ) -> torch.Tensor:
        """Return ``input`` times the weight, plus ``bias``; the other arguments are Megatron's."""
        return self.multiply(input, bias)

    def multiply(self, input: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``input`` [..., in] times the weight [out, in], plus ``bias`` [out], as [..., out]."""
        if input.numel() == 0:  # an expert without tokens
            return F.linear(input, self._weight, bias)
        if self._packed is None:
            weight = F.pad(self._weight, (0, 0, 0, self._added)) if self._added else self._weight
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        if not self._added:
            return torch.ops.mkldnn._linear_pointwise(input, self._packed, bias, "none", [], "")
        bias = None if bias is None else F.pad(bias, (0, self._added))
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, bias, "none", [], "")[..., : -self._added]
