"""Frozen models as teachers: their exact or top-k distributions at any layout, and their scores of sampled tokens.

A teacher gives final hidden states; the loss computes its distribution from them with the teacher's output layer, which
is sharded like the student's. A teacher of another layout computes on its own data-parallel ranks, one with a view of
its own in micro-batches of its own, and its hidden states are sent to the ranks that train on them
(``hidden_state_transfer.py``). Teachers that take turns on the device
are offloaded to host memory. Elsewhere: cached teachers (``cached.py``), served teachers (``served.py``), and the use
of the distributions (``stages/opd.py``).

Shapes: t counted positions, v_tp local vocabulary, k top-k entries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.buffer_sizes import TOP_K_ROWS_PER_CHUNK
from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.kl.logits import vocab_parallel_support, vocab_parallel_topk
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import GeometricTarget, LazyHiddenStates, Projection, TeacherSource, Temperature, TopK
from megatron_s2d.objectives.terms import Metric
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample
from megatron_s2d.teachers.hidden_state_transfer import (
    OffloadedRows,
    OutputLayers,
    offload_hidden_states,
    transfer_hidden_states,
)
from megatron_s2d.teachers.routing import is_routed, score_by_domain, teacher_of
from megatron_s2d.teachers.views import PromptViews, score_in_view
from megatron_s2d.train.megatron_model import MegatronModel


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherRouter:
    """A frozen model for every domain, or one (under the key ``None``) for all."""

    models: Mapping[str | None, MegatronModel]
    views: PromptViews | None = None  # the prompts as the models read them; None: as the student does
    _output_layers: OutputLayers = dataclasses.field(default_factory=OutputLayers)

    @classmethod
    def load(
        cls,
        stages: str | Mapping[str, str],
        load: Callable[[str], MegatronModel],
        views: PromptViews | None = None,
    ) -> TeacherRouter:
        """Load the finished stages that a configuration names; a stage that serves several domains is loaded once."""
        if isinstance(stages, str):
            return cls({None: load(stages)}, views)
        loaded = {stage: load(stage) for stage in dict.fromkeys(stages.values())}
        if len(loaded) > 1:
            for model in loaded.values():
                model.offload()
        return cls({domain: loaded[stage] for domain, stage in stages.items()}, views)

    @property
    def is_routed(self) -> bool:
        """Whether each domain has a model of its own."""
        return is_routed(self.models)

    @property
    def _takes_turns(self) -> bool:
        """Whether models take turns on the device."""
        return len(set(map(id, self.models.values()))) > 1

    @contextlib.contextmanager
    def model_for(self, domain: str | None) -> Iterator[MegatronModel]:
        """Yield the model of ``domain``, on the device inside the block."""
        model = teacher_of(self.models, domain)
        with model.on_device(release=self._takes_turns):
            yield model

    def score(self, samples: Sequence[AnySample], *, holders: Layout) -> list[np.ndarray | None]:
        """Return log pi of every sample's response under the model of its domain, as ``MegatronModel.score``."""

        def score(domain: str, in_domain: list[AnySample]) -> list[np.ndarray | None]:
            with self.model_for(domain) as model:
                score_as_read = functools.partial(model.score, holders=holders)
                return score_in_view(in_domain, domain, self.views, holders, score_as_read)

        return score_by_domain(samples, score)

    def distributions(
        self, student: MegatronModel, mini_batch: MiniBatch, micro_batches: Sequence[MicroBatch]
    ) -> list[LazyHiddenStates | None]:
        """Return each micro-batch's teacher distribution at its response tokens; collective over all ranks.

        With models by domain a micro-batch must hold one domain (``MegatronModel.packs_by_domain``).
        """
        sources: list[LazyHiddenStates | None] = [None] * len(micro_batches)
        for domain in sorted({sample.domain for sample in mini_batch.samples}) if self.is_routed else [None]:
            indices = [
                index for index, batch in enumerate(micro_batches) if not self.is_routed or batch.domain == domain
            ]
            with self.model_for(domain) as teacher:
                weight = self._output_layers.of(teacher, student, offload=self._takes_turns)
                selected = [micro_batches[index] for index in indices]
                views = self.views if self.views is not None and self.views.has(domain) else None
                if teacher.layout is student.layout and views is None:
                    states = offload_hidden_states(teacher, selected)
                else:
                    states = transfer_hidden_states(teacher, student, mini_batch.samples, domain, selected, views)
                for index, rows in zip(indices, states, strict=True):
                    if rows is not None:
                        sources[index] = LazyHiddenStates(rows.read, weight, micro_batches[index].temperature)
        return sources


@dataclasses.dataclass(frozen=True, eq=False)
class FullTeacher:
    """Full-vocabulary distributions; with a reward scale their geometric mix with the reference's (methods.md M4)."""

    student: MegatronModel
    teachers: TeacherRouter
    references: TeacherRouter | None = None
    reward_scale: float = 1.0

    def distributions(
        self, mini_batch: MiniBatch, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        teacher_sources = self.teachers.distributions(self.student, mini_batch, micro_batches)
        if self.reward_scale == 1.0:
            return teacher_sources
        reference_sources = self.references.distributions(self.student, mini_batch, micro_batches)
        return [
            None if teacher is None else GeometricTarget(teacher, reference, self.reward_scale)
            for teacher, reference in zip(teacher_sources, reference_sources, strict=True)
        ]

    def metrics(self) -> dict[str, Metric]:
        """Return nothing: distributions are not measured."""
        return {}


def overlap_metric(num_shared: float | torch.Tensor, num_selected: int) -> dict[str, Metric]:
    """Return ``topk/overlap`` of all ranks: shared tokens by selected ones. Collective over the job."""
    sums = torch.tensor([num_shared, num_selected], dtype=torch.float64, device=device.device())
    dist.all_reduce(sums)
    return {"topk/overlap": Metric(sums[0], sums[1], "mean")}


@dataclasses.dataclass(eq=False)
class TopKTeacher:
    """Distributions on the top-k tokens of student, teacher, or both (``union``: the student's k, then the teacher's).

    The student's own support costs one more forward pass of the student.
    """

    student: MegatronModel
    teachers: TeacherRouter
    k: int
    support: str
    tail: str
    _num_shared: float | torch.Tensor = 0.0  # of the last call: top-k tokens of the student that are the teacher's too
    _num_selected: int = 0  # of the last call: response tokens times k

    def metrics(self) -> dict[str, Metric]:
        """Return ``topk/overlap``: share of the student's top-k tokens that are among the teacher's."""
        if self.support == "teacher":
            return {}
        return overlap_metric(self._num_shared, self._num_selected)

    def distributions(
        self, mini_batch: MiniBatch, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        teacher_states = self.teachers.distributions(self.student, mini_batch, micro_batches)
        student_states: Sequence[OffloadedRows | None] = [None] * len(micro_batches)
        self._num_shared, self._num_selected = 0.0, 0
        if self.support != "teacher":
            student_states = offload_hidden_states(self.student, micro_batches)
        if not self.student.layout.is_pipeline_last_stage:
            return [None] * len(micro_batches)
        return [self._top_k(*parts) for parts in zip(micro_batches, teacher_states, student_states, strict=True)]

    @torch.no_grad()
    def _top_k(self, batch: MicroBatch, teacher_states: LazyHiddenStates, student_states: OffloadedRows | None) -> TopK:
        shard = self.student.shard
        counted = batch.response_mask.nonzero().squeeze(1)
        temperature = _at(batch.temperature, counted)
        teacher = Projection(
            teacher_states.hidden(), teacher_states.weight_shard()[: shard.columns], 1.0, torch.float32
        )
        student = None
        if student_states is not None:
            weight = self.student.output_weight.detach()[: shard.columns]
            student = Projection(student_states.read(), weight, 1.0, torch.float32)
        width = min(2 * self.k, shard.vocab_size) if self.support == "union" else self.k
        # Positions that are not counted need distinct ids too.
        ids = torch.arange(width, device=counted.device).repeat(batch.labels.numel(), 1)
        log_probs, tail = torch.zeros(ids.shape, device=ids.device), torch.zeros(len(ids), device=ids.device)
        for start in range(0, len(counted), TOP_K_ROWS_PER_CHUNK):
            rows = slice(start, min(start + TOP_K_ROWS_PER_CHUNK, len(counted)))
            logits = teacher.logits(rows, torch.empty(rows.stop - start, shard.columns, device=counted.device))
            chunk_temperature = _at(temperature, rows)
            student_ids = None
            if student is not None:
                student_logits = student.logits(rows, torch.empty_like(logits))
                student_ids = vocab_parallel_topk(student_logits, self.k, shard, chunk_temperature)[0]
                self._count_overlap(logits, student_ids, chunk_temperature)
            positions = counted[rows]
            ids[positions], log_probs[positions], tail[positions] = select_support(
                logits, student_ids, self.support, self.k, shard, chunk_temperature
            )
        return TopK(ids, log_probs, tail, tail=self.tail, support=self.support)

    def _count_overlap(self, logits: torch.Tensor, student_ids: torch.Tensor, temperature: Temperature) -> None:
        """Count the tokens of ``student_ids`` [t, k] among the top k of the teacher's ``logits`` [t, v_tp]."""
        teacher_ids = vocab_parallel_topk(logits, self.k, self.student.shard, temperature)[0]
        if self.student.layout.is_output_rank:
            shared = (student_ids.unsqueeze(2) == teacher_ids.unsqueeze(1)).any(2)
            self._num_shared = self._num_shared + shared.sum()
            self._num_selected += len(student_ids) * self.k


def select_support(
    logits: torch.Tensor,
    student_ids: torch.Tensor | None,
    support: str,
    k: int,
    shard: VocabShard,
    temperature: Temperature,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (ids, the teacher's log-probabilities, log tail mass) of the support of its ``logits`` [t, v_tp].

    student_ids: the student's top k [t, k], for a ``support`` of student or union.
    """
    if support == "teacher":
        return vocab_parallel_topk(logits, k, shard, temperature)
    ids = student_ids
    if support == "union":
        width = min(2 * k, shard.vocab_size)
        teacher_ids = vocab_parallel_topk(logits, width, shard, temperature)[0]
        is_shared = (teacher_ids.unsqueeze(2) == student_ids.unsqueeze(1)).any(2)
        # The teacher's most likely tokens that are not the student's, in their order.
        order = is_shared.long().argsort(dim=1, stable=True)
        ids = torch.cat([student_ids, teacher_ids.gather(1, order)[:, : width - k]], dim=1)
    log_probs, tail = vocab_parallel_support(logits, ids, shard, temperature)
    return ids, log_probs, tail


def _at(temperature: Temperature, rows: torch.Tensor | slice) -> Temperature:
    """Return the temperature of ``rows``: a number, or those rows of a per-token temperature."""
    return temperature[rows] if isinstance(temperature, torch.Tensor) else temperature
