"""Responses of the live policy: which prompts a step takes, generation over data ranks, grading.

Shared by GRPO, OPD, the teacher cache and evaluation. Left out: advantages and terms (the stages).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.parallel.collectives import gather_dicts
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import (
    Request,
    RolloutEngine,
    SamplingParams,
    sample_seed,
)
from megatron_s2d.verify import RewardManager, Verdict

_EXAMPLES_PER_STEP = 2
_TOKENS_PER_EXAMPLE = 512


class PromptDataLoader:
    """Prompts in an order that is shuffled anew every epoch; what a step takes depends on its number only."""

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int):
        self.prompts, self.per_step, self._seed = list(prompts), per_step, seed

    def batch_for_step(self, step: int) -> list[Prompt]:
        """The prompts of ``step`` (counted from 1)."""
        return self.slice((step - 1) * self.per_step, step * self.per_step)

    def slice(self, start: int, stop: int) -> list[Prompt]:
        """The prompts at places ``start`` to ``stop`` of the order."""
        size, places = len(self.prompts), range(start, stop)
        orders = {epoch: self._order(epoch) for epoch in {place // size for place in places}}
        return [self.prompts[orders[place // size][place % size]] for place in places]

    def resample(self, step: int, round_: int, excluded: set[str], count: int) -> list[Prompt]:
        """Up to ``count`` further prompts for ``step``, none of ``excluded``; a function of the arguments."""
        order = np.random.default_rng([self._seed, 1, step, round_]).permutation(len(self.prompts))
        chosen = (self.prompts[place] for place in order)
        return [prompt for prompt in chosen if prompt.id not in excluded][:count]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(len(self.prompts))


@dataclasses.dataclass(frozen=True)
class GroupKey:
    """Where a group comes from: its id and its seeds are functions of this."""

    prompt_id: str
    step: int  # that the group was submitted for
    repeat: int  # number of earlier groups of the same prompt in that step

    @property
    def group_id(self) -> str:
        """Id of the group, unique in a run."""
        return f"{self.prompt_id}@{self.step}.{self.repeat}"


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The requests for one prompt."""

    key: GroupKey
    requests: Sequence[Request]


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutWorker:
    """Generates (and grades) responses with an engine, data-parallel: the result is the same on every rank."""

    layout: Layout
    engine: RolloutEngine
    params: SamplingParams
    seed: int
    tokenizer: Any
    graders: RewardManager | None = None  # None: responses are not graded

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        step: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Sample]:
        """Return ``num_generations`` samples of each prompt, prompt by prompt."""
        mine = self.dp_shard(self.groups(prompts, num_generations, step))
        return self.grade_and_gather(mine, self.engine.generate(flatten(mine), progress))

    def groups(self, prompts: Sequence[Prompt], num_generations: int, step: int) -> list[Group]:
        """Return the group of each prompt; a prompt that comes twice has different seeds and ids."""
        repeats: dict[str, int] = {}
        groups = []
        for prompt in prompts:
            repeat = repeats[prompt.id] = repeats.get(prompt.id, -1) + 1
            groups.append(self.group(prompt, num_generations, GroupKey(prompt.id, step, repeat)))
        return groups

    def group(self, prompt: Prompt, num_generations: int, key: GroupKey) -> Group:
        """Return the requests for ``prompt`` as the group of ``key``."""
        requests = []
        for index in range(key.repeat * num_generations, (key.repeat + 1) * num_generations):
            seed = sample_seed(self.seed, key.step, prompt.id, index)
            requests.append(Request(f"{prompt.id}#{index}@{key.step}", prompt, key.group_id, seed, self.params))
        return Group(key, requests)

    def dp_shard[Item](self, items: Sequence[Item]) -> Sequence[Item]:
        """The consecutive part of ``items`` that this data rank works on."""
        layout = self.layout
        count, rank, size = len(items), layout.dp_rank, layout.dp_size
        return items[count * rank // size : count * (rank + 1) // size]

    def grade_and_gather(self, groups: Sequence[Group], samples: Sequence[Sample]) -> list[Sample]:
        """The samples of this data rank with reward and verdict, joined with those of the others in their order."""
        found = {}
        if self.layout.is_dp_leader:
            prompts = {request.id: request.prompt for request in flatten(groups)}
            graded = samples if self.graders is None else self._grade([prompts[s.id] for s in samples], samples)
            found = {self.layout.dp_rank: graded}
        merged = gather_dicts(found)
        return [sample for rank in sorted(merged) for sample in merged[rank]]

    def _grade(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[Sample]:
        """Samples with reward and verdict; a response that did not end is wrong, whatever it holds."""
        ended = [place for place, sample in enumerate(samples) if sample.finish_reason == "stop"]
        texts = [response_text(self.tokenizer, samples[place]) for place in ended]
        verdicts = self.graders.grade([prompts[place] for place in ended], texts)
        found = dict(zip(ended, verdicts, strict=True))
        truncated = Verdict(0.0, "truncated")
        return [
            dataclasses.replace(sample, reward=verdict.reward, verifier_label=verdict.label)
            for sample, verdict in ((sample, found.get(place, truncated)) for place, sample in enumerate(samples))
        ]


@dataclasses.dataclass(eq=False)
class RolloutBuffer:
    """The graded responses that each step trains on, to ``train_batch_size`` prompts.

    The engine is told of the next step's requests as soon as it is done with this one's. With ``over_sampling_ratio`` above 1
    more prompts are under way, always as many: a step takes the first that are complete, and the others go on in the
    next one. Each data rank has its own.
    """

    stream: PromptDataLoader
    sampler: RolloutWorker
    train_batch_size: int  # the first ones of each step of the stream
    num_generations: int
    steps: int
    over_sampling_ratio: float = 1.0
    prefetches: bool = True  # False: ``announce`` is called by the source, which asks for more before that
    _groups: list[Group] = dataclasses.field(default_factory=list)  # of this data rank, for step ``_prepared``
    _in_flight: list[Group] = dataclasses.field(default_factory=list)  # under way after the last step taken
    _prepared: int = 0

    def next_batch(self, step: int) -> tuple[list[Prompt], list[Sample]]:
        """(prompts, their samples, prompt by prompt) of ``step``."""
        self._prepare(step)
        groups, engine = self._groups, self.sampler.engine
        if self._num_extra:
            samples = engine.generate(flatten(groups), num_groups=self._num_own)
            taken = {sample.id for sample in samples}
            self._in_flight = [group for group in groups if group.requests[0].id not in taken]
        else:
            samples = engine.generate(flatten(groups))
        if self.prefetches:
            self.prefetch(step + 1)
        samples = self.sampler.grade_and_gather(groups, samples)
        return [self._by_id[sample.prompt_id] for sample in samples[:: self.num_generations]], samples

    def prefetch(self, step: int) -> None:
        """Tell the engine what ``step`` will ask for, unless it is beyond the last."""
        if step <= self.steps:
            self._prepare(step)
            self.sampler.engine.submit(flatten(self._groups), self._num_own if self._num_extra else None)

    def state(self) -> dict[str, Any]:
        """What ``resume`` needs to go on after the last step taken. Collective."""
        if not self._num_extra:
            return {}
        layout = self.sampler.layout
        own = [dataclasses.astuple(group.key) for group in self._in_flight]
        merged = gather_dicts({layout.dp_rank: own} if layout.is_dp_leader else {})
        return {"carried": [key for rank in sorted(merged) for key in merged[rank]]}

    def resume(self, position: Mapping[str, Any]) -> None:
        """Begin anew with what was under way at a checkpoint: its tokens so far are not kept, the prompts are."""
        keys = [GroupKey(*values) for values in position.get("carried", [])]
        self._in_flight = [
            self.sampler.group(self._by_id[key.prompt_id], self.num_generations, key)
            for key in self.sampler.dp_shard(keys)
        ]

    @functools.cached_property
    def _by_id(self) -> dict[str, Prompt]:
        return {prompt.id: prompt for prompt in self.stream.prompts}

    @property
    def _num_extra(self) -> int:
        """Prompts under way beyond those of a step, over all data ranks."""
        return math.ceil(round(self.train_batch_size * (self.over_sampling_ratio - 1), 6))

    @property
    def _num_own(self) -> int:
        """Prompts of a step on this data rank."""
        return len(self.sampler.dp_shard(range(self.train_batch_size)))

    def _prepare(self, step: int) -> None:
        """Set ``_groups`` to what is left of the last step and the new prompts of ``step``."""
        if self._prepared == step:
            return
        first = (step - 1) * self.stream.per_step + (self._num_extra if step > 1 else 0)
        count = self.train_batch_size + (self._num_extra if step == 1 else 0)
        prompts = self.stream.slice(first, first + count)
        groups = self.sampler.groups(prompts, self.num_generations, step)
        own, extra = groups[: self.train_batch_size], groups[self.train_batch_size :]
        self._groups = [*self._in_flight, *self.sampler.dp_shard(own), *self.sampler.dp_shard(extra)]
        self._prepared = step


def flatten(groups: Sequence[Group]) -> list[Request]:
    """The requests of ``groups``, group by group."""
    return [request for group in groups for request in group.requests]


def response_text(tokenizer: Any, sample: Sample) -> str:
    """The response as text; special tokens are left out."""
    return tokenizer.decode(sample.token_ids[sample.response_mask].tolist(), skip_special_tokens=True)


def response_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Length and truncation of the responses, and reward with its verdicts where they were graded."""
    lengths = np.array([sample.response_length for sample in samples])
    found = {
        "response_length": float(lengths.mean()),
        "response_length_max": float(lengths.max()),
        "truncated_fraction": float(np.mean([sample.finish_reason == "length" for sample in samples])),
    }
    if all(sample.reward is not None for sample in samples):
        found["reward"] = float(np.mean([sample.reward for sample in samples]))
        words = [sample.verifier_label for sample in samples]
        found |= {f"verifier/{word}": words.count(word) / len(words) for word in sorted(set(words))}
    return found


def examples(step: int, samples: Sequence[Sample], prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    """JSON lines of the first few responses of a step, for people."""
    by_id = {prompt.id: prompt for prompt in prompts}
    lines = []
    for sample in samples[:: max(1, len(samples) // _EXAMPLES_PER_STEP)][:_EXAMPLES_PER_STEP]:
        prompt = by_id[sample.prompt_id]
        row = {
            "step": step,
            "problem_id": sample.prompt_id,
            "prompt": prompt.text,
            "response": response_text(tokenizer, sample),
            "answer": _shortened(prompt.answer) if sample.reward is not None else None,
            "reward": sample.reward,
            "verifier_label": sample.verifier_label or "",
            "finish_reason": sample.finish_reason,
            "tokens": _tokens(sample, tokenizer),
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    return lines


def _shortened(answer: str | None) -> str | None:
    """A label for people: the unit tests of a program can be long."""
    return answer if answer is None or len(answer) <= 500 else f"{answer[:500]} ... ({len(answer)} characters)"


def _tokens(sample: Sample, tokenizer: Any) -> list[dict[str, Any]]:
    """The first response tokens with what is known of each: text, advantage, and log pi_T - log pi_S."""
    places = np.flatnonzero(sample.response_mask)[:_TOKENS_PER_EXAMPLE]
    found = []
    for place in places:
        row: dict[str, Any] = {"text": tokenizer.decode([int(sample.token_ids[place])])}
        if sample.advantages is not None:
            row["advantage"] = round(float(sample.advantages[place]), 4)
        if sample.teacher_log_probs is not None and sample.old_log_probs is not None:
            row["log_ratio"] = round(float(sample.teacher_log_probs[place] - sample.old_log_probs[place]), 4)
        found.append(row)
    return found
