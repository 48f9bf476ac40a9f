"""Weight gradients that the matrix product itself adds to Megatron's float32 buffers, on a CPU.

Megatron does so with kernels of apex or Transformer Engine, which need a GPU. Without them autograd writes the gradient
of a matrix to new memory, which is read again to be added to the buffer.

Shapes: t tokens (or [s, b]), in and out those of this rank's matrix.
"""

from __future__ import annotations

from typing import Any

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_s2d import matrix_products


def fuse_weight_gradients(chunk: torch.nn.Module) -> None:
    """Let the linear layers of ``chunk`` add their weights' gradients to ``main_grad`` where both are float32.

    The output layer is left alone: a weight that it shares with the embedding gets gradients of both.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module is not _output_layer(chunk):
            module._forward_impl = _Forward(module._forward_impl)


def _output_layer(chunk: torch.nn.Module) -> torch.nn.Module | None:
    return getattr(chunk, "output_layer", None)


class _Forward:
    """Replaces the product of one of Megatron's linear layers."""

    def __init__(self, original: Any):
        self._original = original

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return ``input`` [t, in] times ``weight`` [out, in], plus the bias, as [t, out]; options: Megatron's."""
        main_grad = getattr(weight, "main_grad", None)
        is_trained = weight.requires_grad and torch.is_grad_enabled() and main_grad is not None
        if not is_trained or weight.dtype != torch.float32 or options["sequence_parallel"]:
            return self._original(input=input, weight=weight, **options)
        group = options["tp_group"] if options["allreduce_dgrad"] else None
        output: torch.Tensor = _Accumulated.apply(input, weight, main_grad, group)  # type: ignore[no-untyped-call]
        return output if options["bias"] is None else output + options["bias"]


class _Accumulated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, main_grad: torch.Tensor, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.parameter, ctx.main_grad, ctx.group = weight, main_grad, group
        return matrix_products.linear(input, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        """Add the weight's gradient to its buffer; autograd gets none."""
        input, weight = ctx.saved_tensors
        gradient = matrix_products.linear(upstream, weight.t()) if ctx.needs_input_grad[0] else None
        handle = None
        if gradient is not None and ctx.group is not None:
            handle = dist.all_reduce(gradient, group=ctx.group, async_op=True)
        matrix_products.add_weight_gradient(ctx.main_grad, upstream.flatten(0, -2), input.flatten(0, -2))
        ctx.parameter.grad_added_to_main_grad = True
        if handle is not None:
            handle.wait()
        return gradient, None, None, None
