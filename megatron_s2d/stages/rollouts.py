"""Responses of the live policy: which prompts a step takes, generation over data ranks, grading.

Shared by GRPO, OPD, the teacher cache and evaluation. Left out: advantages and terms (the stages).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import (
    Request,
    RolloutEngine,
    SamplingParams,
    sample_seed,
)
from megatron_s2d.train.policy import Policy, gather_dicts
from megatron_s2d.verify import Graders, Verdict

_EXAMPLES_PER_STEP = 2
_TOKENS_PER_EXAMPLE = 512


class PromptStream:
    """Prompts in an order that is shuffled anew every epoch; what a step takes depends on its number only."""

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int):
        self.prompts, self._per_step, self._seed = list(prompts), per_step, seed

    def of_step(self, step: int) -> list[Prompt]:
        """The prompts of ``step`` (counted from 1)."""
        size = len(self.prompts)
        places = range((step - 1) * self._per_step, step * self._per_step)
        orders = {epoch: self._order(epoch) for epoch in {place // size for place in places}}
        return [self.prompts[orders[place // size][place % size]] for place in places]

    def refill(self, step: int, round_: int, excluded: set[str], count: int) -> list[Prompt]:
        """Up to ``count`` further prompts for ``step``, none of ``excluded``; a function of the arguments."""
        order = np.random.default_rng([self._seed, 1, step, round_]).permutation(len(self.prompts))
        chosen = (self.prompts[place] for place in order)
        return [prompt for prompt in chosen if prompt.id not in excluded][:count]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(len(self.prompts))


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Generates (and grades) responses with an engine, data-parallel: the result is the same on every rank."""

    policy: Policy
    engine: RolloutEngine
    params: SamplingParams
    seed: int
    tokenizer: Any
    graders: Graders | None = None  # None: responses are not graded

    def sample(
        self,
        prompts: Sequence[Prompt],
        responses_per_prompt: int,
        step: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Sample]:
        """``responses_per_prompt`` samples of each prompt, prompt by prompt; ``group`` is the prompt's place.

        A prompt that comes twice in a step makes two groups with different seeds.
        """
        seen: dict[str, int] = {}
        requests = []
        for group, prompt in enumerate(prompts):
            repeat = seen[prompt.id] = seen.get(prompt.id, -1) + 1
            for index in range(repeat * responses_per_prompt, (repeat + 1) * responses_per_prompt):
                seed = sample_seed(self.seed, step, prompt.id, index)
                requests.append(Request(f"{prompt.id}#{index}@{step}", prompt, group, seed, self.params))
        layout = self.policy.layout
        mine = _share(len(prompts), layout.data_rank, layout.data_size)
        first, last = mine.start * responses_per_prompt, mine.stop * responses_per_prompt
        samples = self.engine.generate(requests[first:last], progress)
        found: dict[int, Sample] = {}
        if self.policy.is_leader:
            if self.graders is not None:
                samples = self._grade(requests[first:last], samples)
            found = dict(enumerate(samples, start=first))
        merged = gather_dicts(found)
        return [merged[index] for index in range(len(requests))]

    def _grade(self, requests: Sequence[Request], samples: Sequence[Sample]) -> list[Sample]:
        """Samples with reward and verdict; a response that did not end is wrong, whatever it holds."""
        ended = [place for place, sample in enumerate(samples) if sample.finish_reason == "stop"]
        texts = [response_text(self.tokenizer, samples[place]) for place in ended]
        verdicts = self.graders.grade([requests[place].prompt for place in ended], texts)
        found = dict(zip(ended, verdicts, strict=True))
        truncated = Verdict(0.0, "truncated")
        return [
            dataclasses.replace(sample, reward=verdict.reward, verdict=verdict.word)
            for sample, verdict in ((sample, found.get(place, truncated)) for place, sample in enumerate(samples))
        ]


def _share(count: int, rank: int, size: int) -> range:
    """The consecutive part of ``range(count)`` that ``rank`` of ``size`` works on."""
    return range(count * rank // size, count * (rank + 1) // size)


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
        words = [sample.verdict for sample in samples]
        found |= {f"verdict/{word}": words.count(word) / len(words) for word in sorted(set(words))}
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
            "verdict": sample.verdict or "",
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
