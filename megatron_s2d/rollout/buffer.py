"""Rollout buffer: the graded samples that each training step takes, and the groups in flight.

The engine gets the next step's requests as soon as it has answered this one's. With an ``over_sampling_ratio`` above 1
more groups are in flight than a step needs: a step takes the first that are complete, and the others continue in the
next one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from megatron_s2d.parallel.collectives import gather_dicts
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.sampler import Group, GroupKey, PromptDataLoader, RolloutWorker, flatten


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
    _groups: list[Group] = dataclasses.field(default_factory=list)  # of this data-parallel rank, for ``_prepared_step``
    _in_flight: list[Group] = dataclasses.field(default_factory=list)  # incomplete after the last step taken
    _prepared_step: int = 0

    def next_batch(self, step: int) -> tuple[list[Prompt], list[Sample]]:
        """Return (prompts, their samples, prompt by prompt) of ``step``."""
        self._prepare(step)
        groups, engine = self._groups, self.worker.engine
        if self._num_extra:
            samples = engine.generate(flatten(groups), num_groups=self._num_local)
            complete = {sample.group_id for sample in samples}
            self._in_flight = [group for group in groups if group.key.group_id not in complete]
        else:
            samples = engine.generate(flatten(groups))
        if self.prefetches:
            self.prefetch(step + 1)
        samples = self.worker.grade_and_gather(groups, samples)
        return [self._prompts_by_id[sample.prompt_id] for sample in samples[:: self.num_generations]], samples

    def prefetch(self, step: int) -> None:
        """Submit the requests of ``step`` to the engine, unless it is beyond the last."""
        if step <= self.steps:
            self._prepare(step)
            self.worker.engine.submit(flatten(self._groups), self._num_local if self._num_extra else None)

    def state(self) -> dict[str, Any]:
        """Return what ``resume`` needs to continue after the last step taken. Collective."""
        if not self._num_extra:
            return {}
        layout = self.worker.layout
        local_keys = [dataclasses.astuple(group.key) for group in self._in_flight]
        merged = gather_dicts({layout.dp_rank: local_keys} if layout.is_dp_leader else {})
        return {"carried": [key for rank in sorted(merged) for key in merged[rank]]}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Restart the groups that were in flight at a checkpoint; their tokens so far are lost."""
        keys = [GroupKey(*values) for values in state.get("carried", [])]
        self._in_flight = [
            self.worker.group(self._prompts_by_id[key.prompt_id], self.num_generations, key)
            for key in self.worker.dp_shard(keys)
        ]

    @functools.cached_property
    def _prompts_by_id(self) -> dict[str, Prompt]:
        return {prompt.id: prompt for prompt in self.loader.prompts}

    @property
    def _num_extra(self) -> int:
        """Groups in flight beyond those of a step, over all data-parallel ranks."""
        return math.ceil(round(self.train_batch_size * (self.over_sampling_ratio - 1), 6))

    @property
    def _num_local(self) -> int:
        """Groups of a step on this data-parallel rank."""
        return len(self.worker.dp_shard(range(self.train_batch_size)))

    def _prepare(self, step: int) -> None:
        """Set ``_groups`` to the groups in flight and the new ones of ``step``."""
        if self._prepared_step == step:
            return
        first = (step - 1) * self.loader.per_step + (self._num_extra if step > 1 else 0)
        count = self.train_batch_size + (self._num_extra if step == 1 else 0)
        groups = self.worker.groups(self.loader.slice(first, first + count), self.num_generations, step)
        batch, extra = groups[: self.train_batch_size], groups[self.train_batch_size :]
        self._groups = [*self._in_flight, *self.worker.dp_shard(batch), *self.worker.dp_shard(extra)]
        self._prepared_step = step
