"""Frozen models as teachers: which one a sample belongs to, their exact distributions at any layout, their scores.

A teacher gives final hidden states; the loss makes its distribution from them with the teacher's output layer cut like
the student's. A teacher of another layout scores on its own data ranks, and its hidden states travel to the ranks that
train on them (``hidden_state_transfer.py``). Teachers that wait keep their weights in host memory. Left out: cached teachers
(``cached.py``) and what the distributions are used for (``distill.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.buffer_sizes import TOP_K_ROWS_PER_CHUNK
from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.errors import UserError
from megatron_s2d.kl.logits import vocab_parallel_support, vocab_parallel_topk
from megatron_s2d.kl.teachers import GeometricTarget, LazyHiddenStates, Projection, TeacherSource, TopK
from megatron_s2d.objectives.terms import Metric
from megatron_s2d.parallel import device
from megatron_s2d.records import Sample
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.teachers.hidden_state_transfer import OffloadedRows, OutputLayers, rows_of, transfer_hidden_states
from megatron_s2d.train.megatron_model import MegatronModel


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherRouter:
    """A model for every domain, or one (under the key ``None``) for all."""

    models: Mapping[str | None, MegatronModel]
    _output_layers: OutputLayers = dataclasses.field(default_factory=OutputLayers)

    @classmethod
    def load(cls, stages: str | Mapping[str, str], load: Callable[[str], MegatronModel]) -> TeacherRouter:
        """The finished stages that a configuration names; a stage that serves several domains is loaded once."""
        if isinstance(stages, str):
            return cls({None: load(stages)})
        loaded = {stage: load(stage) for stage in dict.fromkeys(stages.values())}
        found = cls({domain: loaded[stage] for domain, stage in stages.items()})
        if len(loaded) > 1:
            for policy in loaded.values():
                policy.offload()
        return found

    @property
    def is_routed(self) -> bool:
        """Whether domains have models of their own."""
        return None not in self.models

    @property
    def _is_offloaded(self) -> bool:
        """Whether models take turns on the device."""
        return len(set(map(id, self.models.values()))) > 1

    @contextlib.contextmanager
    def model_for(self, domain: str) -> Iterator[MegatronModel]:
        """The model of ``domain``, on the device for the length of the block."""
        policy = self.models.get(domain if self.is_routed else None)
        if policy is None:
            raise UserError(
                f"there is no teacher for the domain '{domain}' (there is one for {', '.join(self.models)})"
            )
        with policy.on_device(release=self._is_offloaded):
            yield policy

    def score(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """log pi of every sample's response under the model of its domain, as ``MegatronModel.score``."""
        found: list[np.ndarray | None] = [None] * len(samples)
        for domain in sorted({sample.domain for sample in samples}):
            places = [place for place, sample in enumerate(samples) if sample.domain == domain]
            with self.model_for(domain) as policy:
                for place, score in zip(places, policy.score([samples[place] for place in places]), strict=True):
                    found[place] = score
        return found

    def distributions(
        self, student: MegatronModel, update: MiniBatch, batches: Sequence[MicroBatch]
    ) -> list[LazyHiddenStates | None]:
        """The exact distribution of each micro-batch's model at its response tokens; collective over all ranks.

        With models by domain a micro-batch must hold one domain (``MegatronModel.pack(by_domain=True)``).
        """
        found: list[LazyHiddenStates | None] = [None] * len(batches)
        for domain in sorted({sample.domain for sample in update.samples}) if self.is_routed else [None]:
            places = [place for place, batch in enumerate(batches) if not self.is_routed or batch.domain == domain]
            with self.model_for(domain) as policy:
                weight = self._output_layers.of(policy, student, waits=self._is_offloaded)
                own = [batches[place] for place in places]
                if policy.layout is student.layout:
                    rows = rows_of(policy, own)
                else:
                    rows = transfer_hidden_states(policy, student, update.samples, domain, own)
                for place, item in zip(places, rows, strict=True):
                    if item is not None:
                        found[place] = LazyHiddenStates(item.read, weight, batches[place].temperature)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class ServedTeachers:
    """``TeacherRouter`` from servers that hold the teachers' weights; likeliest tokens are in ``served.py``."""

    engines: Mapping[str | None, ServedEngine]

    @property
    def is_routed(self) -> bool:
        """Whether domains have models of their own."""
        return None not in self.engines

    def engine_for(self, domain: str) -> ServedEngine:
        """The servers of the teacher of ``domain``."""
        engine = self.engines.get(domain if self.is_routed else None)
        if engine is None:
            raise UserError(f"there is no teacher for the domain '{domain}'")
        return engine

    def score(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """See ``TeacherRouter.score``; at temperature 1."""
        found: list[np.ndarray | None] = [None] * len(samples)
        for domain in sorted({sample.domain for sample in samples}):
            places = [place for place, sample in enumerate(samples) if sample.domain == domain]
            engine = self.engine_for(domain)
            for place, score in zip(places, engine.score([samples[place] for place in places]), strict=True):
                found[place] = score
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class FullTeacher:
    """Whole distributions for the loss; with a reward scale the geometric mix with the reference (methods.md M4)."""

    student: MegatronModel
    teachers: TeacherRouter
    references: TeacherRouter | None = None
    reward_scale: float = 1.0

    def distributions(self, update: MiniBatch, batches: Sequence[MicroBatch]) -> list[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        states = self.teachers.distributions(self.student, update, batches)
        if self.reward_scale == 1.0:
            return states
        others = self.references.distributions(self.student, update, batches)
        return [
            None if state is None else GeometricTarget(state, other, self.reward_scale)
            for state, other in zip(states, others, strict=True)
        ]

    def metrics(self) -> dict[str, Metric]:
        """Nothing is measured."""
        return {}


@dataclasses.dataclass(eq=False)
class TopKTeacher:
    """Distributions on the k likeliest tokens of student, teacher, or both (``union``: 2 k tokens, teacher's more).

    The student's own support costs one more forward pass of the student.
    """

    student: MegatronModel
    teachers: TeacherRouter
    k: int
    support: str
    tail: str
    _shared: float | torch.Tensor = 0.0  # tokens among the k likeliest of both models, over the last call's responses
    _counted: int = 0  # response tokens times k

    def metrics(self) -> dict[str, Metric]:
        """``topk/overlap``: share of the student's k likeliest tokens that are among the teacher's."""
        if self.support == "teacher":
            return {}
        sums = torch.tensor([self._shared, self._counted], dtype=torch.float64, device=device.device())
        dist.all_reduce(sums)
        return {"topk/overlap": Metric(sums[0], sums[1], "mean")}

    def distributions(self, update: MiniBatch, batches: Sequence[MicroBatch]) -> list[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        states = self.teachers.distributions(self.student, update, batches)
        own: Sequence[OffloadedRows | None] = [None] * len(batches)
        self._shared, self._counted = 0.0, 0
        if self.support != "teacher":
            own = rows_of(self.student, batches)
        if not self.student.layout.is_pipeline_last_stage:
            return [None] * len(batches)
        return [self._top_k(*parts) for parts in zip(batches, states, own, strict=True)]

    @torch.no_grad()
    def _top_k(self, batch: MicroBatch, state: LazyHiddenStates, own: OffloadedRows | None) -> TopK:
        student, shard = self.student, self.student.shard
        counted = batch.response_mask.nonzero().squeeze(1)
        temperature = batch.temperature[counted] if isinstance(batch.temperature, torch.Tensor) else batch.temperature
        teacher = Projection(state.hidden(), state.weight_shard()[: shard.columns], 1.0, torch.float32)
        mine = None
        if own is not None:
            mine = Projection(own.read(), student.output_weight.detach()[: shard.columns], 1.0, torch.float32)
        width = min(2 * self.k, shard.vocab_size) if self.support == "union" else self.k
        # Positions that are not counted need distinct ids too.
        ids = torch.arange(width, device=counted.device).repeat(batch.labels.numel(), 1)
        log_probs, tail = torch.zeros(ids.shape, device=ids.device), torch.zeros(len(ids), device=ids.device)
        for start in range(0, len(counted), TOP_K_ROWS_PER_CHUNK):
            rows = slice(start, min(start + TOP_K_ROWS_PER_CHUNK, len(counted)))
            sizes = (rows.stop - start, shard.columns)
            at = temperature[rows] if isinstance(temperature, torch.Tensor) else temperature
            logits = teacher.logits(rows, torch.empty(sizes, device=counted.device))
            chosen = None
            if mine is not None:
                own_logits = mine.logits(rows, torch.empty_like(logits))
                chosen = vocab_parallel_topk(own_logits, self.k, shard, at)[0]
                best = vocab_parallel_topk(logits, self.k, shard, at)[0]
                if student.layout.is_output_rank:
                    self._shared = self._shared + (chosen.unsqueeze(2) == best.unsqueeze(1)).any(2).sum()
                    self._counted += len(chosen) * self.k
            places = counted[rows]
            ids[places], log_probs[places], tail[places] = self._support(logits, chosen, at)
        return TopK(ids, log_probs, tail, tail=self.tail, support=self.support)

    def _support(self, logits, chosen, temperature) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shard = self.student.shard
        if self.support == "teacher":
            return vocab_parallel_topk(logits, self.k, shard, temperature)
        if self.support == "union":
            size = min(2 * self.k, shard.vocab_size)
            ids = vocab_parallel_topk(logits, size, shard, temperature)[0]
            known = (ids.unsqueeze(2) == chosen.unsqueeze(1)).any(2)
            # The teacher's likeliest tokens that the student did not choose, in their order.
            order = known.long().argsort(dim=1, stable=True)
            extra = ids.gather(1, order)[:, : size - self.k]
            chosen = torch.cat([chosen, extra], dim=1)
        log_probs, tail = vocab_parallel_support(logits, chosen, shard, temperature)
        return chosen, log_probs, tail
