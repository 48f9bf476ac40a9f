"""A Megatron model under one parallel layout, trainable or frozen: pack, train, score, hidden states, save and load.

Full logits are never materialised: Megatron's output hook passes the final hidden states to ``kl.linear_divergence``
together with the micro-batch's columns, the objective's token loss and, for distillation, the teacher's distribution.
Samples and objectives come from ``stages``; generation is in ``rollout``.

Shapes: b batch (sequences), s sequence length (s / tp under sequence parallelism), t tokens of a micro-batch on this
context-parallel rank, h hidden size, v_tp local rows of the padded vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.precision import RECIPES, Fp8Config
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.packing import MicroBatch, MicroBatchPlan, pack, plan_micro_batches
from megatron_s2d.errors import UserError
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import TeacherSource
from megatron_s2d.models.build import build_model
from megatron_s2d.models.families import padded_vocab_size
from megatron_s2d.objectives.terms import (
    Metric,
    Objective,
    means_by_position,
    merge_metrics,
    pack_metrics,
    unpack_metrics,
)
from megatron_s2d.parallel import device
from megatron_s2d.parallel.checkpoint import CheckpointSave, load_checkpoint, start_saving
from megatron_s2d.parallel.collectives import gather_dicts
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.parallel.trainable_model import TrainableModel, forward_only
from megatron_s2d.records import Sample

device.patch_megatron_for_cpu()

from megatron.core.packed_seq_params import PackedSeqParams

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(eq=False)
class _Pass:
    """The forward pass of one micro-batch: inputs of the output hook, and its result."""

    batch: MicroBatch
    objective: Objective | None = None
    outputs: tuple[str, ...] = ()  # fields of TokenOutputs
    teacher: TeacherSource | None = None
    extract: Callable[[torch.Tensor], Any] | None = None  # hidden states -> result, instead of TokenOutputs
    result: Any = None


class MegatronModel:
    """A model and its layout. ``chunks``: this rank's part. ``trainable``: optimizer and schedule; None if frozen."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        *,
        precision: str,
        max_tokens: int,
        packed: bool = False,
        seed: int | None = None,
        options: ModelConfig | None = None,
        beta: float | None = None,
        fp8: Fp8Config | None = None,
    ):
        """Build the model with random weights of ``seed``, or with uninitialised ones for ``load`` to fill (None).

        max_tokens: token budget of a micro-batch. packed: sequences are laid end to end, without padding. options:
        activation recomputation and router loss. beta: of a JSD. fp8: compute the layers in FP8.
        """
        self.spec, self.layout, self.max_tokens, self._beta = spec, layout, max_tokens, beta
        self._packed, self._fp8 = packed, fp8
        self.chunks = build_model(
            spec,
            layout,
            params_dtype=DTYPES[precision],
            seed=seed,
            recompute="none" if options is None else options.recompute,
            moe_aux_loss_coeff=0.0 if options is None else options.moe_aux_loss_coeff,
            fp8=fp8,
        )
        self.trainable: TrainableModel | None = None
        self._host_copies: dict[torch.nn.Parameter, torch.Tensor] = {}  # frozen weights in (pinned) host memory
        self.packs_by_domain = False  # micro-batches of one domain each, for teachers by domain

    def prepare_training(self, optimizer: OptimizerConfig, total_updates: int, *, offload: bool = False) -> None:
        """Add gradient buffers, optimizer and schedule; load the weights before, because masters are copied from them.

        offload: see ``TrainableModel``.
        """
        self.trainable = TrainableModel(self.chunks, self.layout, optimizer, total_updates, offload=offload)

    def freeze(self) -> None:
        """Disable gradients of all parameters."""
        for chunk in self.chunks:
            chunk.requires_grad_(False)

    def offload(self) -> None:
        """Offload a frozen model's weights to pinned host memory; ``onload`` brings them back. No-op on a CPU.

        The host copy is cached, so only the first offload copies.
        """
        if self.trainable is not None:
            raise RuntimeError("a model that is trained cannot be offloaded: its host copy would be stale")
        if not device.capabilities().cuda:
            return
        self._clear_fp8_workspaces()
        for parameter in self._all_parameters():
            if parameter not in self._host_copies:
                self._host_copies[parameter] = device.copy_to_host(parameter.data)
            parameter.data = self._host_copies[parameter]
        device.synchronize()  # until the copies are complete

    def onload(self) -> None:
        """Move the weights to the device."""
        self._clear_fp8_workspaces()
        for parameter in self._all_parameters():
            parameter.data = parameter.data.to(device.device(), non_blocking=True)

    def _clear_fp8_workspaces(self) -> None:
        """Drop Transformer Engine's FP8 copies of the weights, which it computes again after the weights moved."""
        for chunk in self.chunks:
            for module in chunk.modules():
                getattr(module, "_fp8_workspaces", {}).clear()

    def _all_parameters(self) -> Iterator[torch.nn.Parameter]:
        for chunk in self.chunks:
            yield from chunk.parameters()

    @contextlib.contextmanager
    def on_device(self, *, release: bool) -> Iterator[None]:
        """Onload the weights for the block; with ``release``, offload them afterwards."""
        self.onload()
        yield
        if release:
            self.offload()

    def pack(
        self, samples: Sequence[Sample], loss_weights: Mapping[str, Sequence[float | np.ndarray]]
    ) -> list[MicroBatch]:
        """Return this data-parallel rank's micro-batches of ``samples`` (the same list on every rank)."""
        return pack(
            samples,
            loss_weights=loss_weights,
            dp_rank=self.layout.dp_rank,
            cp_rank=self.layout.cp_rank,
            device=device.device(),
            **self._packing,
        )

    def plan_micro_batches(self, samples: Sequence[Sample]) -> list[list[MicroBatchPlan]]:
        """Return the plan of the micro-batches that ``pack`` makes, for every data-parallel rank."""
        return plan_micro_batches(samples, **self._packing)

    @property
    def _packing(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "dp_size": self.layout.dp_size,
            "pad_to_multiple": self._pad_to_multiple,
            "packed": self._packed,
            "cp_size": self.layout.cp_size,
            "by_domain": self.packs_by_domain,
        }

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        objective: Objective,
        teachers: Sequence[TeacherSource | None] | None = None,
        *,
        num_tokens: int,
    ) -> dict[str, Metric]:
        """Accumulate the gradients of ``micro_batches``; return metrics reduced over all ranks, the same on all.

        num_tokens: of the mini-batch, over all data-parallel ranks. teachers: one distribution per micro-batch on ranks
        of the last pipeline stage. Raises ``UserError`` for a loss that is not finite, before weights change.
        """
        passes = self._passes(micro_batches, objective.needs, teachers)
        for item in passes:
            item.objective = objective

        def forward_step(model: torch.nn.Module, item: _Pass):
            output = self._forward(model, item)
            tokens = torch.tensor(item.batch.num_tokens, dtype=torch.int, device=output.device)
            return output, lambda loss: (loss * num_tokens, tokens, {})

        self.trainable.forward_backward(forward_step, passes)
        metrics = self._reduce_metrics(passes, objective)
        loss = metrics["loss"].value()
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss}: lower the learning rate, or check rewards and teacher")
        return metrics

    def optim_step(self) -> float:
        """Update the weights; return the gradient norm before clipping, ``UserError`` if it is not finite."""
        norm = self.trainable.optim_step()
        if not math.isfinite(norm):
            raise UserError(f"the gradient norm is {norm}: lower the learning rate, or check rewards and teacher")
        return norm

    def score(self, samples: Sequence[Sample], output: str = "log_probs") -> list[np.ndarray]:
        """Return the log-probabilities of every sample's tokens, [length] float32 each (0 outside responses).

        Collective; the result is the same on all ranks. output: another field of ``TokenOutputs`` that needs no
        teacher, such as entropy.
        """
        passes = self._passes(self.pack(samples, {}), (output,), None)
        self._forward_only(passes)
        local: dict[int, np.ndarray] = {}
        if self.layout.is_pipeline_last_stage:
            for item in passes:
                values = self.gather_context_parallel(item.batch, getattr(item.result, output))
                if self.layout.is_dp_leader:
                    rows = item.batch.unpack(values)
                    local |= {i: row.float().cpu().numpy() for i, row in zip(item.batch.indices, rows, strict=True)}
        scores = gather_dicts(local)
        return [scores[index] for index in range(len(samples))]

    def hidden_states(
        self,
        micro_batches: Sequence[MicroBatch],
        extract: Callable[[int, torch.Tensor], Any] = lambda index, hidden: hidden,
    ) -> list[Any]:
        """Return ``extract(index, hidden)`` of each micro-batch on ranks of the last pipeline stage, None on others.

        ``extract`` runs as soon as the hidden states of a micro-batch are there. hidden: [s * b, h], without gradients.
        """
        passes = [_Pass(batch, extract=functools.partial(extract, index)) for index, batch in enumerate(micro_batches)]
        self._forward_only(passes)
        return [item.result for item in passes]

    def gather_sequence_parallel(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gather hidden states [s * b, h] of full sequences from the shards of sequence-parallel ranks."""
        return self.shard.gather(hidden).flatten(0, 1) if self.layout.config.sequence_parallel else hidden

    def gather_context_parallel(self, batch: MicroBatch, values: torch.Tensor) -> torch.Tensor:
        """Gather the values of all positions from the [t, ...] of each context-parallel rank."""
        if self.layout.cp_size == 1:
            return values
        shards = [torch.empty_like(values) for _ in range(self.layout.cp_size)]
        dist.all_gather(shards, values.contiguous(), group=self.layout.groups.cp)
        return batch.gather_from_cp(shards)

    def save(self, directory: Path, trainer_state: dict[str, Any], *, with_optimizer: bool) -> None:
        """Write a checkpoint, which appears complete or not at all; collective."""
        self.start_saving(directory, trainer_state, with_optimizer=with_optimizer).finish()

    def start_saving(
        self, directory: Path, trainer_state: dict[str, Any], *, with_optimizer: bool, async_save: bool = False
    ) -> CheckpointSave:
        """See ``parallel.checkpoint.start_saving``; collective."""
        self._host_copies.clear()  # stale once the weights have changed
        trainable = self.trainable if with_optimizer else None
        with contextlib.nullcontext() if trainable is None else trainable.optimizer_loaded():
            return start_saving(
                directory,
                self.chunks,
                self.layout,
                model_spec=self.spec.to_dict(),
                trainer_state=trainer_state,
                trainable=trainable,
                async_save=async_save,
            )

    def load(self, directory: Path, *, with_optimizer: bool = False) -> dict[str, Any]:
        """Load a checkpoint of this model, written at any layout, and return its trainer state; collective."""
        trainable = self.trainable if with_optimizer else None
        with contextlib.nullcontext() if trainable is None else trainable.optimizer_loaded():
            return load_checkpoint(
                directory, self.chunks, self.layout, model_spec=self.spec.to_dict(), trainable=trainable
            )

    @property
    def _pad_to_multiple(self) -> int:
        """Alignment of a micro-batch's length, so that each rank's tokens fill the blocks of the FP8 recipe."""
        shards = self.layout.tp_size if self.layout.config.sequence_parallel else 1
        return shards * (1 if self._fp8 is None else RECIPES[self._fp8.recipe].tokens)

    @property
    def output_weight(self) -> torch.Tensor:
        """The output layer's rows on this rank, [v_tp, h]; only on the last pipeline stage."""
        model = self.chunks[0]
        if self.spec.tie_word_embeddings:
            return model.shared_embedding_or_output_weight()
        return model.output_layer.weight

    @property
    def shard(self) -> VocabShard:
        """The vocabulary columns of this tensor-parallel rank, without padding."""
        tp_size = self.layout.tp_size
        group = self.layout.groups.tp if tp_size > 1 else None
        return VocabShard.of_padded(
            padded_vocab_size(self.spec.vocab_size, tp_size) // tp_size, self.spec.vocab_size, group
        )

    @property
    def params_dtype(self) -> torch.dtype:
        """Dtype of weights and hidden states, on every rank."""
        return next(self.chunks[0].parameters()).dtype

    def _passes(
        self,
        micro_batches: Sequence[MicroBatch],
        outputs: Iterable[str],
        teachers: Sequence[TeacherSource | None] | None,
    ) -> list[_Pass]:
        teachers = [None] * len(micro_batches) if teachers is None else teachers
        return [
            _Pass(batch, outputs=tuple(sorted(outputs)), teacher=teacher)
            for batch, teacher in zip(micro_batches, teachers, strict=True)
        ]

    def _forward_only(self, passes: Sequence[_Pass]) -> None:
        def forward_step(model: torch.nn.Module, item: _Pass):
            return self._forward(model, item), lambda output, non_loss_data=False: None

        forward_only(self.chunks, self.layout, forward_step, passes)

    def _forward(self, model: torch.nn.Module, item: _Pass) -> torch.Tensor:
        padding = item.batch.padding_mask if self.spec.num_experts else None
        return model(
            item.batch.token_ids,
            None,
            None,
            padding_mask=padding,
            packed_seq_params=_packed_seq_params(item.batch),
            output_processor=self._output,
            output_processor_context=item,
        )

    def _output(self, *, hidden_states: torch.Tensor, context: _Pass, **_: Any) -> torch.Tensor:
        """Megatron's output hook on the last pipeline stage; hidden_states: [s, b, h]. Returns the loss."""
        item, batch = context, context.batch
        hidden = hidden_states.flatten(0, 1)
        if item.extract is not None:
            item.result = item.extract(hidden.detach())
            return hidden
        objective, columns = item.objective, batch.columns
        token_loss = None
        if objective is not None:

            def token_loss(outputs: TokenOutputs, rows: torch.Tensor) -> torch.Tensor:
                return objective.token_loss(outputs, columns.select(rows))

        loss, item.result = linear_divergence(
            hidden,
            self.output_weight,
            shard=self.shard,
            outputs=item.outputs,
            teacher=item.teacher,
            beta=self._beta,
            temperature=batch.temperature,
            target_ids=batch.labels,
            token_loss=token_loss,
            response_mask=batch.response_mask,
            sequence_parallel=self.layout.config.sequence_parallel,
        )
        return loss

    def _reduce_metrics(self, passes: Sequence[_Pass], objective: Objective) -> dict[str, Metric]:
        """Reduce the metrics of all micro-batches over all ranks, with two all-reduces."""
        # Ranks without outputs take part with the metrics of no token.
        no_rows = torch.zeros(0, dtype=torch.int64, device=device.device())
        no_outputs = TokenOutputs(**{name: torch.zeros(0, device=no_rows.device) for name in objective.needs})
        parts = [self._metrics_of(objective, no_outputs, passes[0].batch, no_rows)]
        if self.layout.is_output_rank:
            for item in passes:
                rows = item.batch.response_mask.nonzero().squeeze(1)
                outputs = TokenOutputs(**{name: getattr(item.result, name)[rows] for name in item.outputs})
                parts.append(self._metrics_of(objective, outputs, item.batch, rows))
        merged = merge_metrics(parts)
        sums, maxima = pack_metrics(merged)
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        reduced = unpack_metrics(merged, sums.cpu(), maxima.cpu())
        return {
            name: metric for name, metric in reduced.items() if metric.omit == "never" or float(metric.denominator) > 0
        }

    def _metrics_of(
        self, objective: Objective, outputs: TokenOutputs, batch: MicroBatch, rows: torch.Tensor
    ) -> dict[str, Metric]:
        """Return the objective's metrics of the tokens at ``rows``, and its KL by position in the response."""
        columns = batch.columns.select(rows)
        metrics = objective.metrics(outputs, columns)
        if objective.token_kl is not None:
            values = objective.token_kl(outputs, columns)
            positions = batch.response_positions[rows]
            metrics |= means_by_position("kl_by_position", values, positions, self.spec.max_position_embeddings)
        return metrics


def _packed_seq_params(batch: MicroBatch) -> PackedSeqParams | None:
    """Return the sequence boundaries of a packed micro-batch in Megatron's form; None for a padded one."""
    if batch.cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        # Padding belongs to its sequence and is masked by causality, so these are the same.
        cu_seqlens_q_padded=batch.cu_seqlens,
        cu_seqlens_kv_padded=batch.cu_seqlens,
        max_seqlen_q=batch.plan.max_seqlen,
        max_seqlen_kv=batch.plan.max_seqlen,
        pad_between_seqs=False,
    )
