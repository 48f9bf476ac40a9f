"""Stages 2a and 2b: forward-KL warm-up on a teacher cache, and on-policy distillation (methods.md M2, M3, M4)."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_s2d.config.algorithm import ForwardKlConfig, OpdConfig
from megatron_s2d.data.cache import TeacherCache
from megatron_s2d.data.packing import UpdateBatch
from megatron_s2d.objectives.advantages import g_opd_advantage
from megatron_s2d.objectives.distill import divergence_objective, policy_distillation_objective
from megatron_s2d.objectives.policy import Surrogate
from megatron_s2d.records import Sample
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.grpo import policy_weights, split_updates
from megatron_s2d.stages.rollouts import PromptStream, Sampler, examples, response_metrics
from megatron_s2d.stages.supervised import GivenResponses, shuffled
from megatron_s2d.stages.teacher_cache import OUTPUT_LAYER_NAME
from megatron_s2d.stages.teachers import CachedTeacher, ModelTeacher
from megatron_s2d.train.loop import StepData, train
from megatron_s2d.train.policy import Policy


def run_forward_kl(context: StageContext) -> None:
    """Train on cached teacher responses against the cached distributions."""
    stage: ForwardKlConfig = context.stage
    policy = context.start_policy()
    policy.prepare_training(stage.optimizer, stage.steps)
    directory = context.inputs[stage.cache]
    cache = TeacherCache.open(directory.cache_path)
    teacher = CachedTeacher(
        cache, directory.path / OUTPUT_LAYER_NAME, policy, tail=stage.tail, temperature=stage.temperature
    )
    samples = [dataclasses.replace(sample, temperature=stage.temperature) for sample in cache.samples]
    source = GivenResponses(shuffled(samples, context.seed), stage.batch_size, stage.aggregation, "divergence_weight")
    objective = divergence_objective("forward_kl", tail=stage.tail if cache.header.kind == "topk" else None)
    train(policy, source, objective, context.directory, context.settings(), teacher=teacher)
    context.save_model(policy)


def run_opd(context: StageContext) -> None:
    """Train on the student's own responses against the frozen teacher."""
    stage: OpdConfig = context.stage
    policy = context.start_policy(beta=stage.beta)
    teacher = context.frozen(stage.teacher)
    reference = context.frozen(stage.reference) if stage.reference is not None and stage.reward_scale != 1.0 else None
    policy.prepare_training(stage.optimizer, stage.steps * stage.updates_per_step)
    engine = context.engine(policy)
    params = context.sampling(stage.sampling, context.config.model_of(context.name))
    sampler = Sampler(policy, engine, params, context.seed, context.tokenizer)
    stream = PromptStream(context.prompts(stage.prompts), stage.prompts_per_step, context.seed)
    full = stage.granularity == "full"
    source = StudentResponses(stage, stream, sampler, None if full else teacher, None if full else reference)
    if full:
        objective = divergence_objective(stage.divergence)
        distributions = ModelTeacher(teacher, reference, stage.reward_scale)
    else:
        surrogate = Surrogate(
            clip_low=stage.clip_low,
            clip_high=stage.clip_high,
            importance=stage.importance.mode,
            importance_cap=stage.importance.cap,
            on_policy=stage.updates_per_step == 1,
        )
        objective, distributions = policy_distillation_objective(surrogate), None
    settings = context.settings()
    train(policy, source, objective, context.directory, settings, teacher=distributions, engine=engine)
    context.save_model(policy)


@dataclasses.dataclass(frozen=True, eq=False)
class StudentResponses:
    """The live source of OPD: responses of the student; with a ``teacher``, its advantages of sampled tokens too."""

    stage: OpdConfig
    stream: PromptStream
    sampler: Sampler
    teacher: Policy | None  # scores sampled tokens; None: the loss asks for whole distributions
    reference: Policy | None

    def step(self, step: int) -> StepData:
        """Sample, score, compute advantages."""
        stage = self.stage
        prompts = self.stream.of_step(step)
        samples = self.sampler.sample(prompts, stage.responses_per_prompt, step)
        metrics = response_metrics(samples)
        if self.teacher is not None:
            samples = self._scored(samples)
        weight = "divergence_weight" if self.teacher is None else "policy_weight"
        updates = [
            UpdateBatch(part, {weight: policy_weights(part, stage.aggregation, stage.sampling)})
            for part in split_updates(samples, stage.updates_per_step)
        ]
        return StepData(updates, metrics, examples(step, samples, prompts, self.sampler.tokenizer))

    def _scored(self, samples: list[Sample]) -> list[Sample]:
        students = self.sampler.policy.score(samples)
        teachers = self.teacher.score(samples)
        references = [None] * len(samples) if self.reference is None else self.reference.score(samples)
        found = []
        for sample, student, teacher, reference in zip(samples, students, teachers, references, strict=True):
            advantage = g_opd_advantage(teacher, student, reference, reward_scale=self.stage.reward_scale)
            found.append(
                dataclasses.replace(
                    sample,
                    old_log_probs=student,
                    teacher_log_probs=teacher,
                    reference_log_probs=reference,
                    advantages=np.where(sample.response_mask, advantage, 0.0).astype(np.float32),
                )
            )
        return found
