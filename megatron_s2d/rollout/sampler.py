"""Samples of the live policy: the prompts of each step, generation over data-parallel ranks, grading.

Shared by GRPO, OPD, the teacher cache and evaluation; ``buffer.py`` decides what a training step takes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
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
    """Prompts in an order that is reshuffled every epoch; the prompts of a step depend on its number only."""

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int):
        self.prompts, self.per_step, self._seed = list(prompts), per_step, seed

    def batch_for_step(self, step: int) -> list[Prompt]:
        """Return the prompts of ``step`` (counted from 1)."""
        return self.slice((step - 1) * self.per_step, step * self.per_step)

    def slice(self, start: int, stop: int) -> list[Prompt]:
        """Return the prompts ``start`` to ``stop`` of the order, counted over all epochs."""
        positions = [divmod(position, len(self.prompts)) for position in range(start, stop)]
        orders = {epoch: self._order(epoch) for epoch, _ in positions}
        return [self.prompts[orders[epoch][index]] for epoch, index in positions]

    def resample(self, step: int, round_: int, excluded: set[str], count: int) -> list[Prompt]:
        """Return up to ``count`` further prompts for ``step``, none of ``excluded``; a function of the arguments."""
        order = np.random.default_rng([self._seed, 1, step, round_]).permutation(len(self.prompts))
        shuffled = (self.prompts[index] for index in order)
        return [prompt for prompt in shuffled if prompt.id not in excluded][:count]

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
    """Generates (and grades) responses over data-parallel ranks; the result is the same on every rank."""

    layout: Layout
    engine: RolloutEngine
    params: SamplingParams
    seed: int
    tokenizer: Any
    reward_manager: RewardManager | None = None  # None: responses are not graded

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        step: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Sample]:
        """Return ``num_generations`` samples of each prompt, prompt by prompt."""
        local_groups = self.dp_shard(self.groups(prompts, num_generations, step))
        return self.grade_and_gather(local_groups, self.engine.generate(flatten(local_groups), progress))

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
        """Return the consecutive part of ``items`` that this data-parallel rank works on."""
        count, rank, size = len(items), self.layout.dp_rank, self.layout.dp_size
        return items[count * rank // size : count * (rank + 1) // size]

    def grade_and_gather(self, groups: Sequence[Group], samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples of all data-parallel ranks with reward and verdict, in the order of ranks."""
        local: dict[int, Sequence[Sample]] = {}
        if self.layout.is_dp_leader:
            prompts = {request.id: request.prompt for request in flatten(groups)}
            graded = samples if self.reward_manager is None else self._grade([prompts[s.id] for s in samples], samples)
            local = {self.layout.dp_rank: graded}
        merged = gather_dicts(local)
        return [sample for rank in sorted(merged) for sample in merged[rank]]

    def _grade(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[Sample]:
        """Return samples with reward and verdict; a response that did not end is wrong, whatever it contains."""
        ended = [index for index, sample in enumerate(samples) if sample.finish_reason == "stop"]
        texts = [response_text(self.tokenizer, samples[index]) for index in ended]
        verdicts = dict.fromkeys(range(len(samples)), Verdict(0.0, "truncated"))
        verdicts |= zip(ended, self.reward_manager.grade([prompts[index] for index in ended], texts), strict=True)
        return [
            dataclasses.replace(sample, reward=verdicts[index].reward, verifier_label=verdicts[index].label)
            for index, sample in enumerate(samples)
        ]


def flatten(groups: Sequence[Group]) -> list[Request]:
    """Return the requests of ``groups``, group by group."""
    return [request for group in groups for request in group.requests]


def response_text(tokenizer: Any, sample: Sample) -> str:
    """Return the response as text, without special tokens."""
    return tokenizer.decode(sample.token_ids[sample.response_mask].tolist(), skip_special_tokens=True)


def response_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return length and truncation of the responses, and rewards with verdicts if they were graded."""
    lengths = np.array([sample.response_length for sample in samples])
    metrics = {
        "response_length": float(lengths.mean()),
        "response_length_max": float(lengths.max()),
        "truncated_fraction": float(np.mean([sample.finish_reason == "length" for sample in samples])),
    }
    if all(sample.reward is not None for sample in samples):
        metrics["reward"] = float(np.mean([sample.reward for sample in samples]))
        labels = [sample.verifier_label for sample in samples]
        metrics |= {f"verifier/{label}": labels.count(label) / len(labels) for label in sorted(set(labels))}
    return metrics


def examples(step: int, samples: Sequence[Sample], prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    """Return JSON lines of a few responses of a step, for people."""
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
    """Return a label for people: the unit tests of a program can be long."""
    return answer if answer is None or len(answer) <= 500 else f"{answer[:500]} ... ({len(answer)} characters)"


def _tokens(sample: Sample, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the first response tokens with their text, advantage, and log pi_T - log pi_S if there are any."""
    rows = []
    for index in np.flatnonzero(sample.response_mask)[:_TOKENS_PER_EXAMPLE]:
        row: dict[str, Any] = {"text": tokenizer.decode([int(sample.token_ids[index])])}
        if sample.advantages is not None:
            row["advantage"] = round(float(sample.advantages[index]), 4)
        if sample.teacher_log_probs is not None and sample.old_log_probs is not None:
            row["log_ratio"] = round(float(sample.teacher_log_probs[index] - sample.old_log_probs[index]), 4)
        rows.append(row)
    return rows
