"""A Megatron model under one parallel layout, trainable or frozen: pack, train, score, hidden states, save and load.

Full logits are never materialised: Megatron's output hook passes the final hidden states to ``kl.linear_divergence``
together with the micro-batch's columns, the objective's token loss and, for distillation, the teacher's distribution.
Samples and objectives come from ``stages``; generation is in ``rollout``.

Shapes: b batch (sequences), s sequence length (s / tp under sequence parallelism), t tokens of a micro-batch on this
context-parallel rank, h hidden size, v_tp local rows of the padded vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.precision import Fp8Config
from megatron_s2d.config.recompute import NO_RECOMPUTE
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.packing import MicroBatch, MicroBatchPlan, MiniBatch
from megatron_s2d.data.sample_exchange import move_samples, ranks_in_layout, return_arrays
from megatron_s2d.errors import UserError
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import TeacherSource
from megatron_s2d.models.build import build_model
from megatron_s2d.models.families import padded_vocab_size
from megatron_s2d.models.routing_replay import RoutingReplay, replaying
from megatron_s2d.objectives.policy import SEQUENCE_LOG_RATIOS
from megatron_s2d.objectives.terms import Metric, Objective
from megatron_s2d.parallel import device
from megatron_s2d.parallel.checkpoint import CheckpointSave, load_checkpoint, start_saving
from megatron_s2d.parallel.frozen_products import replace_frozen_products
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.parallel.trainable_model import TrainableModel, forward_only
from megatron_s2d.records import AnySample, Sample
from megatron_s2d.train.adapter import ModelAdapter
from megatron_s2d.train.alignment import length_multiple
from megatron_s2d.train.expert_load import ExpertLoad
from megatron_s2d.train.host_weights import HostWeights
from megatron_s2d.train.micro_batches import MicroBatcher
from megatron_s2d.train.packed_sequences import packed_seq_params
from megatron_s2d.train.pass_metrics import reduce_metrics
from megatron_s2d.train.sequence_ratios import with_sequence_log_ratios

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
    """A model and its layout. ``trainable``: optimizer and schedule; None if frozen."""

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
        tp_comm_overlap: bool = False,
        routing_replay: bool = False,
    ):
        """Build the model with random weights of ``seed``, or with uninitialised ones for ``load`` to fill (None).

        max_tokens: token budget of a micro-batch. packed: sequences are laid end to end, without padding. options:
        activation recomputation and router loss. beta: of a JSD. fp8: compute the layers in FP8. tp_comm_overlap: in
        training tensor ranks communicate during products; needs packed sequences and pads each micro-batch to
        ``max_tokens``. routing_replay: send tokens to the experts that their samples recorded.
        """
        self.spec, self.layout, self.max_tokens, self._beta = spec, layout, max_tokens, beta
        self._packed, self._tp_comm_overlap = packed, tp_comm_overlap
        self._pad_to_multiple = length_multiple(layout.config, fp8, max_tokens if tp_comm_overlap else None)
        self._chunks = build_model(
            spec,
            layout,
            params_dtype=DTYPES[precision],
            seed=seed,
            recompute=NO_RECOMPUTE if options is None else options.recomputation,
            moe_aux_loss_coeff=0.0 if options is None else options.moe_aux_loss_coeff,
            fp8=fp8,
            overlapped_tokens=self._pad_to_multiple if tp_comm_overlap else None,
        )
        replace_frozen_products(self._chunks)
        self.routing_replay = RoutingReplay(self._chunks, spec, layout) if routing_replay else None
        self.trainable: TrainableModel | None = None
        self.adapter: ModelAdapter | None = None
        self._is_base = False  # see ``without_adapter``
        self._expert_load: ExpertLoad | None = None
        self._host_weights = HostWeights()
        self.packs_by_domain = False  # micro-batches of one domain each, for teachers by domain

    @property
    def chunks(self) -> list[torch.nn.Module]:
        """This rank's part of the model, with all weights of the last update."""
        if self.trainable is not None:
            self.trainable.finish_param_sync()
        return self._chunks

    def prepare_training(self, optimizer: OptimizerConfig, total_updates: int, *, offload: bool = False) -> None:
        """Add gradient buffers, optimizer and schedule; load the weights before, because masters are copied from them.

        offload: see ``TrainableModel``.
        """
        self.trainable = TrainableModel(self._chunks, self.layout, optimizer, total_updates, offload=offload)
        if self.spec.num_experts:
            self._expert_load = ExpertLoad(self._chunks, self.spec, self.layout, self.routing_replay)

    def add_adapter(self, lora: LoraConfig, seed: int) -> None:
        """Freeze the weights, which are loaded, and train a LoRA adapter instead of them. Collective."""
        self.adapter = ModelAdapter.add(self._chunks, self.spec, self.layout, lora, seed)

    def without_adapter(self) -> MegatronModel:
        """Return this model as it is without its adapter, with the same weights in memory.

        It is frozen already, and stays on the device with the trained model: ``freeze``, ``offload`` and ``onload`` do
        nothing.
        """
        base = copy.copy(self)
        base.trainable, base.routing_replay, base._is_base = None, None, True
        return base

    def freeze(self) -> None:
        """Disable gradients of all parameters."""
        for chunk in () if self._is_base else self._chunks:
            chunk.requires_grad_(False)

    def offload(self) -> None:
        """Offload a frozen model's weights to pinned host memory; ``onload`` brings them back. No-op on a CPU.

        The host copy is cached, so only the first offload copies.
        """
        if self._is_base:
            return
        if self.trainable is not None:
            raise RuntimeError("a model that is trained cannot be offloaded: its host copy would be stale")
        if device.capabilities().cuda:
            self._host_weights.offload(self.chunks)

    def onload(self) -> None:
        """Move the weights to the device."""
        if not self._is_base:
            self._host_weights.onload(self.chunks)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield this rank's parameters, with all values of the last update."""
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
        self, samples: Sequence[AnySample], loss_weights: Mapping[str, Sequence[float | np.ndarray]]
    ) -> list[MicroBatch]:
        """Return the micro-batches of the samples that this data-parallel rank holds, as many as on every other.

        Collective. Raises ``UserError``, on every rank, for a token outside of the vocabulary, and with
        ``tp_comm_overlap`` for a sample that is longer than a micro-batch.
        """
        return self._micro_batcher.pack(samples, loss_weights)

    def balance(self, mini_batch: MiniBatch) -> tuple[MiniBatch, int]:
        """Move samples to data-parallel ranks with fewer tokens; return also how many were moved. Collective."""
        return self._micro_batcher.balance(mini_batch)

    def plan_micro_batches(self, samples: Sequence[AnySample], ranks: Iterable[int]) -> dict[int, list[MicroBatchPlan]]:
        """Return the plan of the micro-batches that ``pack`` makes, for the data-parallel ``ranks``. Collective."""
        return self._micro_batcher.plan(samples, ranks)

    @property
    def _micro_batcher(self) -> MicroBatcher:
        return MicroBatcher(
            self.layout,
            self.spec.vocab_size,
            self.max_tokens,
            self._packed,
            self._pad_to_multiple,
            self._count_multiple,
            self.packs_by_domain,
            self._pad_to_multiple * self.layout.cp_size if self._tp_comm_overlap else None,
            None if self.routing_replay is None else self.routing_replay.routed_layers,
        )

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        objective: Objective,
        teachers: Sequence[TeacherSource | None] | None = None,
        *,
        num_tokens: int,
        observe: Callable[[MicroBatch, TokenOutputs], None] | None = None,
    ) -> dict[str, Metric]:
        """Accumulate the gradients of ``micro_batches``; return metrics reduced over all ranks, the same on all.

        num_tokens: of the mini-batch, over all data-parallel ranks. teachers: one distribution per micro-batch on ranks
        of the last pipeline stage. observe: called there with every micro-batch and its outputs, after all passes.
        Raises ``UserError`` for a loss that is not finite, before weights change.
        """
        passes = self._passes(micro_batches, objective.needs, teachers)
        for item in passes:
            item.objective = objective

        def forward_step(model: torch.nn.Module, item: _Pass):
            output = self._forward(model, item)
            tokens = torch.full((), item.batch.num_tokens, dtype=torch.int, device=output.device)  # copies nothing
            return output, lambda loss: (loss * num_tokens, tokens, {})

        recording = contextlib.nullcontext() if self._expert_load is None else self._expert_load.recording()
        with recording, replaying(self.routing_replay, [item.batch.routes for item in passes], trains=True):
            self.trainable.forward_backward(forward_step, passes, self._hidden_shapes(passes))
        if observe is not None and self.layout.is_pipeline_last_stage:
            for item in passes:
                observe(item.batch, item.result)
        metrics = reduce_metrics(
            objective, passes, self.layout, expert_load=self._expert_load, limit=self.spec.max_position_embeddings
        )
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

    def score(
        self, samples: Sequence[AnySample], output: str = "log_probs", *, holders: Layout | None = None
    ) -> list[np.ndarray | None]:
        """Return the log-probabilities of the tokens of this data-parallel rank's samples, and None for the others'.

        [length] float32 each (0 outside responses), on all ranks of the replica. Collective. output: another field of
        ``TokenOutputs`` that needs no teacher, such as entropy. holders: the layout whose data-parallel ranks hold
        ``samples``, by default this model's: they are sent to the ranks of this model, and the results back.
        """
        holders = holders or self.layout
        ranks = ranks_in_layout(samples, holders, self.layout, by_domain=self.packs_by_domain)
        own, _ = move_samples(samples, holders, self.layout, ranks)
        return return_arrays(self._score_own(own, output), samples, holders, self.layout, ranks)

    def score_replicated(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Return ``score`` of a few samples that every rank has; every data-parallel rank computes all of them."""
        ranks = [self.layout.dp_rank] * len(samples)
        return return_arrays(self._score_own(samples, "log_probs"), samples, self.layout, self.layout, ranks)

    def _score_own(self, samples: Sequence[AnySample], output: str) -> dict[int, np.ndarray]:
        """Return the scores of this data-parallel rank's samples, by index, on its leader."""
        passes = self._passes(self.pack(samples, {}), (output,), None)
        self._forward_only(passes)
        local: dict[int, np.ndarray] = {}
        if self.layout.is_pipeline_last_stage:
            for item in passes:
                values = self.gather_context_parallel(item.batch, getattr(item.result, output))
                if self.layout.is_dp_leader:
                    rows = item.batch.unpack(values.float().cpu())  # one copy: the host waits for each
                    local |= {i: row.numpy() for i, row in zip(item.batch.indices, rows, strict=True)}
        return local

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

    def save(self, directory: str | Path, trainer_state: dict[str, Any], *, with_optimizer: bool) -> None:
        """Write a checkpoint, which appears complete or not at all; collective."""
        self.start_saving(Path(directory), trainer_state, with_optimizer=with_optimizer).finish()

    def start_saving(
        self, directory: Path, trainer_state: dict[str, Any], *, with_optimizer: bool, async_save: bool = False
    ) -> CheckpointSave:
        """See ``parallel.checkpoint.start_saving``; collective. Without the optimizer an adapter must be merged."""
        self._host_weights.forget()
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

    def load(self, directory: str | Path, *, with_optimizer: bool = False) -> dict[str, Any]:
        """Load a checkpoint of this model, written at any layout, and return its trainer state; collective."""
        trainable = self.trainable if with_optimizer else None
        with contextlib.nullcontext() if trainable is None else trainable.optimizer_loaded():
            return load_checkpoint(
                Path(directory), self.chunks, self.layout, model_spec=self.spec.to_dict(), trainable=trainable
            )

    @property
    def _count_multiple(self) -> int:
        """Alignment of the number of micro-batches: the interleaved schedule runs them in groups."""
        return self.layout.pp_size if self.layout.vp_size > 1 else 1

    @property
    def output_weight(self) -> torch.Tensor:
        """The output layer's rows on this rank, [v_tp, h]; only on the last pipeline stage."""
        model = self.chunks[-1]
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
        return next(self._chunks[0].parameters()).dtype

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

    def _hidden_shapes(self, passes: Sequence[_Pass]) -> list[tuple[int, int, int]]:
        """Shapes of the hidden states [s, b, h] that pipeline ranks exchange."""
        shards = self.layout.tp_size if self.layout.config.sequence_parallel else 1
        return [(item.batch.shape[0] // shards, item.batch.shape[1], self.spec.hidden_size) for item in passes]

    def _forward_only(self, passes: Sequence[_Pass]) -> None:
        def forward_step(model: torch.nn.Module, item: _Pass):
            return self._forward(model, item), lambda output, non_loss_data=False: None

        missing = -len(passes) % self._count_multiple
        if missing:
            passes = [*passes, *[_Pass(self.pack([], {})[0], outputs=passes[0].outputs)] * missing]
        adapter_off = self.adapter.off() if self._is_base else contextlib.nullcontext()
        routes = [item.batch.routes for item in passes]
        with replaying(self.routing_replay, routes, trains=False), adapter_off:
            forward_only(self.chunks, self.layout, forward_step, passes, self._hidden_shapes(passes))

    def _forward(self, model: torch.nn.Module, item: _Pass) -> torch.Tensor:
        padding = item.batch.padding_mask if self.spec.num_experts else None
        if self.routing_replay is not None:
            self.routing_replay.load(item.batch.routes)
        return model(
            item.batch.token_ids,
            None,
            None,
            padding_mask=padding,
            packed_seq_params=packed_seq_params(item.batch),
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
        divergence = functools.partial(
            linear_divergence,
            hidden,
            self.output_weight,
            shard=self.shard,
            temperature=batch.temperature,
            target_ids=batch.labels,
            response_rows=batch.response_rows,
            sequence_parallel=self.layout.config.sequence_parallel,
            check_values=False,  # pack checks ids, forward_backward divergences
        )
        objective, token_loss = item.objective, None
        if objective is not None:
            if SEQUENCE_LOG_RATIOS in objective.columns:
                cp_group = self.layout.groups.cp if self.layout.cp_size > 1 else None
                item.batch = with_sequence_log_ratios(batch, divergence(outputs=("log_probs",))[1].log_probs, cp_group)
            columns = item.batch.columns

            def token_loss(outputs: TokenOutputs, rows: torch.Tensor) -> torch.Tensor:
                return objective.token_loss(outputs, columns.select(rows))

        loss, item.result = divergence(
            outputs=item.outputs, teacher=item.teacher, beta=self._beta, token_loss=token_loss
        )
        return loss
