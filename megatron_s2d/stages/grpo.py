"""GRPO: stage 1 on the teacher, stage 3 on the bridged student, and the direct baseline (methods.md M1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.teacher_service import services_of
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.objectives.advantages import (
    combined_advantage,
    distillation_advantage,
    group_relative,
    overlong_penalty,
)
from megatron_s2d.objectives.distill import policy_distillation_objective
from megatron_s2d.objectives.policy import grpo_objective
from megatron_s2d.records import AnySample, Sample, own_samples, with_array
from megatron_s2d.rollout.buffer import RolloutBuffer
from megatron_s2d.rollout.sampler import RolloutWorker, examples, response_metrics
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.opd_teachers import AnyTeachers, announce, connect_services
from megatron_s2d.stages.policy_loss import (
    counted_tokens,
    flat_values,
    mini_batches_by_epoch,
    policy_loss_weights,
    surrogate_of,
    with_token_advantages,
)
from megatron_s2d.stages.validation import StageValidation, restore_best
from megatron_s2d.teachers.frozen import TeacherRouter
from megatron_s2d.train.loop import StepData, train
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.train.metrics import timed
from megatron_s2d.verify import RewardManager


def run_grpo(context: StageContext) -> None:
    """Sample groups, verify, update."""
    stage: GrpoConfig = context.stage
    actor, model = context.models.start(), context.models.name_of(context.name)
    served = connect_services(context, stage, actor) if services_of(stage) is not None else None
    reference = _reference(context, stage)
    actor.prepare_training(stage.optimizer, stage.steps * stage.num_updates, offload=stage.offload_optimizer)
    params = context.rollouts.sampling_params(stage.sampling, model)
    engine = context.rollouts.engine(actor, model, params)
    teacher = None
    if stage.teacher_advantage is not None:
        teachers = served or TeacherRouter.load(stage.teacher_advantage.teacher, context.models.frozen)
        teacher = TeacherAdvantages(stage, actor, teachers)
    of_objective = grpo_objective if teacher is None else policy_distillation_objective
    objective = of_objective(surrogate_of(stage), entropy_coeff=stage.entropy_coeff, kl_loss_coef=stage.kl_loss_coef)
    with RewardManager() as reward_manager:
        worker = RolloutWorker(
            actor.layout,
            engine,
            params,
            context.seed,
            context.inputs.tokenizer,
            reward_manager,
            context.rollouts.environments(model, reward_manager),
            # Of groups that are replaced nobody would read the scores.
            on_group=served.prefetch if served is not None and stage.filter_groups is None else None,
        )
        buffer = context.rollouts.buffer(context.prompt_loader(), worker)
        source = GrpoSource(stage, buffer, reference, context.seed, teacher)
        validation = StageValidation.of(context, actor, reward_manager, engine)
        settings = context.loop_settings()
        train(actor, source, objective, context.directory, settings, rollouts=buffer, validation=validation)
    restore_best(context, actor)
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
class TeacherAdvantages:
    """The teacher's term of the advantages (``teacher_advantage``)."""

    stage: GrpoConfig
    actor: MegatronModel
    teachers: AnyTeachers

    def added(self, samples: Sequence[AnySample], step: int) -> tuple[list[AnySample], dict[str, float]]:
        """Return the samples, which have the verifier's advantages, with both, and their metrics."""
        settings, totals = self.stage.teacher_advantage, self.actor.layout.host_dp
        announce(self.teachers, samples)
        with timed("score"):
            scored = with_array(samples, "old_log_probs", self.actor.score(samples))
        with timed("teacher"):
            scores = self.teachers.score(samples, holders=self.actor.layout)
        scored = with_array(scored, "teacher_log_probs", scores)
        own, weight = own_samples(scored), settings.weight_at(step, self.stage.steps)
        with totals.same_outcome():
            teacher = flat_values(own, "teacher_log_probs", "teacher")
            student = flat_values(own, "old_log_probs", "student")
        combined = combined_advantage(
            flat_values(own, "advantages", "verifier"),
            distillation_advantage(teacher, student),
            distillation_weight=weight,
            counted=counted_tokens(own, self.stage),
            totals=totals,
        )
        metrics = combined.metrics | {"advantage/teacher_weight": weight}
        return with_token_advantages(scored, combined.advantages), metrics


@dataclasses.dataclass(frozen=True, eq=False)
class GrpoSource:
    """Groups of graded responses with their advantages."""

    stage: GrpoConfig
    buffer: RolloutBuffer
    reference: MegatronModel | None
    seed: int = 0  # of the order of groups in passes after the first
    teacher: TeacherAdvantages | None = None

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``."""
        self.buffer.resume(state)

    def step(self, step: int) -> StepData:
        """Take groups, score with the reference, compute advantages."""
        stage = self.stage
        prompts, samples, generated = self.buffer.next_batch(step)
        metrics = response_metrics(generated)
        if self.reference is not None:
            with timed("reference"):
                scores = self.reference.score(samples, holders=self.buffer.worker.layout)
            samples = with_array(samples, "reference_log_probs", scores)
        samples, zero_variance_fraction = with_advantages(samples, stage)
        if self.teacher is not None:
            samples, teacher_metrics = self.teacher.added(samples, step)
            metrics |= teacher_metrics
        metrics["zero_variance_fraction"] = zero_variance_fraction
        metrics["rollout/num_generated"] = float(len(generated))
        mini_batches = [
            MiniBatch(part, {"policy_weight": policy_loss_weights(part, stage)})
            for parts in mini_batches_by_epoch(samples, stage, self.seed, step)
            for part in parts
        ]
        shown = examples(step, samples, prompts, self.buffer.worker.tokenizer, self.buffer.worker.layout)
        return StepData(mini_batches, metrics, shown, self.buffer.state())


def with_advantages(samples: Sequence[AnySample], stage: GrpoConfig) -> tuple[list[AnySample], float]:
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
    advantages = [
        np.where(sample.response_mask, value, 0.0).astype(np.float32) if isinstance(sample, Sample) else None
        for sample, value in zip(samples, relative.advantages, strict=True)
    ]
    return with_array(samples, "advantages", advantages), relative.num_zero_variance / relative.num_groups
