"""On-policy distillation: the student samples, frozen teachers score its tokens (stage 2b; methods.md M3, M4).

``kl_estimator`` selects the source: ``full_vocab`` and ``top_k`` compare distributions (``DivergenceOpdSource``),
``sampled_token`` makes an advantage of the sampled tokens' log-ratio (``PolicyGradientOpdSource``). SG-OPD's gate and
anchors are in ``sg_opd.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.opd import FixedAdvantageConfig, OpdConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.data.stored_samples import OfflineSamples
from megatron_s2d.objectives.advantages import (
    CombinedAdvantages,
    combined_advantage,
    fixed_advantage,
    g_opd_advantage,
    group_relative,
)
from megatron_s2d.objectives.distill import divergence_objective, policy_distillation_objective
from megatron_s2d.objectives.terms import Objective, ResponseCounts, token_weights
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import AnySample, Sample, own_samples, with_array, without_array
from megatron_s2d.rollout.buffer import Batch, RolloutBuffer
from megatron_s2d.rollout.sampler import Examples, RolloutWorker, examples, response_metrics
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.lagged_teacher import LaggedTeacherSource
from megatron_s2d.stages.opd_teachers import (
    AnyTeachers,
    announce,
    connect_services,
    distribution_teacher,
    load_references,
    load_teachers,
    serve_teachers,
)
from megatron_s2d.stages.policy_loss import (
    at_tokens,
    check_truncated,
    counted_tokens,
    epoch_order,
    flat_values,
    mini_batches_by_epoch,
    mix_into_mini_batches,
    policy_loss_weights,
    surrogate_of,
    with_token_advantages,
)
from megatron_s2d.stages.sft import shuffled
from megatron_s2d.stages.sg_opd import TeacherAnchorSource, gated_advantages
from megatron_s2d.stages.token_weighting import token_factors, with_factors
from megatron_s2d.stages.validation import StageValidation, restore_best
from megatron_s2d.teachers.frozen import TeacherRouter
from megatron_s2d.train.loop import StepData, train
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.train.metrics import timed
from megatron_s2d.verify import RewardManager


def run_opd(context: StageContext) -> None:
    """Train on the student's own responses against frozen teachers."""
    stage: OpdConfig = context.stage
    student = context.models.start(beta=stage.beta)
    served = connect_services(context, stage, student) if stage.teacher_service is not None else None
    teachers = served or load_teachers(context, stage, student)
    model = context.models.name_of(context.name)
    params = context.rollouts.sampling_params(stage.sampling, model)
    scorers = teachers
    if stage.teacher_engine == "sglang" and isinstance(teachers, TeacherRouter):
        scorers = serve_teachers(context, stage, teachers, params)
    references = load_references(context, stage)
    student.prepare_training(stage.optimizer, stage.steps * stage.num_updates, offload=stage.offload_optimizer)
    student.packs_by_domain = teachers.is_routed and stage.kl_estimator != "sampled_token"
    engine = context.rollouts.engine(student, model, params)
    with RewardManager() as reward_manager:
        grader = reward_manager if stage.grades else None
        worker = RolloutWorker(
            student.layout,
            engine,
            params,
            context.seed,
            context.inputs.tokenizer,
            grader,
            context.rollouts.environments(model, grader),
            on_group=None if served is None else served.prefetch,
        )
        loader = context.prompt_loader()
        if stage.kl_estimator == "sampled_token":
            anchors = (
                TeacherAnchorSource.of(context, stage, teachers, reward_manager, student.layout)
                if stage.teacher_sampling
                else None
            )
            buffer = context.rollouts.buffer(loader, worker)
            source = PolicyGradientOpdSource(stage, student, buffer, scorers, references, anchors, context.seed)
            teacher = None
        else:
            num_on_policy = round(stage.on_policy_fraction * stage.train_batch_size)
            buffer = context.rollouts.buffer(loader, worker, num_on_policy)
            cached = cached_samples(context, stage)
            source = DivergenceOpdSource(stage, student, buffer, scorers, cached, context.seed)
            teacher = distribution_teacher(stage, student, scorers, references)
        settings = context.loop_settings(max_kl=stage.max_kl)
        if stage.teacher_renewal is not None:
            source = LaggedTeacherSource(
                source,
                student,
                teachers.models[None],
                stage.teacher_renewal,
                context.directory,
                stage.teacher_ema_decay,
            )
            settings = dataclasses.replace(settings, before_checkpoint=source.before_checkpoint)
        train(
            student,
            source,
            opd_objective(stage),
            context.directory,
            settings,
            teacher=teacher,
            rollouts=buffer,
            validation=StageValidation.of(context, student, reward_manager, engine),
        )
        if isinstance(source, LaggedTeacherSource):
            source.remove_copies()
    restore_best(context, student)
    context.save_model(student)


def opd_objective(stage: OpdConfig) -> Objective:
    """Return the stage's loss."""
    if stage.kl_estimator == "sampled_token":
        return policy_distillation_objective(
            surrogate_of(stage), entropy_coeff=stage.entropy_coeff, anchor=stage.teacher_sampling is not None
        )
    tail = stage.tail_mass if stage.kl_estimator == "top_k" else None
    return divergence_objective(stage.divergence, tail=tail, measure_rollouts=True)


def cached_samples(context: StageContext, stage: OpdConfig) -> OfflineSamples | None:
    """Return the stage's cached teacher responses (GKD); None without a cache."""
    if stage.cache is None:
        return None
    cache = context.inputs.teacher_cache(stage.cache)
    stored = cache.stored(temperature=stage.sampling.temperature or 1.0)
    return OfflineSamples(stored, shuffled(len(cache), context.seed))


@dataclasses.dataclass(frozen=True, eq=False)
class DivergenceOpdSource:
    """Responses whose tokens are compared with distributions; a share may come from a teacher cache (GKD)."""

    stage: OpdConfig
    student: MegatronModel
    buffer: RolloutBuffer
    teachers: AnyTeachers  # they score only where ``token_weighting`` needs it
    cached: OfflineSamples | None
    seed: int = 0  # of the order in passes after the first

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``."""
        self.buffer.resume(state)

    def step(self, step: int) -> StepData:
        """Sample; responses are not scored, because the loss reads distributions."""
        stage = self.stage
        num_on_policy, tokenizer = self.buffer.train_batch_size, self.buffer.worker.tokenizer
        prompts, samples, _ = self.buffer.next_batch(step) if num_on_policy else Batch([], [], [])
        announce(self.teachers, samples)
        metrics = response_metrics(samples) if samples else {}
        check_truncated(metrics, stage.max_truncated_fraction, step)
        shown = Examples.of(step, samples, prompts, tokenizer, self.student.layout) if samples else None
        passes = mini_batches_by_epoch(samples, stage, self.seed, step)
        num_cached = (stage.train_batch_size - num_on_policy) * stage.num_generations
        if num_cached:
            read = self.cached.read((step - 1) * num_cached, num_cached, self.student.layout)
            cached: list[AnySample] = [dataclasses.replace(sample, id=f"{sample.id}~cached") for sample in read]
            for array in ("rollout_log_probs", "routed_experts"):  # the teacher's
                cached = [without_array(sample, array) for sample in cached]
            orders = [epoch_order(len(cached), self.seed, step, epoch) for epoch in range(stage.ppo_epochs)]
            passes = [
                mix_into_mini_batches(parts, [cached[index] for index in order])
                for parts, order in zip(passes, orders, strict=True)
            ]
        factors = token_factors(stage, [sample for part in passes[0] for sample in part], self.student, self.teachers)
        mini_batches = [
            MiniBatch(part, {"divergence_weight": with_factors(part, policy_loss_weights(part, stage), factors)})
            for parts in passes
            for part in parts
        ]
        return StepData(mini_batches, metrics, state=self.buffer.state(), shown=shown)


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyGradientOpdSource:
    """Responses whose sampled tokens carry an advantage: OPD, G-OPD, and with a sign gate SG-OPD."""

    stage: OpdConfig
    student: MegatronModel
    buffer: RolloutBuffer
    teachers: AnyTeachers
    references: TeacherRouter | None
    anchors: TeacherAnchorSource | None
    seed: int = 0  # of the order of groups in passes after the first

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``."""
        self.buffer.resume(state)

    def step(self, step: int) -> StepData:
        """Sample, score, compute advantages, add anchors."""
        stage = self.stage
        prompts, samples, _ = self.buffer.next_batch(step)
        announce(self.teachers, samples)
        metrics = response_metrics(samples)
        check_truncated(metrics, stage.max_truncated_fraction, step)
        samples, weight_scale, advantage_metrics = self._with_advantages(self._scored(samples), step)
        metrics |= advantage_metrics
        factors = token_factors(stage, samples, self.student, self.teachers)
        parts = [part for parts in mini_batches_by_epoch(samples, stage, self.seed, step) for part in parts]
        if self.anchors is None:
            mini_batches = [
                MiniBatch(part, {"policy_weight": self._policy_weights(part, factors, weight_scale)}) for part in parts
            ]
        else:
            anchors, alpha, anchor_metrics = self.anchors.batch_for_step(step, prompts)
            metrics |= anchor_metrics
            mini_batches = [
                with_anchors(part, self._policy_weights(part, factors, weight_scale), part_anchors, alpha)
                for part, part_anchors in zip(parts, anchors * stage.ppo_epochs, strict=True)
            ]
        shown = examples(step, samples, prompts, self.buffer.worker.tokenizer, self.student.layout)
        return StepData(mini_batches, metrics, shown, self.buffer.state())

    def _policy_weights(
        self, samples: Sequence[AnySample], factors: Mapping[str, np.ndarray], scale: float
    ) -> Sequence[float | np.ndarray]:
        return with_factors(samples, scale * policy_loss_weights(samples, self.stage), factors)

    def _scored(self, samples: Sequence[AnySample]) -> list[AnySample]:
        """Return the samples with the log-probabilities of student, teacher and reference."""
        layout = self.student.layout
        with timed("score"):
            scored = with_array(samples, "old_log_probs", self.student.score(samples))
        with timed("teacher"):  # one of another tokenizer needs the student's scores
            scored = with_array(scored, "teacher_log_probs", self.teachers.score(scored, holders=layout))
        if self.references is not None:
            with timed("reference"):
                scored = with_array(scored, "reference_log_probs", self.references.score(samples, holders=layout))
        return scored

    def _with_advantages(self, samples: list[AnySample], step: int) -> tuple[list[AnySample], float, dict[str, float]]:
        """Return (samples with advantages, factor of all loss weights, metrics).

        All response tokens of the step are taken together, over all data-parallel ranks: the stability weight averages
        over them, and a fixed advantage selects among them.
        """
        own, totals = own_samples(samples), self.student.layout.host_dp
        with totals.same_outcome():
            teacher = flat_values(own, "teacher_log_probs", "teacher")
            student = flat_values(own, "old_log_probs", "student")
            reference = None if self.references is None else flat_values(own, "reference_log_probs", "reference")
        lengths = [sample.response_length for sample in own]
        counted = counted_tokens(own, self.stage)
        weight_scale, metrics = 1.0, {}
        clipped_metrics: dict[str, float] = {}
        if self.stage.log_ratio_clip is not None:
            teacher, clipped_metrics = clipped_teacher(teacher, student, self.stage.log_ratio_clip, counted, totals)
        if self.stage.sign_gate is not None:
            values, metrics = gated_advantages(
                self.stage.sign_gate, samples, teacher, student, reference, counted, totals
            )
        elif self.stage.fixed_advantage is not None:
            numbers = np.array([index for index, sample in enumerate(samples) if isinstance(sample, Sample)], dtype=int)
            values, weight_scale, metrics = control_advantages(
                self.stage.fixed_advantage,
                teacher,
                student,
                counted,
                np.repeat(numbers, lengths),
                len(samples),
                totals,
            )
        else:
            values = g_opd_advantage(teacher, student, reference, reward_scale=self.stage.reward_scale)
            if self.stage.reward_advantage is not None:
                combined = self._with_reward(samples, values, counted, step)
                values, metrics = combined.advantages, combined.metrics
        return with_token_advantages(samples, values), weight_scale, metrics | clipped_metrics

    def _with_reward(
        self, samples: list[AnySample], values: np.ndarray, counted: np.ndarray, step: int
    ) -> CombinedAdvantages:
        """Return the teacher's advantages [t] plus the verifier's, by the weight of ``step``."""
        settings = self.stage.reward_advantage
        rewards = np.array([sample.require("reward", "the verifier") for sample in samples])
        groups = np.array([sample.group_id for sample in samples])
        relative = group_relative(rewards, groups, norm_adv_by_std=settings.norm_adv_by_std)
        weight = settings.weight_at(step, self.stage.steps)
        combined = combined_advantage(
            at_tokens(samples, relative.advantages.astype(np.float32)),  # as GRPO stores them
            values,
            verifier_weight=weight,
            counted=counted,
            totals=self.student.layout.host_dp,
        )
        metrics = {
            "advantage/reward_weight": weight,
            "zero_variance_fraction": relative.num_zero_variance / relative.num_groups,
        }
        return dataclasses.replace(combined, metrics=combined.metrics | metrics)


def clipped_teacher(
    teacher: np.ndarray, student: np.ndarray, limit: float, counted: np.ndarray, ranks: HostGroup
) -> tuple[np.ndarray, dict[str, float]]:
    """Return the teacher's log-probabilities [t] within ``limit`` nats of the student's, and how many were not.

    A token that the teacher finds impossible would otherwise outweigh all others of its step. ranks: the data-parallel
    ranks; the share is that of their counted tokens.
    """
    ratio = teacher - student
    outside = (np.abs(ratio) > limit) & counted
    num_outside, count = ranks.sum(np.array([outside.sum(), counted.sum()], dtype=np.int64))
    clipped = np.where(np.abs(ratio) > limit, student + np.clip(ratio, -limit, limit), teacher)
    return clipped.astype(teacher.dtype), {"log_ratio_clipped_fraction": float(num_outside / max(count, 1))}


def control_advantages(
    settings: FixedAdvantageConfig,
    teacher: np.ndarray,
    student: np.ndarray,
    counted: np.ndarray,
    responses: np.ndarray,
    num_responses: int,
    ranks: HostGroup,
) -> tuple[np.ndarray, float, dict[str, float]]:
    """Return (advantages [t], factor of the loss weights, metrics) of the control with a fixed advantage.

    teacher, student: log-probabilities [t] of this rank. counted: bool [t], the tokens that have a loss weight.
    responses: [t], the index of each token's response among the ``num_responses`` of all ranks. ranks: the
    data-parallel ranks, whose tokens are selected together. Unselected tokens keep their weight, with an advantage of
    0, so that the metrics cover the same tokens as those of OPD; the factor makes the loss the mean over the selected
    ones.
    """
    selecting = student if settings.selected_by == "student" else teacher
    fixed = fixed_advantage(
        selecting,
        value=settings.value,
        fraction=settings.fraction,
        counted=counted,
        responses=responses,
        num_responses=num_responses,
        totals=ranks,
    )
    selected = fixed.is_selected
    metrics = {"fixed_advantage/selected_fraction": float(fixed.num_selected) / max(1, fixed.num_tokens)}
    if fixed.num_selected:
        highest = ranks.max(np.array([selecting[selected].max(initial=-np.inf)], dtype=np.float64))[0]
        negative = ranks.sum(np.array([(teacher < student)[selected].sum()]))[0]
        metrics |= {
            "fixed_advantage/highest_selected_log_prob": float(highest),
            # Where the control pushes in the direction of OPD; a measurement, not a part of the update.
            "fixed_advantage/opd_is_negative_fraction": float(negative / fixed.num_selected),
        }
    return fixed.advantages, fixed.weight_scale, metrics


def with_anchors(
    samples: Sequence[AnySample],
    policy_weights: Sequence[float | np.ndarray],
    anchors: Sequence[AnySample],
    alpha: float,
) -> MiniBatch:
    """Return the mini-batch of ``samples`` and ``anchors``: the anchors' mean cross-entropy counts ``alpha``."""
    lengths = [anchor.response_length for anchor in anchors]
    anchor_weights = alpha * token_weights(lengths, "token_mean", ResponseCounts.of(lengths))
    return MiniBatch(
        [*samples, *anchors],
        {
            "policy_weight": [*policy_weights, *[0.0] * len(anchors)],
            "supervised_weight": [*[0.0] * len(samples), *anchor_weights],
        },
    )
