"""Megatron's DDP, distributed optimizer and pipeline schedules behind two calls: ``forward_backward``, ``optim_step``.

Losses arrive already divided by their global denominators (``data/packing.py``). Megatron divides by the number of
unpadded tokens C, so a micro-batch returns ``C_global * loss`` with its token count, and the division cancels exactly
at every layout; the load-balancing loss of an MoE router, which Megatron scales by the same count, stays correct.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout

device.patch_megatron_for_cpu()

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

# (model, micro-batch) -> (output, loss function); on the last pipeline stage the loss function returns
# (loss scaled by C_global, unpadded tokens, result to collect).
ForwardStep = Callable[[torch.nn.Module, Any], tuple[torch.Tensor, Callable[[torch.Tensor], tuple]]]


class TrainableModel:
    """Model chunks with gradient buffers, optimizer and learning-rate schedule.

    offload: optimizer state and float32 masters are in host memory except during ``optim_step``, and from the end of
    ``optim_step`` to the next ``forward_backward`` there are no gradient buffers on the device either.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        layout: Layout,
        optimizer: OptimizerConfig,
        total_steps: int,
        *,
        offload: bool = False,
    ):
        self.layout = layout
        self.model_config = get_model_config(chunks[0])
        fp8_parameters = bool(self.model_config.fp8_param)
        with layout.active():
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=False,
                fp8_param_gather=fp8_parameters,
            )
            self.chunks = [
                DistributedDataParallel(self.model_config, ddp_config, chunk, pg_collection=layout.groups)
                for chunk in chunks
            ]
            self.model_config.finalize_model_grads_func = finalize_model_grads
            for chunk in chunks:
                enable_gradient_accumulation_fusion(chunk)
            recipe = self.model_config.fp8_recipe if fp8_parameters else None
            self.optimizer = get_megatron_optimizer(_megatron_optimizer(optimizer, chunks[0], recipe), self.chunks)
            self.model_config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr if optimizer.lr_schedule != "constant" else 0.0,
            lr_warmup_steps=optimizer.warmup_steps,
            lr_decay_steps=max(total_steps, optimizer.warmup_steps + 1),
            lr_decay_style=optimizer.lr_schedule,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=max(total_steps, 1),
            wd_incr_style="constant",
        )
        self._offloader = OptimizerOffloader(self) if offload else None
        if self._offloader is not None:
            self._offloader.offload()

    @contextlib.contextmanager
    def optimizer_loaded(self) -> Iterator[None]:
        """Load the optimizer state to the device for the block: for an update, for saving and loading."""
        if self._offloader is None:
            yield
            return
        self._offloader.reload()
        yield
        self._offloader.offload()

    def forward_backward(self, forward_step: ForwardStep, micro_batches: Sequence[Any]) -> list[Any]:
        """Accumulate the gradients of ``micro_batches``; return results (empty before the last pipeline stage)."""
        with self.layout.active():
            if self._offloader is not None:
                self._offloader.reload_gradients()
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            return _run_schedule(self.chunks, forward_step, micro_batches, forward_only=False)

    def optim_step(self) -> float:
        """Update the weights; return the global gradient norm before clipping (NaN or inf: no weight has changed)."""
        with self.layout.active(), self.optimizer_loaded():
            successful, norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return float(norm) if successful and norm is not None else math.nan

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_scheduler_step(self, step: int) -> None:
        """Set the learning-rate schedule to its state after ``step`` updates."""
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=step)


class OptimizerOffloader:
    """Offloads optimizer state and float32 masters to pinned host memory between updates.

    Tensor objects survive; only their device storage is freed.
    """

    def __init__(self, trainable: TrainableModel):
        self._trainable = trainable
        self._host_copies = WeakTensorKeyDictionary()  # device tensor -> pinned host tensor
        self._offloaded: list[torch.Tensor] = []

    def offload(self) -> None:
        """Move masters and optimizer state to the host, and free the gradient buffers."""
        for tensor in self._state():
            if tensor not in self._host_copies:
                self._host_copies[tensor] = torch.empty_like(
                    tensor, device="cpu", pin_memory=device.capabilities().cuda
                )
            self._host_copies[tensor].copy_(tensor, non_blocking=True)
            self._offloaded.append(tensor)
        torch.cuda.synchronize()
        for tensor in self._offloaded:
            tensor.untyped_storage().resize_(0)
        for chunk in self._trainable.chunks:
            chunk.offload_grad_buffers()

    def reload(self) -> None:
        """Move masters and optimizer state back to the device."""
        for tensor in self._offloaded:
            host = self._host_copies[tensor]
            tensor.untyped_storage().resize_(host.nbytes)
            tensor.copy_(host, non_blocking=True)
        self._offloaded.clear()

    def reload_gradients(self) -> None:
        """Allocate the gradient buffers again, filled with zeros."""
        for chunk in self._trainable.chunks:
            chunk.restore_grad_buffers()

    def _state(self) -> Iterator[torch.Tensor]:
        """Yield optimizer state and masters; a float32 model has no masters besides its parameters, which stay."""
        wrapped = self._trainable.optimizer
        for optimizer in getattr(wrapped, "chained_optimizers", [wrapped]):
            for group in optimizer.shard_fp32_from_float16_groups:
                yield from (tensor for tensor in group if tensor is not None)
            for values in optimizer.optimizer.state.values():
                yield from (value for value in values.values() if torch.is_tensor(value) and value.dim() > 0)


def enable_gradient_accumulation_fusion(chunk: torch.nn.Module) -> None:
    """Fuse the matrix products of weight gradients with accumulation into Megatron's float32 buffers, where supported.

    Transformer Engine's layers support it, Megatron's own need apex. Otherwise autograd computes each gradient in the
    weights' dtype, which is then added to the buffer. Call it when the buffers exist.
    """
    capabilities = device.capabilities()
    for module in chunk.modules():
        if capabilities.transformer_engine and hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        if capabilities.apex_gradient_accumulation and hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True


def forward_only(
    chunks: list[torch.nn.Module], layout: Layout, forward_step: ForwardStep, micro_batches: Sequence[Any]
) -> list[Any]:
    """Run ``micro_batches`` without gradients; return their results (empty before the last pipeline stage)."""
    with layout.active(), torch.no_grad():
        for chunk in chunks:
            chunk.eval()
        return _run_schedule(chunks, forward_step, micro_batches, forward_only=True)


def _run_schedule(
    chunks: list[torch.nn.Module], forward_step: ForwardStep, micro_batches: Sequence[Any], *, forward_only: bool
) -> list[Any]:
    if not micro_batches:
        return []

    def step(iterator, model):
        return forward_step(model, next(iterator))

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(micro_batches),
        model=chunks,
        num_microbatches=len(micro_batches),
        # Pipeline ranks send the actual shapes (variable_seq_lengths); these two only have to be positive.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _megatron_optimizer(
    optimizer: OptimizerConfig, chunk: torch.nn.Module, fp8_recipe: str | None
) -> MegatronOptimizerConfig:
    params_dtype = next(chunk.parameters()).dtype
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.grad_clip,
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        use_distributed_optimizer=True,
        fp8_recipe=fp8_recipe,
    )
