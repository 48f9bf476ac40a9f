"""Supervised fine-tuning on reference solutions, corpus documents or cached responses (methods.md M2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.sft import SftConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.data.prompts import corpus_documents, is_corpus
from megatron_s2d.errors import UserError
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.stages.context import StageContext
from megatron_s2d.train.loop import StepData, train


def run_sft(context: StageContext) -> None:
    """Train on reference solutions or on cached responses."""
    stage: SftConfig = context.stage
    model = context.models.start()
    model.prepare_training(stage.optimizer, stage.steps, offload=stage.offload_optimizer)
    read, longest = _reader(context, stage)
    source = OfflineSource(
        read, stage.global_batch_size, stage.loss_agg_mode, stage.norm_length or longest, "supervised_weight"
    )
    train(model, source, sft_objective(), context.directory, context.loop_settings())
    context.save_model(model)


@dataclasses.dataclass(frozen=True, eq=False)
class OfflineSource:
    """A source of samples that exist already. ``read(start, count)`` returns samples ``start`` to ``start + count``."""

    read: Callable[[int, int], Sequence[Sample]]
    batch_size: int
    loss_agg_mode: str
    norm_length: int  # divisor of seq_mean_token_sum_norm, the same at every step
    weight_column: str  # of the objective's term

    def step(self, step: int) -> StepData:
        """Return one batch as one mini-batch."""
        samples = self.read((step - 1) * self.batch_size, self.batch_size)
        lengths = [sample.response_length for sample in samples]
        weights = token_weights(lengths, self.loss_agg_mode, ResponseCounts.of(lengths), self.norm_length)
        metrics = {"response_length": float(np.mean(lengths))}
        return StepData([MiniBatch(samples, {self.weight_column: weights})], metrics)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Do nothing: a batch is a function of its step."""


def shuffled(samples: Sequence[Sample], seed: int) -> Callable[[int, int], list[Sample]]:
    """Return a reader of ``samples`` that reshuffles them every epoch."""

    def read(start: int, count: int) -> list[Sample]:
        orders: dict[int, np.ndarray] = {}
        batch = []
        for position in range(start, start + count):
            epoch, index = divmod(position, len(samples))
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(samples))
            batch.append(samples[orders[epoch][index]])
        return batch

    return read


def longest_response(samples: Sequence[Sample]) -> int:
    """Return the number of response tokens of the longest response."""
    return max(sample.response_length for sample in samples)


def _reader(context: StageContext, stage: SftConfig) -> tuple[Callable[[int, int], Sequence[Sample]], int]:
    """Return the reader of the stage's cached responses, corpus documents or reference solutions, and the length of the
    longest response (1 for a corpus, which has no end: preflight requires ``norm_length`` where it counts).
    """
    if stage.cache is not None:
        names = [stage.cache] if isinstance(stage.cache, str) else stage.cache
        samples = [sample for name in names for sample in context.inputs.teacher_cache(name).samples]
        samples = [dataclasses.replace(sample, temperature=1.0) for sample in samples]
        return shuffled(samples, context.seed), longest_response(samples)
    source = context.inputs.data_source(stage.data)
    if is_corpus(source):

        def read(start: int, count: int) -> list[Sample]:
            documents = corpus_documents(source, context.inputs.tokenizer, start, count)
            return [solution_sample(document) for document in documents]

        return read, 1
    samples = [solution_sample(prompt) for prompt in context.inputs.prompts(stage.data)]
    return shuffled(samples, context.seed), longest_response(samples)


def solution_sample(prompt: Prompt) -> Sample:
    """Return the prompt with its reference solution as the response."""
    if prompt.solution_token_ids is None or not len(prompt.solution_token_ids):
        raise UserError(f"prompt {prompt.id} has no reference solution: name the `solution` column of its data")
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
