"""On-policy distillation: the student samples, frozen teachers score its tokens (stage 2b; methods.md M3, M4).

``kl_estimator`` selects the source: ``full_vocab`` and ``top_k`` compare distributions (``DivergenceOpdSource``),
``sampled_token`` makes an advantage of the sampled tokens' log-ratio (``PolicyGradientOpdSource``). SG-OPD's gate and
anchors are in ``sg_opd.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.objectives.advantages import g_opd_advantage
from megatron_s2d.objectives.distill import divergence_objective, policy_distillation_objective
from megatron_s2d.objectives.terms import Objective, ResponseCounts, token_weights
from megatron_s2d.records import Sample
from megatron_s2d.rollout.buffer import RolloutBuffer
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker, examples, response_metrics
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.policy_loss import (
    has_loss,
    mix_into_mini_batches,
    policy_loss_weights,
    split_into_mini_batches,
    surrogate_of,
)
from megatron_s2d.stages.sft import shuffled
from megatron_s2d.stages.sg_opd import TeacherAnchorSource, gated_advantages
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter, TopKTeacher
from megatron_s2d.teachers.served import ServedTeachers, ServedTopK
from megatron_s2d.train.loop import StepData, Teacher, train
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.verify import RewardManager


def run_opd(context: StageContext) -> None:
    """Train on the student's own responses against frozen teachers."""
    stage: OpdConfig = context.stage
    student = context.models.start(beta=stage.beta)
    teachers = TeacherRouter.load(stage.teacher, context.models.frozen)
    model = context.models.name_of(context.name)
    params = context.rollouts.sampling_params(stage.sampling, model)
    scorers = serve_teachers(context, stage, teachers, params) if stage.teacher_engine == "sglang" else teachers
    references = TeacherRouter.load(stage.reference, context.models.frozen) if stage.needs_reference else None
    student.prepare_training(stage.optimizer, stage.steps * stage.num_mini_batches, offload=stage.offload_optimizer)
    student.packs_by_domain = teachers.is_routed and stage.kl_estimator != "sampled_token"
    engine = context.rollouts.engine(student, model, params)
    prompts = [prompt for entry in stage.entries for prompt in context.inputs.prompts(entry)]
    with RewardManager() as reward_manager:
        worker = RolloutWorker(
            student.layout,
            engine,
            params,
            context.seed,
            context.inputs.tokenizer,
            reward_manager if stage.uses_labels else None,
        )
        loader = PromptDataLoader(prompts, stage.train_batch_size, context.seed)
        if stage.kl_estimator == "sampled_token":
            anchors = (
                TeacherAnchorSource.of(context, stage, teachers, reward_manager) if stage.teacher_sampling else None
            )
            buffer = context.rollouts.buffer(loader, worker)
            source = PolicyGradientOpdSource(stage, student, buffer, scorers, references, anchors)
            teacher = None
        else:
            num_on_policy = round(stage.on_policy_fraction * stage.train_batch_size)
            buffer = context.rollouts.buffer(loader, worker, num_on_policy)
            source = DivergenceOpdSource(stage, student, buffer, scorers, cached_samples(context, stage))
            teacher = distribution_teacher(stage, student, scorers, references)
        settings = context.loop_settings(max_kl=stage.max_kl)
        train(student, source, opd_objective(stage), context.directory, settings, teacher=teacher, engine=engine)
    context.save_model(student)


def serve_teachers(
    context: StageContext, stage: OpdConfig, teachers: TeacherRouter, params: SamplingParams
) -> ServedTeachers:
    """Start servers with the teachers' weights, checked against the teachers themselves, which are then offloaded."""
    names = {None: stage.teacher} if isinstance(stage.teacher, str) else stage.teacher
    engines: dict[str, ServedEngine] = {}
    for domain, name in names.items():
        if name not in engines:
            teacher = teachers.models[domain]
            top_k = min(stage.top_k, teacher.spec.vocab_size) if stage.kl_estimator == "top_k" else 0
            engines[name] = context.rollouts.served_teacher(teacher, context.models.name_of(name), params, top_k)
    return ServedTeachers({domain: engines[name] for domain, name in names.items()})


def opd_objective(stage: OpdConfig) -> Objective:
    """Return the stage's loss."""
    if stage.kl_estimator == "sampled_token":
        return policy_distillation_objective(surrogate_of(stage), anchor=stage.teacher_sampling is not None)
    tail = stage.tail_mass if stage.kl_estimator == "top_k" else None
    return divergence_objective(stage.divergence, tail=tail, measure_rollouts=True)


def distribution_teacher(
    stage: OpdConfig, student: MegatronModel, teachers: TeacherRouter | ServedTeachers, references: TeacherRouter | None
) -> Teacher:
    """Return the teacher that gives the loss whole or top-k distributions."""
    k = min(stage.top_k, student.spec.vocab_size)
    if isinstance(teachers, ServedTeachers):
        return ServedTopK(student, teachers, k, stage.tail_mass)
    if stage.kl_estimator == "top_k":
        return TopKTeacher(student, teachers, k, stage.top_k_source, stage.tail_mass)
    return FullTeacher(student, teachers, references, stage.reward_scale)


def cached_samples(context: StageContext, stage: OpdConfig) -> Callable[[int, int], Sequence[Sample]] | None:
    """Return a reader of the stage's cached teacher responses (GKD); None without a cache."""
    if stage.cache is None:
        return None
    temperature = stage.sampling.temperature or 1.0
    samples = [
        dataclasses.replace(sample, temperature=temperature)
        for sample in context.inputs.teacher_cache(stage.cache).samples
    ]
    return shuffled(samples, context.seed)


@dataclasses.dataclass(frozen=True, eq=False)
class DivergenceOpdSource:
    """Responses whose tokens are compared with distributions; a share may come from a teacher cache (GKD)."""

    stage: OpdConfig
    student: MegatronModel
    buffer: RolloutBuffer
    teachers: TeacherRouter | ServedTeachers  # they score only where ``token_weighting`` needs it
    cached: Callable[[int, int], Sequence[Sample]] | None

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``."""
        self.buffer.resume(state)

    def step(self, step: int) -> StepData:
        """Sample; responses are not scored, because the loss reads distributions."""
        stage = self.stage
        num_on_policy, tokenizer = self.buffer.train_batch_size, self.buffer.worker.tokenizer
        prompts, samples = self.buffer.next_batch(step) if num_on_policy else ([], [])
        metrics = response_metrics(samples) if samples else {}
        shown = examples(step, samples, prompts, tokenizer) if samples else []
        parts = split_into_mini_batches(samples, stage.num_mini_batches)
        num_cached = (stage.train_batch_size - num_on_policy) * stage.num_generations
        if num_cached:
            cached = [
                dataclasses.replace(
                    sample,
                    id=f"{sample.id}~cached",
                    rollout_log_probs=None,  # the teacher's
                )
                for sample in self.cached((step - 1) * num_cached, num_cached)
            ]
            parts = mix_into_mini_batches(parts, cached)
        factors = token_factors(stage, [sample for part in parts for sample in part], self.student, self.teachers)
        mini_batches = [
            MiniBatch(part, {"divergence_weight": with_factors(part, policy_loss_weights(part, stage), factors)})
            for part in parts
        ]
        return StepData(mini_batches, metrics, shown, self.buffer.state())


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyGradientOpdSource:
    """Responses whose sampled tokens carry an advantage: OPD, G-OPD, and with a sign gate SG-OPD."""

    stage: OpdConfig
    student: MegatronModel
    buffer: RolloutBuffer
    teachers: TeacherRouter | ServedTeachers
    references: TeacherRouter | None
    anchors: TeacherAnchorSource | None

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``."""
        self.buffer.resume(state)

    def step(self, step: int) -> StepData:
        """Sample, score, compute advantages, add anchors."""
        stage = self.stage
        prompts, samples = self.buffer.next_batch(step)
        metrics = response_metrics(samples)
        samples, gate_metrics = self._with_advantages(self._scored(samples))
        metrics |= gate_metrics
        factors = token_factors(stage, samples, self.student, self.teachers)
        parts = split_into_mini_batches(samples, stage.num_mini_batches)
        if self.anchors is None:
            mini_batches = [MiniBatch(part, {"policy_weight": self._policy_weights(part, factors)}) for part in parts]
        else:
            anchors, alpha, anchor_metrics = self.anchors.batch_for_step(step, prompts)
            metrics |= anchor_metrics
            mini_batches = [
                with_anchors(part, self._policy_weights(part, factors), part_anchors, alpha)
                for part, part_anchors in zip(parts, anchors, strict=True)
            ]
        shown = examples(step, samples, prompts, self.buffer.worker.tokenizer)
        return StepData(mini_batches, metrics, shown, self.buffer.state())

    def _policy_weights(
        self, samples: Sequence[Sample], factors: Mapping[str, np.ndarray]
    ) -> Sequence[float | np.ndarray]:
        return with_factors(samples, policy_loss_weights(samples, self.stage), factors)

    def _scored(self, samples: list[Sample]) -> list[Sample]:
        """Return the samples with the log-probabilities of student, teacher and reference."""
        student_scores = self.student.score(samples)
        teacher_scores = self.teachers.score(samples)
        reference_scores = [None] * len(samples) if self.references is None else self.references.score(samples)
        return [
            dataclasses.replace(sample, old_log_probs=student, teacher_log_probs=teacher, reference_log_probs=reference)
            for sample, student, teacher, reference in zip(
                samples, student_scores, teacher_scores, reference_scores, strict=True
            )
        ]

    def _with_advantages(self, samples: list[Sample]) -> tuple[list[Sample], dict[str, float]]:
        """Compute advantages of all response tokens of the step at once: the stability weight averages over them."""
        teacher = _flat(samples, "teacher_log_probs")
        student = _flat(samples, "old_log_probs")
        reference = None if self.references is None else _flat(samples, "reference_log_probs")
        if self.stage.sign_gate is None:
            values = g_opd_advantage(teacher, student, reference, reward_scale=self.stage.reward_scale)
            metrics: dict[str, float] = {}
        else:
            lengths = [sample.response_length for sample in samples]
            counted = np.repeat([has_loss(sample, self.stage) for sample in samples], lengths)
            values, metrics = gated_advantages(self.stage.sign_gate, samples, teacher, student, reference, counted)
        ends = np.cumsum([sample.response_length for sample in samples])
        scored = []
        for sample, response in zip(samples, np.split(values, ends[:-1]), strict=True):
            advantages = np.zeros(len(sample.token_ids), dtype=np.float32)
            advantages[sample.response_mask] = response
            scored.append(dataclasses.replace(sample, advantages=advantages))
        return scored, metrics


def _flat(samples: Sequence[Sample], field: str) -> np.ndarray:
    """``field`` at the response tokens of all samples, one after the other."""
    return np.concatenate([getattr(sample, field)[sample.response_mask] for sample in samples])


def with_anchors(
    samples: Sequence[Sample], policy_weights: Sequence[float | np.ndarray], anchors: Sequence[Sample], alpha: float
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


def token_factors(
    stage: OpdConfig, samples: Sequence[Sample], student: MegatronModel, teachers: TeacherRouter | ServedTeachers
) -> dict[str, np.ndarray]:
    """Return the factor of each token [length] by sample id, of mean 1 over the step's tokens that have a loss weight.

    Empty without ``token_weighting``, and where all factors would be 0, such as for a student that equals its teacher.
    """
    if stage.token_weighting == "none":
        return {}
    if stage.token_weighting == "entropy":
        raw = student.score(samples, "entropy")
    elif stage.token_weighting == "log_ratio":
        pairs = zip(teachers.score(samples), student.score(samples), strict=True)
        raw = [np.abs(teacher_score - student_score) for teacher_score, student_score in pairs]
    else:
        limit = stage.sampling.max_response_length
        raw = [1.0 - np.maximum(sample.response_mask.cumsum() - 1, 0) / limit for sample in samples]
    counted = [
        value[sample.response_mask] for value, sample in zip(raw, samples, strict=True) if has_loss(sample, stage)
    ]
    mean = float(np.concatenate(counted).mean()) if counted else 0.0
    if mean == 0:
        return {}
    return {sample.id: value / mean for sample, value in zip(samples, raw, strict=True)}


def with_factors(
    samples: Sequence[Sample], weights: np.ndarray, factors: Mapping[str, np.ndarray]
) -> Sequence[float | np.ndarray]:
    """Multiply the weight of each sample by its tokens' factors."""
    if not factors:
        return weights
    return [weight * factors[sample.id] for sample, weight in zip(samples, weights, strict=True)]
