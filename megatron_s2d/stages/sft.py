"""Supervised fine-tuning on reference solutions, corpus documents or cached responses (methods.md M2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.sft import SftConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.prompts import corpus_documents, is_corpus
from megatron_s2d.data.stored_samples import JoinedSamples, ListedSamples, OfflineSamples
from megatron_s2d.errors import UserError
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, Prompt, RemoteSample, Sample
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.validation import StageValidation, restore_best
from megatron_s2d.train.loop import StepData, train
from megatron_s2d.verify import RewardManager


def run_sft(context: StageContext) -> None:
    """Train on reference solutions or on cached responses."""
    stage: SftConfig = context.stage
    model = context.models.start()
    model.prepare_training(stage.optimizer, stage.steps, offload=stage.offload_optimizer)
    samples, longest = _samples(context, stage)
    source = OfflineSource(
        samples,
        stage.global_batch_size,
        stage.loss_agg_mode,
        stage.norm_length or longest,
        "supervised_weight",
        model.layout,
    )
    with RewardManager() as reward_manager:
        validation = StageValidation.of(context, model, reward_manager)
        train(model, source, sft_objective(), context.directory, context.loop_settings(), validation=validation)
    restore_best(context, model)
    context.save_model(model)


@dataclasses.dataclass(frozen=True, eq=False)
class OfflineSource:
    """A source of samples that exist already."""

    samples: OfflineSamples
    batch_size: int
    loss_agg_mode: str
    norm_length: int  # divisor of seq_mean_token_sum_norm, the same at every step
    weight_column: str  # of the objective's term
    layout: Layout

    def step(self, step: int) -> StepData:
        """Return one batch as one mini-batch."""
        samples = self.samples.read((step - 1) * self.batch_size, self.batch_size, self.layout)
        lengths = [sample.response_length for sample in samples]
        weights = token_weights(lengths, self.loss_agg_mode, ResponseCounts.of(lengths), self.norm_length)
        metrics = {"response_length": float(np.mean(lengths))}
        return StepData([MiniBatch(samples, {self.weight_column: weights})], metrics)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Do nothing: a batch is a function of its step."""


def shuffled(size: int, seed: int) -> Callable[[int, int], list[int]]:
    """Return an order of ``size`` samples, other in every epoch, for ``OfflineSamples``."""

    @functools.lru_cache(maxsize=2)  # a batch may cross from one epoch to the next
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(size)

    def indices(start: int, count: int) -> list[int]:
        positions = [divmod(position, size) for position in range(start, start + count)]
        return [int(order(epoch)[index]) for epoch, index in positions]

    return indices


def _samples(context: StageContext, stage: SftConfig) -> tuple[OfflineSamples, int]:
    """Return the stage's cached responses, corpus documents or reference solutions, and the length of the longest
    response; 1 for a corpus, which has no end (preflight requires ``norm_length`` where it counts), and for solutions
    whose ``loss_agg_mode`` does not divide by it.
    """
    if stage.cache is not None:
        names = [stage.cache] if isinstance(stage.cache, str) else stage.cache
        caches = [context.inputs.teacher_cache(name) for name in names]
        sizes = list(map(len, caches))
        joined = JoinedSamples([cache.stored(temperature=1.0) for cache in caches], sizes)
        longest = max(cache.longest_response for cache in caches)
        return OfflineSamples(joined, shuffled(sum(sizes), context.seed)), longest
    source = context.inputs.data_source(stage.data)
    if is_corpus(source):

        def document(index: int) -> Sample:
            return solution_sample(*corpus_documents(source, context.inputs.tokenizer, index, 1))

        return OfflineSamples(ListedSamples(document), lambda start, count: range(start, start + count)), 1
    prompts = context.inputs.stage_prompts(context.name)
    order = shuffled(len(prompts), context.seed)
    divides = stage.loss_agg_mode == "seq_mean_token_sum_norm" and stage.norm_length is None
    return OfflineSamples(SolutionSamples(prompts), order), int(prompts.solution_lengths.max()) if divides else 1


@dataclasses.dataclass(frozen=True, eq=False)
class SolutionSamples:
    """Prompts with their reference solutions; see ``StoredSamples``."""

    prompts: PromptTable

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """Return tokens of prompt and solution, int64 [n]; ``UserError`` for a prompt without a solution."""
        prompts, solutions = self.prompts.lengths_at(indices)
        for position in np.flatnonzero(solutions < 1):
            raise _no_solution(self.prompts[indices[position]].id)
        return prompts + solutions

    def read(self, indices: Sequence[int], ranks: Sequence[int], dp_rank: int) -> list[AnySample]:
        """Return the samples of ``dp_rank``; of the others, no stored tokens are read."""
        is_remote = np.asarray(ranks) != dp_rank
        others = np.asarray(indices, dtype=np.int64)[is_remote]
        table = self.prompts.select(others)
        lengths = self.lengths(indices)[is_remote]
        solutions = self.prompts.lengths_at(indices)[1][is_remote]
        remote = zip(table.values("id"), table.values("domain"), lengths, solutions, strict=True)
        return [
            solution_sample(self.prompts[index]) if rank == dp_rank else _remote(*next(remote), rank)
            for index, rank in zip(indices, ranks, strict=True)
        ]


def _remote(prompt_id: str, domain: str, length: int, response_length: int, dp_rank: int) -> RemoteSample:
    """Return what other ranks know of a ``solution_sample``."""
    return RemoteSample(
        id=prompt_id,
        prompt_id=prompt_id,
        group_id=prompt_id,
        domain=domain,
        length=int(length),
        response_length=int(response_length),
        temperature=1.0,
        finish_reason="data",
        dp_rank=dp_rank,
    )


def _no_solution(prompt_id: str) -> UserError:
    return UserError(f"prompt {prompt_id} has no reference solution: name the `solution` column of its data")


def solution_sample(prompt: Prompt) -> Sample:
    """Return the prompt with its reference solution as the response."""
    if prompt.solution_token_ids is None or not len(prompt.solution_token_ids):
        raise _no_solution(prompt.id)
    token_ids = np.concatenate([prompt.token_ids, prompt.solution_token_ids])
    mask = np.arange(len(token_ids)) >= len(prompt.token_ids)
    return Sample(
        id=prompt.id,
        prompt_id=prompt.id,
        group_id=prompt.id,
        domain=prompt.domain,
        seed=0,
        token_ids=token_ids,
        response_mask=mask,
        temperature=1.0,
        finish_reason="data",
    )
