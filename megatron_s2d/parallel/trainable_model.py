"""Megatron's DDP, distributed optimizer and pipeline schedules behind two calls: ``forward_backward``, ``optim_step``.

Losses arrive already divided by their global denominators (``data/packing.py``). Megatron divides by the number of
unpadded tokens C, so a micro-batch returns ``C_global * loss`` with its token count, and the division cancels exactly
at every layout; the load-balancing loss of an MoE router, which Megatron scales by the same count, stays correct.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.parallel.pinned import pinned_like
from megatron_s2d.parallel.schedule import ForwardStep, HiddenShape, run_schedule
from megatron_s2d.parallel.weight_gradients import fuse_weight_gradients


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
        overlaps = layout.config.overlaps(on_gpu=device.capabilities().cuda)
        self._overlap_grad_reduce, self._overlap_param_gather = overlaps
        with layout.active():
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=self._overlap_grad_reduce,
                overlap_param_gather=self._overlap_param_gather,
                # All gathers start right after the update (_start_param_sync), not one by one in the forward pass.
                align_param_gather=self._overlap_param_gather,
                fp8_param_gather=fp8_parameters,
            )
            self.chunks = [
                DistributedDataParallel(
                    self.model_config,
                    ddp_config,
                    chunk,
                    # Only the gradients of the first chunk are ready at the very end of the backward pass.
                    disable_bucketing=index > 0,
                    pg_collection=layout.groups,
                )
                for index, chunk in enumerate(chunks)
            ]
            weakref.finalize(self, _drop_hooks, [chunk.grad_accs for chunk in self.chunks], self.model_config)
            if self._overlap_param_gather:
                for chunk in self.chunks:
                    chunk.disable_forward_pre_hook(param_sync=False)  # on in forward_backward only
            if self._overlap_grad_reduce:
                no_sync = [chunk.no_sync for chunk in self.chunks]
                self.model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            self.model_config.finalize_model_grads_func = finalize_model_grads
            if not (device.capabilities().cuda or self._overlap_grad_reduce or self._overlap_param_gather):
                for group in self._bucket_groups():
                    _leave_out_collectives_of_one(group)
            for chunk in chunks:
                enable_gradient_accumulation_fusion(chunk, overlap_grad_reduce=self._overlap_grad_reduce)
            recipe = self.model_config.fp8_recipe if fp8_parameters else None
            self.optimizer = get_megatron_optimizer(_megatron_optimizer(optimizer, chunks[0], recipe), self.chunks)
            _gather_weights_once(self.optimizer)
            if not device.capabilities().cuda:
                _use_fused_adam(self.optimizer)
            self.model_config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            # The first update is a step of the warm-up, too: from 0 it would spend a batch and change nothing.
            init_lr=optimizer.lr / (optimizer.warmup_steps + 1),
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

    def forward_backward(
        self,
        forward_step: ForwardStep,
        micro_batches: Sequence[Any],
        shapes: Sequence[HiddenShape] | None = None,
    ) -> list[Any]:
        """Accumulate the gradients of ``micro_batches``; return results (empty before the last pipeline stage).

        shapes: see ``schedule.run_schedule``.
        """
        with self.layout.active():
            if self._offloader is not None:
                self._offloader.reload_gradients()
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            with self._modules_wait_for_weights():
                return run_schedule(
                    self.chunks, self.layout, forward_step, micro_batches, forward_only=False, shapes=shapes
                )

    def optim_step(self) -> float:
        """Update the weights; return the global gradient norm before clipping (NaN or inf: no weight has changed)."""
        with self.layout.active(), self.optimizer_loaded():
            successful, norm, _ = self.optimizer.step()
            self._start_param_sync()
        self.scheduler.step(increment=1)
        return float(norm) if successful and norm is not None else math.nan

    def _bucket_groups(self) -> Iterator[Any]:
        """Yield Megatron's bucket groups, those that a forward pass needs first in front."""
        for chunk in self.chunks:
            yield from reversed(chunk.bucket_groups)
            yield from reversed(chunk.expert_parallel_bucket_groups)

    def _start_param_sync(self) -> None:
        """Start to gather the updated weights; without overlap the optimizer's step has done it."""
        if self._overlap_param_gather:
            for group in self._bucket_groups():
                group.start_param_sync()

    def finish_param_sync(self) -> None:
        """Wait until all weights of the last update have arrived: before anything but ``forward_backward`` reads them.

        All gathers have started, in the same order on every rank, so a rank may wait without the others.
        """
        if self._overlap_param_gather:
            for group in self._bucket_groups():
                if group.param_gather_handle is not None:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    @contextlib.contextmanager
    def _modules_wait_for_weights(self) -> Iterator[None]:
        """Let each module wait for its own weights only, inside the block; afterwards all have arrived."""
        if not self._overlap_param_gather:
            yield
            return
        for chunk in self.chunks:
            chunk.enable_forward_pre_hook()
        try:
            yield
        finally:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=False)
        self.finish_param_sync()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_scheduler_step(self, step: int) -> None:
        """Set the learning-rate schedule to its state after ``step`` updates."""
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=step)


def _drop_hooks(gradient_accumulators: list[list[Any]], model_config: Any) -> None:
    """Break the cycles through autograd's nodes, which no garbage collection sees, so that the chunks can be freed.

    Hooks of the nodes refer to the chunks. Float32 masters are views of the parameters, with these nodes behind them,
    and belong to the optimizer, to which the chunks' config refers.
    """
    for nodes in gradient_accumulators:
        nodes.clear()
    model_config.grad_scale_func = None
    model_config.no_sync_func = None


def _leave_out_collectives_of_one(group: Any) -> None:
    """Leave out the reduce-scatter of gradients and the gather of weights of a data-parallel group of one rank.

    In place there is nothing to do, but gloo copies both buffers, to another tensor and back.
    """
    is_scaled = any(bucket.gradient_scaling_factor != 1.0 for bucket in group.buckets)
    if group.intra_distributed_optimizer_instance_size == 1 and not is_scaled:
        group.start_grad_sync = group.start_param_sync = lambda *args, **options: None


def _gather_weights_once(optimizer: Any) -> None:
    """Leave the gathering of weights to the last of chained optimizers, when all have stepped.

    Megatron has one optimizer for dense and one for expert parameters, and each gathers all weights of the model.
    """
    chained = getattr(optimizer, "chained_optimizers", [])
    for item in [item for item in chained if not getattr(item, "is_stub_optimizer", False)][:-1]:
        item._defer_param_sync = True


def _use_fused_adam(optimizer: Any) -> None:
    """Update each parameter in one pass over its values and moments; PyTorch's default on a CPU makes about ten."""
    for item in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = item.optimizer
        if isinstance(inner, torch.optim.Adam):  # AdamW is one
            for group in (inner.defaults, *inner.param_groups):
                group["fused"] = True


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
        self._offloaded += self._state()
        new = [tensor for tensor in self._offloaded if tensor not in self._host_copies]
        self._host_copies.update(zip(new, pinned_like(new), strict=True))
        for tensor in self._offloaded:
            self._host_copies[tensor].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        for tensor in self._offloaded:
            tensor.untyped_storage().resize_(0)
        # The allocator keeps their memory: giving it back to the driver would wait for the device at every segment.
        for chunk in self._trainable.chunks:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)

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
            chunk.restore_grad_buffers(synchronize=False)

    def _state(self) -> Iterator[torch.Tensor]:
        """Yield optimizer state and masters; a float32 model has no masters besides its parameters, which stay."""
        wrapped = self._trainable.optimizer
        for optimizer in getattr(wrapped, "chained_optimizers", [wrapped]):
            for group in optimizer.shard_fp32_from_float16_groups:
                yield from (tensor for tensor in group if tensor is not None)
            for values in optimizer.optimizer.state.values():
                yield from (value for value in values.values() if torch.is_tensor(value) and value.dim() > 0)


def enable_gradient_accumulation_fusion(chunk: torch.nn.Module, *, overlap_grad_reduce: bool) -> None:
    """Fuse the matrix products of weight gradients with accumulation into Megatron's float32 buffers, where supported.

    Transformer Engine's layers support it, Megatron's own need apex, or a CPU (``weight_gradients.py``). Otherwise
    autograd computes each gradient in the weights' dtype, which is then added to the buffer. Call it when the buffers
    exist.
    """
    capabilities = device.capabilities()
    if not capabilities.cuda:
        if not overlap_grad_reduce:  # which starts when autograd hands over a gradient
            fuse_weight_gradients(chunk)
        return
    for module in chunk.modules():
        if capabilities.transformer_engine and hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        if capabilities.apex_gradient_accumulation and hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True


def forward_only(
    chunks: list[torch.nn.Module],
    layout: Layout,
    forward_step: ForwardStep,
    micro_batches: Sequence[Any],
    shapes: Sequence[HiddenShape] | None = None,
) -> list[Any]:
    """Run ``micro_batches`` without gradients; return their results (empty before the last pipeline stage).

    shapes: see ``schedule.run_schedule``.
    """
    with layout.active(), torch.no_grad():
        for chunk in chunks:
            chunk.eval()
        return run_schedule(chunks, layout, forward_step, micro_batches, forward_only=True, shapes=shapes)


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
