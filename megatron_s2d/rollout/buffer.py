"""Rollout buffer: the graded samples that each training step takes, and the groups in flight.

The engine gets the requests of later steps as soon as it has answered this one's, for ``max_staleness`` steps ahead
(one step at least; an engine that does not run beside the trainer ignores requests that it gets early, unless the
staleness is above 0). Steps take their groups in order, so a response is at most ``max_staleness`` steps older than the
weights that are trained on it, and which prompts are in flight is a function of the step.

With an ``over_sampling_ratio`` above 1 more groups are in flight than a step needs: a step takes the first that are
complete, and the others continue in the next one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.records import AnySample, Prompt
from megatron_s2d.rollout.response_table import Group, GroupKey, flatten, gather_keys
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker

_RECENT_STEPS = 4


@dataclasses.dataclass(eq=False)
class RolloutBuffer:
    """The samples that each step trains on, for ``train_batch_size`` prompts; each data-parallel rank has its own."""

    loader: PromptDataLoader
    worker: RolloutWorker
    train_batch_size: int  # prompts of a step: the first ones of the loader's
    num_generations: int
    steps: int
    over_sampling_ratio: float = 1.0
    prefetches: bool = True  # False: the caller calls ``prefetch``, because it samples more before that
    max_staleness: int = 0  # steps that requests are submitted ahead; 0: as 1, for an engine that ignores them
    _groups: dict[int, list[Group]] = dataclasses.field(default_factory=dict)  # of this data-parallel rank, by step
    _in_flight: list[Group] = dataclasses.field(default_factory=list)  # incomplete after the last step taken
    _submitted: int = 0  # last step whose requests the engine has
    _wait_seconds: float = 0.0  # of the trainer in the last step
    _recent: dict[int, list[Prompt]] = dataclasses.field(default_factory=dict)  # new prompts of the latest steps

    def next_batch(self, step: int) -> tuple[list[Prompt], list[AnySample]]:
        """Return (prompts, their samples, prompt by prompt) of ``step``."""
        groups, engine = self._prepare(step), self.worker.engine
        del self._groups[step]
        start = time.perf_counter()
        if self._num_extra:
            samples = engine.generate(flatten(groups), num_groups=self._num_local)
            complete = {sample.group_id for sample in samples}
            self._in_flight = [group for group in groups if group.key.group_id not in complete]
        else:
            samples = self.worker.generate(flatten(groups))
        self._wait_seconds = time.perf_counter() - start
        self._submitted = max(self._submitted, step)
        if self.prefetches:
            self.prefetch(step + 1)
        gathered = self.worker.grade_and_gather(groups, samples, _StepPrompts(self))
        return self._prompts(sample.prompt_id for sample in gathered[:: self.num_generations]), gathered

    def prefetch(self, step: int) -> None:
        """Submit the requests of ``step`` and of ``max_staleness - 1`` later ones, none twice, none after the last."""
        last = min(self.steps, step + max(1, self.max_staleness) - 1)
        for ahead in range(max(step, self._submitted + 1), last + 1):
            requests = flatten(self._prepare(ahead))
            if all(request.prompt.environment is None for request in requests):  # episodes start with their step
                self.worker.engine.submit(requests, self._num_local if self._num_extra else None)
            self._submitted = ahead

    def metrics(self) -> dict[str, float]:
        """Return how long the trainer waited for the samples of the last step; nothing where it generates itself."""
        return {"rollout/wait_seconds": self._wait_seconds} if self.max_staleness else {}

    def state(self) -> dict[str, Any]:
        """Return what ``resume`` needs to continue after the last step taken. Collective."""
        if not self._num_extra:
            return {}
        keys = gather_keys([group.key for group in self._in_flight], _StepPrompts(self), self.worker.layout)
        return {"carried": [dataclasses.astuple(key) for key in keys]}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Restart the groups that were in flight at a checkpoint; their tokens so far are lost."""
        keys = self.worker.dp_shard([GroupKey(*values) for values in state.get("carried", [])])
        prompts = self._prompts(key.prompt_id for key in keys)
        self._in_flight = [
            self.worker.group(prompt, self.num_generations, key) for prompt, key in zip(prompts, keys, strict=True)
        ]

    def prompts_of_step(self, step: int) -> list[Prompt]:
        """Return the new prompts of ``step``, the same on every rank."""
        if step not in self._recent:
            first = (step - 1) * self.loader.per_step + (self._num_extra if step > 1 else 0)
            count = self.train_batch_size + (self._num_extra if step == 1 else 0)
            self._recent[step] = self.loader.slice(first, first + count)
            while len(self._recent) > _RECENT_STEPS + self.max_staleness:
                del self._recent[next(iter(self._recent))]
        return self._recent[step]

    def _prompts(self, ids: Iterable[str]) -> list[Prompt]:
        """Return the prompts with ``ids``; those that are not of the latest steps take a pass over the ids of all."""
        wanted, recent = list(ids), {prompt.id: prompt for prompts in self._recent.values() for prompt in prompts}
        unknown = [name for name in wanted if name not in recent]
        found = PromptTable.of(self.loader.prompts).find(unknown) if unknown else {}
        return [recent.get(name) or found[name] for name in wanted]

    @property
    def _num_extra(self) -> int:
        """Groups in flight beyond those of a step, over all data-parallel ranks."""
        return math.ceil(round(self.train_batch_size * (self.over_sampling_ratio - 1), 6))

    @property
    def _num_local(self) -> int:
        """Groups of a step on this data-parallel rank."""
        return len(self.worker.dp_shard(range(self.train_batch_size)))

    def _prepare(self, step: int) -> list[Group]:
        """Return the groups in flight and the new ones of ``step``."""
        if step in self._groups:
            return self._groups[step]
        groups = self.worker.groups(self.prompts_of_step(step), self.num_generations, step)
        batch, extra = groups[: self.train_batch_size], groups[self.train_batch_size :]
        self._groups[step] = [*self._in_flight, *self.worker.dp_shard(batch), *self.worker.dp_shard(extra)]
        return self._groups[step]


@dataclasses.dataclass(frozen=True, eq=False)
class _StepPrompts:
    """Numbers of prompts by the step that they were submitted for: all ranks read all prompts of a step."""

    buffer: RolloutBuffer

    def index(self, key: GroupKey) -> int:
        """See ``PromptNumbers``."""
        return next(
            index for index, prompt in enumerate(self.buffer.prompts_of_step(key.step)) if prompt.id == key.prompt_id
        )

    def prompt(self, step: int, index: int) -> Prompt:
        """See ``PromptNumbers``."""
        return self.buffer.prompts_of_step(step)[index]
