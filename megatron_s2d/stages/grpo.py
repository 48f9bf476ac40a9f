"""GRPO: stage 1 on the teacher, stage 3 on the bridged student, and the direct baseline (methods.md M1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.objectives.advantages import (
    group_relative,
    overlong_penalty,
    zero_variance_groups,
)
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.sampler import (
    PromptDataLoader,
    RolloutBuffer,
    RolloutWorker,
    examples,
    response_metrics,
)
from megatron_s2d.stages.context import StageContext
from megatron_s2d.train.loop import StepData, train
from megatron_s2d.train.policy import MegatronModel
from megatron_s2d.verify import RewardManager


def run_grpo(context: StageContext) -> None:
    """Sample groups, verify, update."""
    stage: GrpoConfig = context.stage
    policy, model = context.start_policy(), context.config.model_of(context.name)
    reference = _reference(context, stage)
    policy.prepare_training(stage.optimizer, stage.steps * stage.num_mini_batches, offload=stage.offload_optimizer)
    params = context.sampling(stage.sampling, model)
    engine = context.engine(policy, model, params)
    with RewardManager() as graders:
        sampler = RolloutWorker(policy.layout, engine, params, context.seed, context.tokenizer, graders)
        stream = PromptDataLoader(context.prompts(stage.prompts), stage.train_batch_size, context.seed)
        rounds = context.rounds(stream, sampler, announces=stage.filter_groups is None)
        source = GrpoSource(stage, rounds, reference)
        train(policy, source, objective_of(stage), context.directory, context.settings(), engine=engine)
    context.save_model(policy)


def objective_of(stage: GrpoConfig):
    """The stage's loss. With one update per round the sampled weights are the current ones: ratios start at 1."""
    surrogate = Surrogate(
        clip_ratio_low=stage.clip_ratio_low,
        clip_ratio_high=stage.clip_ratio_high,
        clip_ratio_c=stage.clip_ratio_c,
        rollout_correction=stage.rollout_correction.mode,
        rollout_correction_cap=stage.rollout_correction.cap,
        on_policy=stage.num_mini_batches == 1,
    )
    return grpo_objective(surrogate, kl_loss_coef=stage.kl_loss_coef)


def _reference(context: StageContext, stage: GrpoConfig) -> MegatronModel | None:
    if stage.kl_loss_coef == 0:
        return None
    if stage.reference is not None:
        return context.frozen(stage.reference)
    reference = context.start_policy(trained=False)
    reference.freeze()
    return reference


@dataclasses.dataclass(frozen=True, eq=False)
class GrpoSource:
    """The live source: groups of graded responses with their advantages."""

    stage: GrpoConfig
    rounds: RolloutBuffer
    reference: MegatronModel | None

    def resume(self, position: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``."""
        self.rounds.resume(position)

    def step(self, step: int) -> StepData:
        """Sample, drop uninformative groups where asked for, score with the reference, compute advantages."""
        stage = self.stage
        samples, prompts, drawn = self._sample(step)
        metrics = response_metrics(drawn)
        if self.reference is not None:
            scores = self.reference.score(samples)
            samples = [
                dataclasses.replace(sample, reference_log_probs=score)
                for sample, score in zip(samples, scores, strict=True)
            ]
        samples, zero_variance = with_advantages(samples, stage)
        metrics |= {"zero_variance_fraction": zero_variance, "rollout/num_generated": float(len(drawn))}
        updates = split_updates(samples, stage.num_mini_batches)
        batches = [MiniBatch(part, {"policy_weight": policy_weights(part, stage)}) for part in updates]
        shown = examples(step, samples, prompts, self.rounds.sampler.tokenizer)
        return StepData(batches, metrics, shown, self.rounds.state())

    def _sample(self, step: int) -> tuple[list[Sample], list[Prompt], list[Sample]]:
        """(samples to train on, their prompts, all samples drawn); whole groups, ``train_batch_size`` of them."""
        stage = self.stage
        prompts, drawn = self.rounds.next_batch(step)
        if stage.filter_groups is None:
            return drawn, prompts, drawn
        groups, seen = [drawn], {prompt.id for prompt in prompts}
        all_prompts = list(prompts)
        kept = _informative(drawn)
        for round_ in range(1, stage.filter_groups.max_num_gen_batches):
            missing = stage.train_batch_size - len(kept) // stage.num_generations
            more = self.rounds.stream.resample(step, round_, seen, missing) if missing else []
            if not more:
                break
            seen |= {prompt.id for prompt in more}
            found = self.rounds.sampler.sample(more, stage.num_generations, step)
            offset = len(all_prompts)
            found = [dataclasses.replace(sample, group=sample.group + offset) for sample in found]
            all_prompts += more
            groups.append(found)
            kept += _informative(found)
        self.rounds.prefetch(step + 1)
        drawn = [sample for part in groups for sample in part]
        chosen = {sample.group for sample in kept}
        # Where even the refills do not fill the batch, uninformative groups keep its size; their advantages are zero.
        for sample in drawn:
            if len(chosen) == stage.train_batch_size:
                break
            chosen.add(sample.group)
        return [sample for sample in drawn if sample.group in chosen], all_prompts, drawn


def _informative(samples: Sequence[Sample]) -> list[Sample]:
    rewards = np.array([sample.reward for sample in samples])
    empty = set(zero_variance_groups(rewards, np.array([sample.group for sample in samples])).tolist())
    return [sample for sample in samples if sample.group not in empty]


def with_advantages(samples: Sequence[Sample], stage: GrpoConfig) -> tuple[list[Sample], float]:
    """Samples with group-relative advantages, and the fraction of groups whose rewards are all equal."""
    rewards = np.array([sample.require("reward", "the verifier") for sample in samples])
    if stage.overlong_buffer is not None:
        rewards = rewards + overlong_penalty(
            np.array([sample.response_length for sample in samples]),
            max_response_length=stage.sampling.max_response_length,
            buffer_tokens=stage.overlong_buffer.len,
            penalty=stage.overlong_buffer.penalty_factor,
        )
    groups = np.array([sample.group for sample in samples])
    found = group_relative(rewards, groups, norm_adv_by_std=stage.norm_adv_by_std)
    advantages = [
        dataclasses.replace(sample, advantages=np.where(sample.response_mask, value, 0.0).astype(np.float32))
        for sample, value in zip(samples, found.advantages, strict=True)
    ]
    return advantages, found.num_zero_variance / found.num_groups


def split_updates(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """``samples`` cut into ``parts`` mini-batches of whole groups, in order."""
    groups = sorted({sample.group for sample in samples})
    place = {group: index * parts // len(groups) for index, group in enumerate(groups)}
    return [[sample for sample in samples if place[sample.group] == part] for part in range(parts)]


def policy_weights(samples: Sequence[Sample], stage: GrpoConfig | OpdConfig) -> np.ndarray:
    """Weight of every response token of each sample, with the update's normaliser folded in.

    Responses that ran into the length limit weigh nothing, and are not counted, with ``truncated_responses: mask``.
    """
    masks = stage.truncated_responses == "mask"
    lengths = [0 if masks and sample.finish_reason == "length" else sample.response_length for sample in samples]
    return token_weights(lengths, stage.loss_agg_mode, ResponseCounts.of(lengths), stage.sampling.max_response_length)
