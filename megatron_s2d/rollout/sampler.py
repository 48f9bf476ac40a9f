"""Samples of the live policy: the prompts of each step, generation over data-parallel ranks, grading.

Shared by GRPO, OPD, the teacher cache and evaluation; ``buffer.py`` decides what a training step takes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.data.sample_bytes import decode_samples, encode_samples
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, Prompt, RemoteSample, Sample
from megatron_s2d.rollout.engine import (
    Request,
    RolloutEngine,
    SamplingParams,
    sample_seed,
)
from megatron_s2d.rollout.environments.manager import EnvironmentManager
from megatron_s2d.rollout.response_table import Group, GroupKey, ListedPrompts, PromptNumbers, flatten, gather_responses
from megatron_s2d.rollout.sampling_client import Episode, SamplingClient, single_turn, together
from megatron_s2d.verify import RewardManager, Verdict

_EXAMPLES_PER_STEP = 2
_TOKENS_PER_EXAMPLE = 512


class PromptDataLoader:
    """Prompts in an order that is reshuffled every epoch; the prompts of a step depend on its number only.

    ``first`` prompts of the order are left out: those of an earlier stage (``prompt_order: continue``).
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int, first: int = 0):
        self.prompts, self.per_step, self._seed, self._first = prompts, per_step, seed, first
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)  # a step may cross from one epoch to the next

    def batch_for_step(self, step: int) -> list[Prompt]:
        """Return the prompts of ``step`` (counted from 1)."""
        return self.slice((step - 1) * self.per_step, step * self.per_step)

    def slice(self, start: int, stop: int) -> list[Prompt]:
        """Return the prompts ``start`` to ``stop`` of the order, counted over all epochs and from ``first``."""
        positions = [divmod(self._first + position, len(self.prompts)) for position in range(start, stop)]
        orders = {epoch: self._order(epoch) for epoch, _ in positions}
        return [self.prompts[int(orders[epoch][index])] for epoch, index in positions]

    def resample(self, step: int, round_: int, excluded: set[str], count: int) -> list[Prompt]:
        """Return up to ``count`` further prompts for ``step``, none of ``excluded``; a function of the arguments."""
        order = np.random.default_rng([self._seed, 1, self._first + step, round_]).permutation(len(self.prompts))
        shuffled = (self.prompts[int(index)] for index in order)
        return list(itertools.islice((prompt for prompt in shuffled if prompt.id not in excluded), count))

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(len(self.prompts))


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutWorker:
    """Generates (and grades) responses over data-parallel ranks: each holds its own, and knows of all others."""

    layout: Layout
    engine: RolloutEngine
    params: SamplingParams
    seed: int
    tokenizer: Any
    reward_manager: RewardManager | None = None  # None: responses are not graded
    environments: EnvironmentManager | None = None  # None: prompts have none
    on_group: Callable[[list[Sample]], None] | None = None  # hears of complete groups, from any thread, on producers

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        step: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[AnySample]:
        """Return ``num_generations`` samples of each prompt, prompt by prompt."""
        groups = self.dp_shard(self.groups(prompts, num_generations, step))
        return self.grade_and_gather(groups, self.generate(flatten(groups), progress), ListedPrompts(prompts))

    def generate(self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None) -> list[Sample]:
        """Return the sample of each request, the same on every rank of the replica: a response, or an episode.

        Without an environment among their prompts, requests are one call of the engine, which knows its best batches.
        """
        if self.environments is None or all(request.prompt.environment is None for request in requests):
            return self.engine.generate(requests, progress)
        samples = self.engine.run([self.environments.episode(request) for request in requests])
        if self.layout.host_replica.size == 1:
            return samples
        is_producer = self.layout.is_replica_root
        data = self.layout.host_replica.broadcast(encode_samples(samples) if is_producer else None, 0)
        return samples if is_producer else decode_samples(data)[0]

    def group_episode(self, group: Group) -> Episode[list[Sample]]:
        """Return the responses, or episodes, of a group as one episode."""
        episode = together(
            [
                single_turn(request)
                if self.environments is None or request.prompt.environment is None
                else self.environments.episode(request)
                for request in group.requests
            ]
        )
        on_group = self.on_group
        if on_group is None:
            return episode

        async def announced(client: SamplingClient) -> list[Sample]:
            samples = await episode(client)
            on_group(samples)
            return samples

        return announced

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
            id_ = key.sample_id(index - key.repeat * num_generations, num_generations)
            requests.append(Request(id_, prompt, key.group_id, seed, self.params))
        return Group(key, requests)

    def dp_shard[Item](self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the part of ``items`` that this data-parallel rank works on: in turn, so that mini-batches of
        consecutive groups have some on every rank.
        """
        return items[self.layout.dp_rank :: self.layout.dp_size]

    def grade_and_gather(
        self, groups: Sequence[Group], samples: Sequence[Sample], prompts: PromptNumbers
    ) -> list[AnySample]:
        """Return the samples of all data-parallel ranks with reward and verdict, group by group.

        samples: of this rank's ``groups``. prompts: numbers of those of all ranks' groups.
        """
        if self.reward_manager is not None and self.layout.is_dp_leader:
            by_id = {request.id: request.prompt for request in flatten(groups)}
            samples = self._grade([by_id[sample.id] for sample in samples], samples)
        return gather_responses(groups, samples, prompts, self.layout)

    def _grade(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[Sample]:
        """Return samples with reward and verdict; a response that did not end is wrong, whatever it contains.

        Of an episode the last turn is graded, unless its environment has, and rewards of turns are added.
        """
        graded = [sample.verifier_label is not None for sample in samples]
        ended = [index for index, sample in enumerate(samples) if sample.finish_reason == "stop" and not graded[index]]
        texts = [last_turn_text(self.tokenizer, samples[index]) for index in ended]
        verdicts = dict.fromkeys(range(len(samples)), Verdict(0.0, "truncated"))
        verdicts |= {
            index: Verdict(sample.reward, sample.verifier_label, sample.verifier_detail)
            for index, sample in enumerate(samples)
            if graded[index]
        }
        verdicts |= zip(ended, self.reward_manager.grade([prompts[index] for index in ended], texts), strict=True)
        return [
            dataclasses.replace(
                sample,
                reward=verdicts[index].reward + math.fsum(sample.turn_rewards or ()),
                verifier_label=verdicts[index].label,
                verifier_detail=verdicts[index].detail,
            )
            for index, sample in enumerate(samples)
        ]


def response_text(tokenizer: Any, sample: Sample) -> str:
    """Return the response as text, without special tokens."""
    return tokenizer.decode(sample.token_ids[sample.response_mask].tolist(), skip_special_tokens=True)


def last_turn_text(tokenizer: Any, sample: Sample) -> str:
    """Return the model's last turn as text, without special tokens: the response where there is one turn."""
    starts = sample.turn_starts
    ids = sample.token_ids[starts[-1] :][sample.response_mask[starts[-1] :]] if len(starts) else []
    return tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)


def response_metrics(samples: Sequence[AnySample]) -> dict[str, float]:
    """Return length and truncation of the responses, and rewards with verdicts if they were graded.

    Of several domains also those of each, as ``domain/NAME/...``.
    """
    metrics = _response_metrics(samples)
    domains = sorted({sample.domain for sample in samples})
    for domain in domains if len(domains) > 1 else ():
        of_domain = _response_metrics([sample for sample in samples if sample.domain == domain])
        names = ("response_length", "truncated_fraction", "reward")
        metrics |= {f"domain/{domain}/{name}": of_domain[name] for name in names if name in of_domain}
    return metrics


def _response_metrics(samples: Sequence[AnySample]) -> dict[str, float]:
    lengths = np.array([sample.response_length for sample in samples])
    metrics = {
        "response_length": float(lengths.mean()),
        "response_length_max": float(lengths.max()),
        "truncated_fraction": float(np.mean([sample.finish_reason == "length" for sample in samples])),
    }
    turns = [sample.num_turns for sample in samples]
    if max(turns) > 1:
        metrics |= {"num_turns": float(np.mean(turns)), "num_turns_max": float(max(turns))}
    if all(sample.reward is not None for sample in samples):
        metrics["reward"] = float(np.mean([sample.reward for sample in samples]))
        labels = [sample.verifier_label for sample in samples]
        metrics |= {f"verifier/{label}": labels.count(label) / len(labels) for label in sorted(set(labels))}
    return metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A few responses of a step, for people: the same samples on every rank."""

    step: int
    samples: Sequence[AnySample]
    prompts: Mapping[str, Prompt]  # by id
    tokenizer: Any
    layout: Layout

    @classmethod
    def of(
        cls, step: int, samples: Sequence[AnySample], prompts: Sequence[Prompt], tokenizer: Any, layout: Layout
    ) -> Examples:
        """Select some of ``samples``; prompts: of all of them."""
        selected = samples[:: max(1, len(samples) // _EXAMPLES_PER_STEP)][:_EXAMPLES_PER_STEP]
        return cls(step, selected, {prompt.id: prompt for prompt in prompts}, tokenizer, layout)

    def lines(self, teacher_log_probs: Mapping[str, np.ndarray] | None = None) -> list[str]:
        """Return JSON lines on rank 0; collective over data-parallel ranks.

        teacher_log_probs: [length] float32 by sample id, of own samples that do not have them themselves.
        """
        own = [self._line(sample, teacher_log_probs or {}) for sample in self.samples]
        if not self.layout.is_replica_root:
            return own
        lines = []
        for sample, line in zip(self.samples, own, strict=True):
            if isinstance(sample, RemoteSample) and self.layout.dp_rank == 0:
                line = zlib.decompress(self.layout.host_dp.receive(sample.dp_rank).tobytes()).decode()
            elif line and self.layout.dp_rank > 0:
                # Compressed: the text of a token's probabilities is ten times the size of the token.
                self.layout.host_dp.send(np.frombuffer(zlib.compress(line.encode()), dtype=np.uint8).copy(), 0)
            lines.append(line)
        return lines

    def _line(self, sample: AnySample, teacher_log_probs: Mapping[str, np.ndarray]) -> str:
        if not isinstance(sample, Sample):
            return ""
        if sample.id in teacher_log_probs:
            sample = dataclasses.replace(sample, teacher_log_probs=teacher_log_probs[sample.id])
        return _example(self.step, sample, self.prompts[sample.prompt_id], self.tokenizer)


def examples(
    step: int, samples: Sequence[AnySample], prompts: Sequence[Prompt], tokenizer: Any, layout: Layout
) -> list[str]:
    """Return JSON lines of a few responses of a step on rank 0; collective over data-parallel ranks."""
    return Examples.of(step, samples, prompts, tokenizer, layout).lines()


def _example(step: int, sample: Sample, prompt: Prompt, tokenizer: Any) -> str:
    row = {
        "step": step,
        "problem_id": sample.prompt_id,
        "prompt": prompt.text,
        "response": response_text(tokenizer, sample),
        **({"episode": episode_text(tokenizer, sample)} if sample.num_turns > 1 else {}),
        "answer": _shortened(prompt.answer) if sample.reward is not None else None,
        "reward": sample.reward,
        "verifier_label": sample.verifier_label or "",
        **({} if sample.verifier_detail is None else {"verifier_detail": sample.verifier_detail}),
        "finish_reason": sample.finish_reason,
        "tokens": _tokens(sample, tokenizer),
    }
    return json.dumps(row, ensure_ascii=False)


def episode_text(tokenizer: Any, sample: Sample) -> list[dict[str, str]]:
    """Return turns and observations of an episode in order, each as its role and its text with special tokens."""
    parts, start = [], sample.prompt_length
    changes = np.flatnonzero(np.diff(sample.response_mask[start:])) + 1 + start
    for first, stop in itertools.pairwise([start, *changes.tolist(), sample.length]):
        role = "model" if sample.response_mask[first] else "environment"
        parts.append({"role": role, "text": tokenizer.decode(sample.token_ids[first:stop].tolist())})
    return parts


def _shortened(answer: str | None) -> str | None:
    """Return a label for people: the unit tests of a program can be long."""
    return answer if answer is None or len(answer) <= 500 else f"{answer[:500]} ... ({len(answer)} characters)"


def _tokens(sample: Sample, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the first response tokens with their text, advantage, and log-probabilities if there are any."""
    rows = []
    student = sample.old_log_probs if sample.old_log_probs is not None else sample.rollout_log_probs
    log_probs = {"student_log_prob": student, "teacher_log_prob": sample.teacher_log_probs}
    for index in np.flatnonzero(sample.response_mask)[:_TOKENS_PER_EXAMPLE]:
        row: dict[str, Any] = {"text": tokenizer.decode([int(sample.token_ids[index])])}
        if sample.advantages is not None:
            row["advantage"] = round(float(sample.advantages[index]), 4)
        row |= {
            name: round(float(values[index]), 4)
            for name, values in log_probs.items()
            if values is not None and np.isfinite(values[index])
        }
        if sample.teacher_log_probs is not None and sample.old_log_probs is not None:
            row["log_ratio"] = round(float(sample.teacher_log_probs[index] - sample.old_log_probs[index]), 4)
        rows.append(row)
    return rows
