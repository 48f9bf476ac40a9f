"""Frozen models as teachers: which one a sample belongs to, their exact distributions at any layout, their scores.

A teacher gives final hidden states; the loss makes its distribution from them with the teacher's output layer cut like
the student's. A teacher of another layout scores on its own data ranks, and its hidden states travel to the ranks that
train on them. Teachers that wait keep their weights in host memory. Left out: cached teachers (``cached.py``) and what
the distributions are used for (``distill.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.config.base import UserError
from megatron_s2d.data.packing import MicroBatch, UpdateBatch
from megatron_s2d.kl.logits import vocab_parallel_support, vocab_parallel_topk
from megatron_s2d.kl.reshard import redistribute_output_layer
from megatron_s2d.kl.teachers import GeometricTarget, HiddenStates, TeacherSource, TopK
from megatron_s2d.parallel import device
from megatron_s2d.records import Sample
from megatron_s2d.rollout.sglang.engine import SglangEngine
from megatron_s2d.train.policy import Policy, gather_dicts

_ROWS_PER_CHUNK = 1024  # positions whose whole logits exist at a time while a support is chosen


@dataclasses.dataclass(frozen=True, eq=False)
class ByDomain:
    """A model for every domain, or one (under the key ``None``) for all."""

    policies: Mapping[str | None, Policy]

    @classmethod
    def load(cls, stages: str | Mapping[str, str], load: Callable[[str], Policy]) -> ByDomain:
        """The finished stages that a configuration names; a stage that serves several domains is loaded once."""
        if isinstance(stages, str):
            return cls({None: load(stages)})
        loaded = {stage: load(stage) for stage in dict.fromkeys(stages.values())}
        found = cls({domain: loaded[stage] for domain, stage in stages.items()})
        if len(loaded) > 1:
            for policy in loaded.values():
                policy.to_host()
        return found

    @property
    def is_routed(self) -> bool:
        """Whether domains have models of their own."""
        return None not in self.policies

    @contextlib.contextmanager
    def of(self, domain: str) -> Iterator[Policy]:
        """The model of ``domain``, on the device for the length of the block."""
        policy = self.policies.get(domain if self.is_routed else None)
        if policy is None:
            raise UserError(
                f"there is no teacher for the domain '{domain}' (there is one for {', '.join(self.policies)})"
            )
        with policy.on_device(release=len(set(map(id, self.policies.values()))) > 1):
            yield policy

    def score(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """log pi of every sample's response under the model of its domain, as ``Policy.score``."""
        found: list[np.ndarray | None] = [None] * len(samples)
        for domain in sorted({sample.domain for sample in samples}):
            places = [place for place, sample in enumerate(samples) if sample.domain == domain]
            with self.of(domain) as policy:
                for place, score in zip(places, policy.score([samples[place] for place in places]), strict=True):
                    found[place] = score
        return found

    def distributions(
        self, student: Policy, update: UpdateBatch, batches: Sequence[MicroBatch]
    ) -> list[HiddenStates | None]:
        """The exact distribution of each micro-batch's model at every position; collective over all ranks.

        With models by domain a micro-batch must hold one domain (``Policy.pack(by_domain=True)``).
        """
        found: list[HiddenStates | None] = [None] * len(batches)
        for domain in sorted({sample.domain for sample in update.samples}) if self.is_routed else [None]:
            places = [place for place, batch in enumerate(batches) if not self.is_routed or batch.domain == domain]
            with self.of(domain) as policy:
                own = [batches[place] for place in places]
                for place, source in zip(places, _states(policy, student, update, own, domain), strict=True):
                    found[place] = source
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class ServedTeachers:
    """``ByDomain`` for scores alone, from servers that hold the teachers' weights."""

    engines: Mapping[str | None, SglangEngine]

    @property
    def is_routed(self) -> bool:
        """Whether domains have models of their own."""
        return None not in self.engines

    def score(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """See ``ByDomain.score``; at temperature 1."""
        found: list[np.ndarray | None] = [None] * len(samples)
        for domain in sorted({sample.domain for sample in samples}):
            places = [place for place, sample in enumerate(samples) if sample.domain == domain]
            engine = self.engines.get(domain if self.is_routed else None)
            if engine is None:
                raise UserError(f"there is no teacher for the domain '{domain}'")
            for place, score in zip(places, engine.score([samples[place] for place in places]), strict=True):
                found[place] = score
        return found


def _states(
    policy: Policy, student: Policy, update: UpdateBatch, batches: Sequence[MicroBatch], domain: str | None
) -> list[HiddenStates | None]:
    if policy.layout is student.layout:
        return policy.teacher_states(batches)
    chosen = [i for i, sample in enumerate(update.samples) if domain is None or sample.domain == domain]
    states = _travelling_states(policy, [update.samples[i] for i in chosen])
    held = (policy.output_weight.detach(), policy.shard) if policy.layout.is_last_stage else (None, None)
    weight = redistribute_output_layer(*held, student.shard, dist.group.WORLD)
    if not student.layout.is_last_stage:
        return [None] * len(batches)
    place_of = {index: place for place, index in enumerate(chosen)}
    return [
        HiddenStates(
            _at_positions(batch, [states[place_of[i]] for i in batch.indices], policy), weight, batch.temperature
        )
        for batch in batches
    ]


def _travelling_states(policy: Policy, samples: Sequence[Sample]) -> dict[int, torch.Tensor]:
    """Hidden states [length, d] of every sample (entry t predicts token t), on the CPU of every rank."""
    batches = policy.pack(samples, {})
    found = {}
    for batch, hidden in zip(batches, policy.hidden_states(batches), strict=True):
        if policy.layout.is_last_stage:
            whole = policy.all_positions(batch, policy.whole_sequences(hidden))
            if policy.is_leader:
                found |= {i: value.cpu() for i, value in zip(batch.indices, batch.per_sample(whole), strict=True)}
    return gather_dicts(found)


def _at_positions(batch: MicroBatch, states: Sequence[torch.Tensor], policy: Policy) -> torch.Tensor:
    """[N, d] of this rank from [length, d] a sequence; the inverse of ``MicroBatch.per_sample``."""
    whole = torch.zeros(batch.num_positions, policy.spec.hidden_size, dtype=policy.output_weight_dtype)
    for place, state in zip(batch.positions(), states, strict=True):
        whole[place][:-1] = state[1:]
    return batch.part(whole).to(device.device())


@dataclasses.dataclass(frozen=True, eq=False)
class FullTeacher:
    """Whole distributions for the loss; with a reward scale the geometric mix with the reference (methods.md M4)."""

    student: Policy
    teachers: ByDomain
    references: ByDomain | None = None
    reward_scale: float = 1.0

    def distributions(self, update: UpdateBatch, batches: Sequence[MicroBatch]) -> list[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        states = self.teachers.distributions(self.student, update, batches)
        if self.reward_scale == 1.0:
            return states
        others = self.references.distributions(self.student, update, batches)
        return [
            None if state is None else GeometricTarget(state, other, self.reward_scale)
            for state, other in zip(states, others, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """Nothing is measured."""
        return {}


@dataclasses.dataclass(eq=False)
class TopKTeacher:
    """Distributions on the k likeliest tokens of student, teacher, or both (``union``: 2 k tokens, teacher's more).

    The student's own support costs one more forward pass of the student.
    """

    student: Policy
    teachers: ByDomain
    k: int
    support: str
    tail: str
    _shared: float = 0.0  # tokens that both models have among their k likeliest, over the last call's responses
    _counted: int = 0  # response tokens times k

    def metrics(self) -> dict[str, float]:
        """``topk_overlap``: share of the student's k likeliest tokens that are among the teacher's."""
        if self.support == "teacher":
            return {}
        sums = torch.tensor([self._shared, self._counted], dtype=torch.float64, device=device.device())
        dist.all_reduce(sums)
        return {"topk_overlap": float(sums[0] / sums[1])}

    def distributions(self, update: UpdateBatch, batches: Sequence[MicroBatch]) -> list[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        states = self.teachers.distributions(self.student, update, batches)
        own: Sequence[torch.Tensor | None] = [None] * len(batches)
        self._shared, self._counted = 0.0, 0
        if self.support != "teacher":
            own = self.student.hidden_states(batches)
        if not self.student.layout.is_last_stage:
            return [None] * len(batches)
        return [self._top_k(*parts) for parts in zip(batches, states, own, strict=True)]

    @torch.no_grad()
    def _top_k(self, batch: MicroBatch, state: HiddenStates, own: torch.Tensor | None) -> TopK:
        student, shard = self.student, self.student.shard
        hidden = student.whole_sequences(state.hidden) if state.sequence_parallel else state.hidden
        own = None if own is None else student.whole_sequences(own)
        parts = []
        for start in range(0, hidden.shape[0], _ROWS_PER_CHUNK):
            rows = slice(start, start + _ROWS_PER_CHUNK)
            temperature = batch.temperature[rows] if isinstance(batch.temperature, torch.Tensor) else batch.temperature
            logits = hidden[rows].float() @ state.weight_shard.float().t()
            chosen = None
            if own is not None:
                mine = own[rows].float() @ student.output_weight.detach().float().t()
                chosen = vocab_parallel_topk(mine, self.k, shard, temperature)[0]
                best = vocab_parallel_topk(logits, self.k, shard, temperature)[0]
                counted = batch.response_mask[rows]
                if student.sees_tokens:
                    self._shared += float((chosen.unsqueeze(2) == best.unsqueeze(1)).any(2)[counted].sum())
                    self._counted += int(counted.sum()) * self.k
            parts.append(self._support(logits, chosen, temperature))
        ids, log_probs, tail = (torch.cat(values) for values in zip(*parts, strict=True))
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
