"""GRPO: stage 1 on the teacher, stage 3 on the bridged student, and the direct baseline (methods.md M1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.objectives.advantages import (
    group_relative,
    overlong_penalty,
    zero_variance_groups,
)
from megatron_s2d.objectives.policy import grpo_objective
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.buffer import RolloutBuffer
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker, examples, response_metrics
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.policy_loss import policy_loss_weights, split_into_mini_batches, surrogate_of
from megatron_s2d.train.loop import StepData, train
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.verify import RewardManager


def run_grpo(context: StageContext) -> None:
    """Sample groups, verify, update."""
    stage: GrpoConfig = context.stage
    actor, model = context.models.start(), context.models.name_of(context.name)
    reference = _reference(context, stage)
    actor.prepare_training(stage.optimizer, stage.steps * stage.num_mini_batches, offload=stage.offload_optimizer)
    params = context.rollouts.sampling_params(stage.sampling, model)
    engine = context.rollouts.engine(actor, model, params)
    objective = grpo_objective(surrogate_of(stage), kl_loss_coef=stage.kl_loss_coef)
    with RewardManager() as reward_manager:
        worker = RolloutWorker(actor.layout, engine, params, context.seed, context.inputs.tokenizer, reward_manager)
        loader = PromptDataLoader(context.inputs.prompts(stage.prompts), stage.train_batch_size, context.seed)
        buffer = context.rollouts.buffer(loader, worker, prefetches=stage.filter_groups is None)
        source = GrpoSource(stage, buffer, reference)
        train(actor, source, objective, context.directory, context.loop_settings(), engine=engine)
    context.save_model(actor)


def _reference(context: StageContext, stage: GrpoConfig) -> MegatronModel | None:
    """Return the frozen reference of the KL penalty, by default the stage's start; None without a penalty."""
    if stage.kl_loss_coef == 0:
        return None
    if stage.reference is not None:
        return context.models.frozen(stage.reference)
    reference = context.models.start(trained=False)
    reference.freeze()
    return reference


@dataclasses.dataclass(frozen=True, eq=False)
class GrpoSource:
    """Groups of graded responses with their advantages."""

    stage: GrpoConfig
    buffer: RolloutBuffer
    reference: MegatronModel | None

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``."""
        self.buffer.resume(state)

    def step(self, step: int) -> StepData:
        """Sample, filter groups where configured, score with the reference, compute advantages."""
        stage = self.stage
        samples, prompts, generated = self._sample(step)
        metrics = response_metrics(generated)
        if self.reference is not None:
            scores = self.reference.score(samples)
            samples = [
                dataclasses.replace(sample, reference_log_probs=score)
                for sample, score in zip(samples, scores, strict=True)
            ]
        samples, zero_variance_fraction = with_advantages(samples, stage)
        metrics |= {
            "zero_variance_fraction": zero_variance_fraction,
            "rollout/num_generated": float(len(generated)),
        }
        mini_batches = [
            MiniBatch(part, {"policy_weight": policy_loss_weights(part, stage)})
            for part in split_into_mini_batches(samples, stage.num_mini_batches)
        ]
        shown = examples(step, samples, prompts, self.buffer.worker.tokenizer)
        return StepData(mini_batches, metrics, shown, self.buffer.state())

    def _sample(self, step: int) -> tuple[list[Sample], list[Prompt], list[Sample]]:
        """Return (samples of ``train_batch_size`` groups to train on, all prompts, all generated samples)."""
        stage = self.stage
        prompts, generated = self.buffer.next_batch(step)
        if stage.filter_groups is None:
            return generated, prompts, generated
        prompts = list(prompts)
        informative = _informative(generated)
        for attempt in range(1, stage.filter_groups.max_num_gen_batches):
            num_missing = stage.train_batch_size - len(informative) // stage.num_generations
            used = {prompt.id for prompt in prompts}
            extra_prompts = self.buffer.loader.resample(step, attempt, used, num_missing) if num_missing else []
            if not extra_prompts:
                break
            extra = self.buffer.worker.sample(extra_prompts, stage.num_generations, step)
            prompts += extra_prompts
            generated = generated + extra
            informative += _informative(extra)
        self.buffer.prefetch(step + 1)
        selected = {sample.group_id for sample in informative}
        # If resampling does not fill the batch, uninformative groups keep its size; their advantages are zero.
        for sample in generated:
            if len(selected) == stage.train_batch_size:
                break
            selected.add(sample.group_id)
        return [sample for sample in generated if sample.group_id in selected], prompts, generated


def _informative(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples of groups whose rewards differ."""
    rewards = np.array([sample.reward for sample in samples])
    uninformative = set(zero_variance_groups(rewards, np.array([sample.group_id for sample in samples])).tolist())
    return [sample for sample in samples if sample.group_id not in uninformative]


def with_advantages(samples: Sequence[Sample], stage: GrpoConfig) -> tuple[list[Sample], float]:
    """Return the samples with group-relative advantages, and the fraction of groups whose rewards are all equal."""
    rewards = np.array([sample.require("reward", "the verifier") for sample in samples])
    if stage.overlong_buffer is not None:
        rewards = rewards + overlong_penalty(
            np.array([sample.response_length for sample in samples]),
            max_response_length=stage.sampling.max_response_length,
            buffer_tokens=stage.overlong_buffer.len,
            penalty=stage.overlong_buffer.penalty_factor,
        )
    groups = np.array([sample.group_id for sample in samples])
    relative = group_relative(rewards, groups, norm_adv_by_std=stage.norm_adv_by_std)
    scored = [
        dataclasses.replace(sample, advantages=np.where(sample.response_mask, value, 0.0).astype(np.float32))
        for sample, value in zip(samples, relative.advantages, strict=True)
    ]
    return scored, relative.num_zero_variance / relative.num_groups
