"""A model at a layout, trained or frozen: forward_backward, optim_step, score, hidden states, save and load.

The output layer never makes whole logits: Megatron's output hook hands the final hidden states to
``kl.linear_divergence`` together with the micro-batch's columns, the objective's token loss and, for distillation, the
teacher's distribution. Left out: which samples and which objective (stages), generation (rollout).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.precision import RECIPES, Fp8Config
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.packing import MicroBatch, MicroBatchPlan, pack, plan_micro_batches
from megatron_s2d.errors import UserError
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import TeacherSource
from megatron_s2d.models.build import build_model
from megatron_s2d.models.families import ModelSpec, padded_vocab_size
from megatron_s2d.objectives.mismatch import GAP_PREFIX
from megatron_s2d.objectives.terms import (
    Metric,
    Objective,
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

POSITION_PREFIX = "kl_by_position/"  # of the metrics that give the KL by position in the response
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(eq=False)
class _Pass:
    """One micro-batch on its way through the model: what the output hook needs, and what it leaves behind."""

    batch: MicroBatch
    objective: Objective | None = None
    outputs: tuple[str, ...] = ()
    teacher: TeacherSource | None = None
    keep: Callable[[torch.Tensor], Any] | None = None  # what is kept of the hidden states
    result: Any = None


class MegatronModel:
    """``chunks``: the bare model of this rank. ``trainable`` is None for a frozen model."""

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
        """Build the model; its weights are drawn with ``seed``, or left for ``load`` to fill (None).

        max_tokens: budget of a micro-batch. packed: its sequences are laid end to end, without padding. options:
        recomputation and router loss. beta: of a mixed divergence. fp8: the layers compute in FP8.
        """
        self.spec, self.layout, self.max_tokens, self._beta = spec, layout, max_tokens, beta
        self._packed, self._fp8 = packed, fp8
        extra = (
            {}
            if options is None
            else {"recompute": options.recompute, "moe_aux_loss_coeff": options.moe_aux_loss_coeff}
        )
        self.chunks = build_model(spec, layout, params_dtype=DTYPES[precision], seed=seed, fp8=fp8, **extra)
        self.trainable: TrainableModel | None = None
        self._host_copies: dict[torch.nn.Parameter, torch.Tensor] = {}  # frozen weights in (pinned) host memory
        self.packs_by_domain = False  # micro-batches of one domain each, for teachers by domain

    def prepare_training(self, optimizer: OptimizerConfig, total_updates: int, *, offload: bool = False) -> None:
        """Add gradient buffers, optimizer and schedule; weights must be in place, for masters are copied from them.

        offload: see ``TrainableModel``.
        """
        self.trainable = TrainableModel(self.chunks, self.layout, optimizer, total_updates, offload=offload)

    def freeze(self) -> None:
        """Take the parameters out of differentiation."""
        for chunk in self.chunks:
            chunk.requires_grad_(False)

    def offload(self) -> None:
        """Have a frozen model's weights wait in host memory; ``to_device`` brings them back. Nothing to do on a CPU.

        The copy there is kept, so only the first move out copies.
        """
        if self.trainable is not None:
            raise RuntimeError("the weights of a model that is trained do not wait: the copy would be an old one")
        if not device.capabilities().cuda:
            return
        for parameter in self._parameters():
            if parameter not in self._host_copies:
                self._host_copies[parameter] = device.copy_to_host(parameter.data)
            parameter.data = self._host_copies[parameter]
        device.synchronize()  # until the copies are whole

    def onload(self) -> None:
        """Bring the weights to where they compute."""
        for parameter in self._parameters():
            parameter.data = parameter.data.to(device.device(), non_blocking=True)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        """All parameters, before they move: what Transformer Engine keeps of them in FP8 goes, and is made again."""
        for chunk in self.chunks:
            for module in chunk.modules():
                getattr(module, "_fp8_workspaces", {}).clear()
            yield from chunk.parameters()

    @contextlib.contextmanager
    def on_device(self, *, release: bool) -> Iterator[None]:
        """The weights are on the device inside the block, and afterwards too unless ``release``."""
        self.onload()
        yield
        if release:
            self.offload()

    # ------------------------------------------------------------------ the verbs

    def pack(self, samples: Sequence[Sample], weights: dict[str, np.ndarray]) -> list[MicroBatch]:
        """This data rank's micro-batches of ``samples`` (the same list on every rank)."""
        rank, place = self.layout.dp_rank, device.device()
        context = self.layout.cp_rank
        return pack(samples, loss_weights=weights, dp_rank=rank, cp_rank=context, device=place, **self._packing)

    def plan_micro_batches(self, samples: Sequence[Sample]) -> list[list[MicroBatchPlan]]:
        """What ``pack`` gives to every data rank."""
        return plan_micro_batches(samples, **self._packing)

    @property
    def _packing(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "dp_size": self.layout.dp_size,
            "pad_to_multiple": self._multiple,
            "packed": self._packed,
            "cp_size": self.layout.cp_size,
            "by_domain": self.packs_by_domain,
        }

    def forward_backward(
        self,
        batches: Sequence[MicroBatch],
        objective: Objective,
        teachers: Sequence[TeacherSource] | None = None,
        *,
        num_tokens: int,
    ) -> dict[str, float]:
        """Accumulate the gradients of ``batches``; metrics over all ranks, the same on all of them.

        num_tokens: of the whole update, over all data ranks. ``teachers``: one distribution a micro-batch, on ranks of
        the last stage. Raises ``UserError`` for a loss that is not finite; weights are untouched then.
        """
        passes = self._passes(batches, objective.needs, teachers)
        for item in passes:
            item.objective = objective

        def forward_step(model: torch.nn.Module, item: _Pass):
            output = self._forward(model, item)
            tokens = torch.tensor(item.batch.num_tokens, dtype=torch.int, device=output.device)
            return output, lambda loss: (loss * num_tokens, tokens, {})

        self.trainable.forward_backward(forward_step, passes)
        metrics = self._reduce_metrics(passes, objective)
        if not math.isfinite(metrics["loss"]):
            raise UserError(f"the loss is {metrics['loss']}: lower the learning rate, or check rewards and teacher")
        return metrics

    def optim_step(self) -> float:
        """One optimizer update; returns the gradient norm before clipping, refusing one that is not finite."""
        norm = self.trainable.optim_step()
        if not math.isfinite(norm):
            raise UserError(f"the gradient norm is {norm}: lower the learning rate, or check rewards and teacher")
        return norm

    def score(self, samples: Sequence[Sample], output: str = "log_probs") -> list[np.ndarray]:
        """log pi of every sample's response tokens, [length] float32 each (0 elsewhere), on all ranks.

        output: another field of ``TokenOutputs`` that needs no teacher, such as entropy.
        """
        batches = self.pack(samples, {})
        passes = self._passes(batches, (output,), None)
        self._forward_only(passes)
        found = {}
        if self.layout.is_pipeline_last_stage:
            for item in passes:
                whole = self.all_positions(item.batch, getattr(item.result, output))
                values = item.batch.unpack(whole) if self.is_dp_leader else ()
                found |= {index: value.float().cpu().numpy() for index, value in zip(item.batch.indices, values)}
        merged = gather_dicts(found)
        return [merged[index] for index in range(len(samples))]

    def hidden_states(
        self, batches: Sequence[MicroBatch], keep: Callable[[int, torch.Tensor], Any] = lambda number, hidden: hidden
    ) -> list[Any]:
        """``keep(number, hidden)`` of each micro-batch on ranks of the last stage, as soon as it is there; else None.

        hidden: the final hidden states, [S * B, hidden size] (S / T under sequence parallelism), not differentiated.
        """
        passes = [_Pass(batch, keep=functools.partial(keep, number)) for number, batch in enumerate(batches)]
        self._forward_only(passes)
        return [item.result for item in passes]

    def whole_sequences(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [S * B, d] from this rank's part of the sequence under sequence parallelism."""
        return self.shard.gather(hidden).flatten(0, 1) if self.layout.config.sequence_parallel else hidden

    def all_positions(self, batch: MicroBatch, values: torch.Tensor) -> torch.Tensor:
        """Values of all positions from this context rank's [N, ...]; collective over the context ranks."""
        if self.layout.cp_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.layout.cp_size)]
        dist.all_gather(parts, values.contiguous(), group=self.layout.groups.cp)
        return batch.gather_from_cp(parts)

    def save(self, directory: Path, position: dict[str, Any], *, with_optimizer: bool) -> None:
        """Write a checkpoint that appears whole or not at all; collective."""
        self.start_saving(directory, position, with_optimizer=with_optimizer).finish()

    def start_saving(
        self, directory: Path, position: dict[str, Any], *, with_optimizer: bool, async_save: bool = False
    ) -> CheckpointSave:
        """See ``parallel.checkpoint.start_saving``; collective."""
        self._host_copies.clear()  # copies of other weights
        trainable = self.trainable if with_optimizer else None
        with contextlib.nullcontext() if trainable is None else trainable.optimizer_loaded():
            return start_saving(
                directory,
                self.chunks,
                self.layout,
                model_spec=self.spec.to_dict(),
                position=position,
                trainable=trainable,
                async_save=async_save,
            )

    def load(self, directory: Path, *, with_optimizer: bool = False) -> dict[str, Any]:
        """Load a checkpoint of this model, written at any layout; returns its position; collective."""
        trainable = self.trainable if with_optimizer else None
        with contextlib.nullcontext() if trainable is None else trainable.optimizer_loaded():
            return load_checkpoint(
                directory, self.chunks, self.layout, model_spec=self.spec.to_dict(), trainable=trainable
            )

    # ------------------------------------------------------------------ inside

    @property
    def _multiple(self) -> int:
        """What the length of a micro-batch is a multiple of: every rank's tokens fill the blocks of an FP8 recipe."""
        shards = self.layout.tp_size if self.layout.config.sequence_parallel else 1
        return shards * (1 if self._fp8 is None else RECIPES[self._fp8.recipe].tokens)

    @property
    def is_dp_leader(self) -> bool:
        """``Layout.is_dp_leader``."""
        return self.layout.is_dp_leader

    @property
    def is_output_rank(self) -> bool:
        """``Layout.is_output_rank``."""
        return self.layout.is_output_rank

    @property
    def output_weight(self) -> torch.Tensor:
        """The output layer's rows on this rank [padded vocabulary / tensor ranks, hidden size]; last stage only."""
        model = self.chunks[0]
        if self.spec.tie_word_embeddings:
            return model.shared_embedding_or_output_weight()
        return model.output_layer.weight

    @property
    def shard(self) -> VocabShard:
        """The vocabulary columns of this rank's place in the tensor-parallel group, padding left out."""
        tensor = self.layout.tp_size
        group = self.layout.groups.tp if tensor > 1 else None
        return VocabShard.of_padded(
            padded_vocab_size(self.spec.vocab_size, tensor) // tensor, self.spec.vocab_size, group
        )

    @property
    def output_weight_dtype(self) -> torch.dtype:
        """Dtype of weights and hidden states, on every rank."""
        return next(self.chunks[0].parameters()).dtype

    def _passes(
        self, batches: Sequence[MicroBatch], outputs: Sequence[str], teachers: Sequence[TeacherSource] | None
    ) -> list[_Pass]:
        teachers = [None] * len(batches) if teachers is None else teachers
        return [
            _Pass(batch, outputs=tuple(sorted(outputs)), teacher=teacher)
            for batch, teacher in zip(batches, teachers, strict=True)
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
            packed_seq_params=_packed_sequences(item.batch),
            output_processor=self._output,
            output_processor_context=item,
        )

    def _output(self, *, hidden_states: torch.Tensor, context: _Pass, **_: Any) -> torch.Tensor:
        """Megatron's output hook, on the last stage: hidden states [S, B, d] (S / T under sequence parallelism)."""
        item, batch = context, context.batch
        hidden = hidden_states.flatten(0, 1)
        if item.keep is not None:
            item.result = item.keep(hidden.detach())
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

    def _reduce_metrics(self, passes: Sequence[_Pass], objective: Objective) -> dict[str, float]:
        """Metrics of all micro-batches of all data ranks; two all-reduces."""
        none = torch.zeros(0, dtype=torch.int64, device=device.device())
        empty = TokenOutputs(**{name: torch.zeros(0, device=none.device) for name in objective.needs})
        parts = [self._metrics_of(objective, empty, passes[0].batch, none)]
        if self.is_output_rank:
            for item in passes:
                rows = item.batch.response_mask.nonzero().squeeze(1)
                outputs = TokenOutputs(**{name: getattr(item.result, name)[rows] for name in item.outputs})
                parts.append(self._metrics_of(objective, outputs, item.batch, rows))
        merged = merge_metrics(parts)
        sums, maxima = pack_metrics(merged)
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        reduced: dict[str, Metric] = unpack_metrics(merged, sums, maxima)
        return {
            name: metric.value()
            for name, metric in reduced.items()
            if float(metric.denominator) > 0 or not name.startswith((POSITION_PREFIX, GAP_PREFIX))
        }

    def _metrics_of(
        self, objective: Objective, outputs: TokenOutputs, batch: MicroBatch, rows: torch.Tensor
    ) -> dict[str, Metric]:
        """The objective's metrics of the tokens at ``rows``, and its KL by position in the response."""
        columns = batch.columns.select(rows)
        found = objective.metrics(outputs, columns)
        if objective.token_kl is not None:
            values = objective.token_kl(outputs, columns)
            found |= kl_by_position(values, batch.response_positions[rows], self.spec.max_position_embeddings)
        return found


def _packed_sequences(batch: MicroBatch) -> PackedSeqParams | None:
    """The bounds of a packed micro-batch in Megatron's form; None for a padded one."""
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


def kl_by_position(values: torch.Tensor, positions: torch.Tensor, limit: int) -> dict[str, Metric]:
    """Mean of ``values`` [C] over tokens 0, 1, 2-3, 4-7, ... of their responses, named by the first of each group."""
    bins = torch.zeros_like(positions).where(positions == 0, positions.float().log2().floor().long() + 1)
    num_bins = limit.bit_length() + 1
    sums = torch.bincount(bins, weights=values.detach().double(), minlength=num_bins)
    counts = torch.bincount(bins, minlength=num_bins).double()
    firsts = [0, *(2**power for power in range(num_bins - 1))]
    return {
        f"{POSITION_PREFIX}{first}": Metric(sums[place], counts[place], "mean") for place, first in enumerate(firsts)
    }
