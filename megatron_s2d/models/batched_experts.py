"""The experts of decoded tokens as batched products over all local experts, with sizes that the host always knows.

Megatron-Core sends every token to its experts alone. How many tokens an expert gets is then computed on the device, and
the host waits for it in every layer of every token; its own path without that wait is part of layers that need
Transformer Engine. A decoded token reads the weights of nearly all experts anyway: here the ranks that share experts
gather all rows, every rank multiplies all of them with each of its experts, weighted by the router (0 for most), and
the sums are scattered back. Up to ``MOST_ROWS`` rows reading the weights takes as long as the products, and nothing
depends on what the device computes, so that a CUDA graph can hold it.

Shapes: b rows of this rank, p rows of each rank with padding, n = p x ranks that share experts, e experts, e_local
experts of this rank, h hidden size, f width of an expert.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Sequence

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_s2d.buffer_sizes import MOST_BATCHED_EXPERT_ROWS as MOST_ROWS
from megatron_s2d.parallel.layout import Layout


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Views of the weights of a layer's local experts."""

    gate_up: torch.Tensor  # [e_local, 2 f, h]
    down: torch.Tensor  # [e_local, h, f]
    is_reversed: bool  # the last expert first


_NO_ADAPTERS = types.SimpleNamespace(linears=())


class BatchedExperts:
    """The experts of one model on this rank. The ranks that share them call every method together."""

    def __init__(self, chunk: torch.nn.Module, layout: Layout):
        self._layers = [layer.mlp for layer in chunk.decoder.layers if isinstance(layer.mlp, MoELayer)]
        self._group = layout.groups.ep
        # LoRA adapters of experts (``lora.py``) are beside each expert's own products.
        has_adapters = any(linear.is_expert for linear in getattr(chunk, "adapter", _NO_ADAPTERS).linears)
        self._weights = {id(moe): None if has_adapters else _stacked(moe) for moe in self._layers}
        self._num_rows = 0

    @property
    def is_possible(self) -> bool:
        """Whether the weights of all local experts of each layer lie at equal distances, without adapters."""
        return all(weights is not None for weights in self._weights.values())

    def padded_rows(self, num_rows: int) -> int | None:
        """Return the rows of each rank in a pass where one has ``num_rows``: few different numbers; None: too many."""
        padded = 1 << max(0, num_rows - 1).bit_length()
        return padded if padded * self._group.size() <= MOST_ROWS else None

    def begin_pass(self, padded_rows: int) -> None:
        """Set the rows of each rank in the next pass."""
        self._num_rows = padded_rows

    def run(self, moe: MoELayer, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of layer ``moe`` for ``hidden`` [1, b, h]."""
        scales, _ = moe.router(hidden, None)  # [b, e] float32, 0 where a token is not sent
        padding = (0, 0, 0, self._num_rows - hidden.shape[1])
        output = self._all_rows(moe, F.pad(hidden[0], padding), F.pad(scales, padding))
        return output[: hidden.shape[1]].unsqueeze(0)

    def serve(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Run all layers for the rows of the other ranks; this one has none."""
        for moe in self._layers:
            weights = self._weights[id(moe)]
            hidden = weights.down.new_zeros(self._num_rows, hidden_size, dtype=dtype)
            scales = weights.down.new_zeros(self._num_rows, moe.config.num_moe_experts, dtype=torch.float32)
            self._all_rows(moe, hidden, scales)

    def _all_rows(self, moe: MoELayer, hidden: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return [p, h] of ``hidden`` [p, h] and ``scales`` [p, e]."""
        size = self._group.size()
        scales = scales.float()  # every rank sends the same type, also one without rows
        if size > 1:
            hidden, scales = _gather(hidden, self._group), _gather(scales, self._group)
        first, last = moe.local_expert_indices[0], moe.local_expert_indices[-1]
        summed = _weighted_sum(self._weights[id(moe)], hidden, scales[:, first : last + 1], moe)
        if size == 1:
            return summed.to(hidden.dtype)
        mine = summed.new_empty(self._num_rows, summed.shape[1])
        dist.reduce_scatter_tensor(mine, summed, group=self._group)
        return mine.to(hidden.dtype)


def _weighted_sum(weights: _Weights, hidden: torch.Tensor, scales: torch.Tensor, moe: MoELayer) -> torch.Tensor:
    """Return the sum of the local experts' outputs for ``hidden`` [n, h], weighted by ``scales`` [n, e_local], float32.

    As in Megatron-Core the weights multiply the activation, which is then rounded to the type of the products.
    """
    if weights.is_reversed:
        scales = scales.flip(1)
    rows = hidden.expand(len(weights.down), -1, -1)
    gate, up = torch.bmm(rows, weights.gate_up.transpose(1, 2)).chunk(2, dim=-1)
    activated = moe.config.activation_func(gate) * up * scales.T.unsqueeze(-1)
    return torch.bmm(activated.to(hidden.dtype), weights.down.transpose(1, 2)).sum(0, dtype=torch.float32)


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    gathered = tensor.new_empty(group.size() * len(tensor), tensor.shape[1])
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered


def _stacked(moe: MoELayer) -> _Weights | None:
    """Return views of the local experts' weights as one tensor for each product; None if they do not lie like that.

    None also for experts with biases.
    """
    if moe.config.add_bias_linear:
        return None
    experts = moe.experts
    if hasattr(experts, "local_experts"):
        pairs = [(expert.linear_fc1.weight, expert.linear_fc2.weight) for expert in experts.local_experts]
    else:
        pairs = [
            (getattr(experts.linear_fc1, f"weight{index}"), getattr(experts.linear_fc2, f"weight{index}"))
            for index in range(moe.num_local_experts)
        ]
    # Weights in FP8 have a type of their own.
    if any(type(weight.data) is not torch.Tensor for pair in pairs for weight in pair):
        return None
    gate_up, down = (_strided_view(weights) for weights in zip(*pairs, strict=True))
    if gate_up is None or down is None or gate_up[1] != down[1]:
        return None
    return _Weights(gate_up[0], down[0], gate_up[1])


def _strided_view(weights: Sequence[torch.nn.Parameter]) -> tuple[torch.Tensor, bool] | None:
    """Return a view [e_local, ...] of ``weights`` and whether their order is reversed in it; None if there is none.

    The buffer of a trained model has its parameters in reverse. The weights of other models are moved together first.
    """
    if not _are_in_one_buffer(weights):
        if any(hasattr(weight, "main_grad") for weight in weights):
            return None  # they have to stay where they are
        together = torch.stack([weight.data for weight in weights])
        for weight, values in zip(weights, together, strict=True):
            weight.data = values
    starts = [weight.data.storage_offset() for weight in weights]
    steps = {b - a for a, b in itertools.pairwise(starts)} or {weights[0].numel()}
    if len(steps) > 1:
        return None
    (step,) = steps
    first = weights[0 if step > 0 else -1].data
    return first.as_strided((len(weights), *first.shape), (abs(step), *first.stride())), step < 0


def _are_in_one_buffer(weights: Sequence[torch.nn.Parameter]) -> bool:
    return len({weight.data.untyped_storage().data_ptr() for weight in weights}) == 1
