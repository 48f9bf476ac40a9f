"""Stages 2a and 2b: forward-KL warm-up on a teacher cache, and on-policy distillation (methods.md M2 to M5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.forward_kl import ForwardKlConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.objectives.advantages import (
    AnchorSchedule,
    SignGate,
    g_opd_advantage,
    group_relative,
    sg_opd_gate,
    stability_weight,
)
from megatron_s2d.objectives.distill import (
    divergence_objective,
    policy_distillation_objective,
)
from megatron_s2d.objectives.policy import Surrogate
from megatron_s2d.objectives.terms import Objective, ResponseCounts, token_weights
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.sampler import (
    PromptDataLoader,
    RolloutBuffer,
    RolloutWorker,
    examples,
    response_metrics,
)
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.grpo import policy_weights, split_updates
from megatron_s2d.stages.sft import OfflineSource, shuffled
from megatron_s2d.stages.teacher_cache import OUTPUT_LAYER_NAME
from megatron_s2d.teachers.cached import CachedTeacher
from megatron_s2d.teachers.frozen import FullTeacher, ServedTeachers, TeacherRouter, TopKTeacher
from megatron_s2d.teachers.served import ServedTopK
from megatron_s2d.train.loop import StepData, Teacher, train
from megatron_s2d.train.policy import MegatronModel
from megatron_s2d.verify import RewardManager


def run_forward_kl(context: StageContext) -> None:
    """Train on cached teacher responses against the cached distributions."""
    stage: ForwardKlConfig = context.stage
    policy = context.start_policy()
    policy.prepare_training(stage.optimizer, stage.steps, offload=stage.offload_optimizer)
    directory = context.inputs[stage.cache]
    cache = context.open_cache(stage.cache)
    teacher = CachedTeacher(
        cache, directory.path / OUTPUT_LAYER_NAME, policy, tail=stage.tail_mass, temperature=stage.temperature
    )
    samples = [dataclasses.replace(sample, temperature=stage.temperature) for sample in cache.samples]
    source = OfflineSource(
        shuffled(samples, context.seed), stage.global_batch_size, stage.loss_agg_mode, "divergence_weight"
    )
    objective = divergence_objective("forward_kl", tail=stage.tail_mass if cache.header.representation == "top_k" else None)
    train(policy, source, objective, context.directory, context.settings(), teacher=teacher)
    context.save_model(policy)


def run_opd(context: StageContext) -> None:
    """Train on the student's own responses against frozen teachers."""
    stage: OpdConfig = context.stage
    policy = context.start_policy(beta=stage.beta)
    teachers = TeacherRouter.load(stage.teacher, context.frozen)
    params = context.sampling(stage.sampling, context.config.model_of(context.name))
    scorers = _served(context, stage, teachers, params) if stage.teacher_engine == "sglang" else teachers
    references = TeacherRouter.load(stage.reference, context.frozen) if needs_reference(stage) else None
    policy.prepare_training(stage.optimizer, stage.steps * stage.num_mini_batches, offload=stage.offload_optimizer)
    policy.packs_by_domain = teachers.is_routed and stage.kl_estimator != "sampled_token"
    model = context.config.model_of(context.name)
    engine = context.engine(policy, model, params)
    prompts = [prompt for entry in stage.entries for prompt in context.prompts(entry)]
    with RewardManager() as graders:
        sampler = RolloutWorker(
            policy.layout, engine, params, context.seed, context.tokenizer, graders if stage.uses_labels else None
        )
        stream = PromptDataLoader(prompts, stage.train_batch_size, context.seed)
        if stage.kl_estimator == "sampled_token":
            anchors = TeacherAnchorSource.of(context, stage, teachers, graders) if stage.teacher_sampling else None
            source = PolicyGradientOpdSource(stage, policy, context.rounds(stream, sampler), scorers, references, anchors)
            teacher = None
        else:
            live = round(stage.on_policy_fraction * stage.train_batch_size)
            rounds = context.rounds(stream, sampler, live)
            source = DivergenceOpdSource(stage, policy, rounds, scorers, _cached_samples(context, stage))
            teacher = _distributions(stage, policy, scorers, references)
        settings = dataclasses.replace(context.settings(), max_kl=stage.max_kl)
        objective = objective_of(stage)
        train(policy, source, objective, context.directory, settings, teacher=teacher, engine=engine)
    context.save_model(policy)


def _served(context: StageContext, stage: OpdConfig, teachers: TeacherRouter, params: SamplingParams) -> ServedTeachers:
    """Servers with the teachers' weights, proven against the teachers themselves; these then wait in host memory."""
    names = {None: stage.teacher} if isinstance(stage.teacher, str) else stage.teacher
    engines: dict[str, ServedEngine] = {}
    for domain, name in names.items():
        if name not in engines:
            policy = teachers.models[domain]
            top_k = min(stage.top_k, policy.spec.vocab_size) if stage.kl_estimator == "top_k" else 0
            engines[name] = context.served_teacher(policy, context.config.model_of(name), params, top_k)
    return ServedTeachers({domain: engines[name] for domain, name in names.items()})


def needs_reference(stage: OpdConfig) -> bool:
    """Whether any reward scale in use is not 1."""
    scales = (
        [stage.reward_scale] if stage.sign_gate is None else [stage.sign_gate.lambda_high, stage.sign_gate.lambda_base]
    )
    return any(scale != 1.0 for scale in scales)


def objective_of(stage: OpdConfig) -> Objective:
    """The stage's loss."""
    if stage.kl_estimator != "sampled_token":
        tail = stage.tail_mass if stage.kl_estimator == "top_k" else None
        return divergence_objective(stage.divergence, tail=tail, measure_rollouts=True)
    surrogate = Surrogate(
        clip_ratio_low=stage.clip_ratio_low,
        clip_ratio_high=stage.clip_ratio_high,
        rollout_correction=stage.rollout_correction.mode,
        rollout_correction_cap=stage.rollout_correction.cap,
        on_policy=stage.num_mini_batches == 1,
    )
    return policy_distillation_objective(surrogate, anchor=stage.teacher_sampling is not None)


def _distributions(
    stage: OpdConfig, policy: MegatronModel, teachers: TeacherRouter | ServedTeachers, references: TeacherRouter | None
) -> Teacher:
    if isinstance(teachers, ServedTeachers):
        return ServedTopK(policy, teachers, min(stage.top_k, policy.spec.vocab_size), stage.tail_mass)
    if stage.kl_estimator == "top_k":
        return TopKTeacher(
            policy, teachers, min(stage.top_k, policy.spec.vocab_size), stage.top_k_source, stage.tail_mass
        )
    return FullTeacher(policy, teachers, references, stage.reward_scale)


def _cached_samples(context: StageContext, stage: OpdConfig) -> Callable[[int, int], Sequence[Sample]] | None:
    if stage.cache is None:
        return None
    cached = context.open_cache(stage.cache).samples
    temperature = stage.sampling.temperature or 1.0
    return shuffled([dataclasses.replace(sample, temperature=temperature) for sample in cached], context.seed)


@dataclasses.dataclass(frozen=True, eq=False)
class DivergenceOpdSource:
    """Responses whose tokens are compared with whole distributions; a share may come from a teacher cache (GKD)."""

    stage: OpdConfig
    student: MegatronModel
    rounds: RolloutBuffer
    teachers: TeacherRouter | ServedTeachers  # asked for scores only where tokens are weighted by them
    cached: Callable[[int, int], Sequence[Sample]] | None

    def resume(self, position: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``."""
        self.rounds.resume(position)

    def step(self, step: int) -> StepData:
        """Sample; nothing is scored, for the loss asks for distributions."""
        stage = self.stage
        live, sampler = self.rounds.train_batch_size, self.rounds.sampler
        prompts, samples = self.rounds.next_batch(step) if live else ([], [])
        metrics = response_metrics(samples) if samples else {}
        shown = examples(step, samples, prompts, sampler.tokenizer) if samples else []
        others = stage.train_batch_size - live
        if others:
            count = others * stage.num_generations
            cached = self.cached((step - 1) * count, count)
            samples = samples + [
                dataclasses.replace(
                    sample,
                    id=f"{sample.id}~cached",
                    group=live + place // stage.num_generations,
                    rollout_log_probs=None,  # the teacher's
                )
                for place, sample in enumerate(cached)
            ]
        factors = token_factors(stage, samples, self.student, self.teachers)
        updates = []
        for part in split_updates(samples, stage.num_mini_batches):
            weights = policy_weights(part, stage)
            updates.append(MiniBatch(part, {"divergence_weight": with_factors(part, weights, factors)}))
        return StepData(updates, metrics, shown, self.rounds.state())


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyGradientOpdSource:
    """Responses whose sampled tokens carry an advantage: OPD, G-OPD, and with a gate SG-OPD."""

    stage: OpdConfig
    student: MegatronModel
    rounds: RolloutBuffer
    teachers: TeacherRouter | ServedTeachers
    references: TeacherRouter | None
    anchors: TeacherAnchorSource | None

    def resume(self, position: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``."""
        self.rounds.resume(position)

    def step(self, step: int) -> StepData:
        """Sample, score, compute advantages, add anchors."""
        stage = self.stage
        prompts, samples = self.rounds.next_batch(step)
        metrics = response_metrics(samples)
        samples, gated = self._with_advantages(self._scored(samples))
        factors = token_factors(stage, samples, self.student, self.teachers)
        parts = split_updates(samples, stage.num_mini_batches)
        anchors, anchored = (
            ([[] for _ in parts], {}) if self.anchors is None else self.anchors.batch_for_step(step, prompts)
        )
        updates = [
            self._update(part, extra, anchored.get("anchor/alpha", 0.0), factors)
            for part, extra in zip(parts, anchors, strict=True)
        ]
        shown = examples(step, samples, prompts, self.rounds.sampler.tokenizer)
        return StepData(updates, metrics | gated | anchored, shown, self.rounds.state())

    def _scored(self, samples: list[Sample]) -> list[Sample]:
        students = self.student.score(samples)
        teachers = self.teachers.score(samples)
        references = [None] * len(samples) if self.references is None else self.references.score(samples)
        return [
            dataclasses.replace(sample, old_log_probs=own, teacher_log_probs=teacher, reference_log_probs=reference)
            for sample, own, teacher, reference in zip(samples, students, teachers, references, strict=True)
        ]

    def _with_advantages(self, samples: list[Sample]) -> tuple[list[Sample], dict[str, float]]:
        """Advantages of all response tokens of the step at once: the stability weight is normalised over them."""
        masks = [sample.response_mask for sample in samples]
        flat = {
            name: None
            if samples[0].reference_log_probs is None and name == "reference_log_probs"
            else np.concatenate([getattr(sample, name)[mask] for sample, mask in zip(samples, masks, strict=True)])
            for name in ("teacher_log_probs", "old_log_probs", "reference_log_probs")
        }
        scores = (flat["teacher_log_probs"], flat["old_log_probs"], flat["reference_log_probs"])
        if self.stage.sign_gate is None:
            values, metrics = g_opd_advantage(*scores, reward_scale=self.stage.reward_scale), {}
        else:
            values, metrics = self._gated(samples, masks, *scores)
        found, start = [], 0
        for sample, mask in zip(samples, masks, strict=True):
            advantages = np.zeros(len(mask), dtype=np.float32)
            advantages[mask] = values[start : start + int(mask.sum())]
            start += int(mask.sum())
            found.append(dataclasses.replace(sample, advantages=advantages))
        return found, metrics

    def _gated(self, samples, masks, teacher, student, reference) -> tuple[np.ndarray, dict[str, float]]:
        settings = self.stage.sign_gate
        rewards = np.array([sample.require("reward", "the verifier") for sample in samples])
        groups = group_relative(rewards, np.array([sample.group for sample in samples]))
        verifier = np.concatenate(
            [np.full(int(mask.sum()), value) for mask, value in zip(masks, groups.advantages, strict=True)]
        )
        gate = SignGate(settings.lambda_high, settings.lambda_base, settings.conflict_fallback, settings.conflict_beta)
        gated = sg_opd_gate(verifier, teacher, student, reference, gate)
        metrics = {f"gate/{name}": value for name, value in gated.counts.fractions().items()}
        places = np.concatenate([np.arange(int(mask.sum())) for mask in masks])
        metrics |= fractions_by_position(gated.agreement, places)
        values = gated.advantages
        if settings.stability_clip is not None:
            weights = stability_weight(teacher - student, clip=settings.stability_clip)
            values = values * weights.weights
            metrics["gate/stability_clipped_fraction"] = weights.num_clipped / max(1, weights.num_tokens)
        return values, metrics

    def _update(
        self, samples: list[Sample], anchors: list[Sample], alpha: float, factors: Mapping[str, np.ndarray]
    ) -> MiniBatch:
        own = with_factors(samples, policy_weights(samples, self.stage), factors)
        if self.anchors is None:
            return MiniBatch(samples, {"policy_weight": own})
        lengths = [anchor.response_length for anchor in anchors]
        anchor_weights = alpha * token_weights(lengths, "token_mean", ResponseCounts.of(lengths))
        return MiniBatch(
            [*samples, *anchors],
            {
                "policy_weight": [*own, *[0.0] * len(anchors)],
                "supervised_weight": [*[0.0] * len(samples), *anchor_weights],
            },
        )


def fractions_by_position(agreement: np.ndarray, places: np.ndarray) -> dict[str, float]:
    """Shares of consensus and conflict among tokens 0, 1, 2-3, 4-7, ... of their responses, as ``kl_by_position``.

    agreement: [n], 1, -1 or 0; places: [n] of the tokens in their responses.
    """
    bins = np.ceil(np.log2(places + 1)).astype(int)
    counts = np.bincount(bins)
    found = {}
    for kind, name in ((1, "consensus"), (-1, "conflict")):
        shares = np.bincount(bins, weights=agreement == kind) / np.maximum(counts, 1)
        firsts = [0, *(2**power for power in range(len(counts) - 1))]
        found |= {
            f"gate/{name}_by_position/{first}": float(share) for first, share, n in zip(firsts, shares, counts) if n
        }
    return found


def token_factors(
    stage: OpdConfig, samples: Sequence[Sample], policy: MegatronModel, teachers: TeacherRouter | ServedTeachers
) -> dict[str, np.ndarray]:
    """Sample id -> factor of each token [length], of mean 1 over the response tokens of the step; empty without any."""
    if stage.token_weighting == "none":
        return {}
    if stage.token_weighting == "entropy":
        raw = policy.score(samples, "entropy")
    elif stage.token_weighting == "log_ratio":
        pairs = zip(teachers.score(samples), policy.score(samples), strict=True)
        raw = [np.abs(teacher - student) for teacher, student in pairs]
    else:
        limit = stage.sampling.max_response_length
        raw = [1.0 - np.maximum(sample.response_mask.cumsum() - 1, 0) / limit for sample in samples]
    flat = np.concatenate([value[sample.response_mask] for value, sample in zip(raw, samples, strict=True)])
    mean = float(flat.mean())
    if mean == 0:  # nothing to tell tokens apart by, such as a student that equals its teacher
        return {}
    return {sample.id: value / mean for sample, value in zip(samples, raw, strict=True)}


def with_factors(
    samples: Sequence[Sample], weights: np.ndarray, factors: Mapping[str, np.ndarray]
) -> Sequence[float | np.ndarray]:
    """The weight of each sample times its tokens' factors."""
    if not factors:
        return weights
    return [weight * factors[sample.id] for sample, weight in zip(samples, weights, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherAnchorSource:
    """Phased teacher sampling: verified responses of the teacher to a share of the step's prompts (methods.md M5)."""

    stage: OpdConfig
    samplers: dict[str | None, RolloutWorker]  # by domain, as the teachers
    schedule: AnchorSchedule

    @classmethod
    def of(
        cls, context: StageContext, stage: OpdConfig, teachers: TeacherRouter, graders: RewardManager
    ) -> TeacherAnchorSource:
        """Samplers over the frozen teachers, which stay on the device."""
        settings = stage.teacher_sampling
        schedule = AnchorSchedule(settings.alpha_high, settings.alpha_end, settings.phase_1_end, settings.phase_2_end)
        params = context.sampling(stage.sampling, context.config.model_of(context.name))
        samplers = {}
        for domain, policy in teachers.models.items():
            policy.onload()
            name = stage.teacher if domain is None else stage.teacher[domain]
            engine = context.engine(policy, context.config.model_of(name), params)
            samplers[domain] = RolloutWorker(
                policy.layout, engine, params, context.seed + 1, context.tokenizer, graders
            )
        return cls(stage, samplers, schedule)

    def batch_for_step(self, step: int, prompts: Sequence[Prompt]) -> tuple[list[list[Sample]], dict[str, float]]:
        """Kept responses for each update of the step, and metrics; nothing is sampled where alpha is 0."""
        stage, settings = self.stage, self.stage.teacher_sampling
        progress = (step - 1) / stage.steps
        parts: list[list[Sample]] = [[] for _ in range(stage.num_mini_batches)]
        if not self.schedule.samples_teacher(progress):
            return parts, {"anchor/alpha": 0.0, "anchor/num_samples": 0.0}
        alpha = self.schedule.alpha(progress)
        chosen = prompts[: max(1, round(settings.fraction * len(prompts)))]
        drawn, kept = 0, []
        for domain, sampler in self.samplers.items():
            own = [prompt for prompt in chosen if domain is None or prompt.domain == domain]
            if own:
                found = sampler.sample(own, settings.num_generations, step)
                drawn += len(found)
                kept += [sample for sample in found if sample.reward == 1.0 or not settings.only_correct]
        for place, sample in enumerate(kept):
            anchor = dataclasses.replace(sample, id=f"{sample.id}~teacher", rollout_log_probs=None)
            parts[place % len(parts)].append(anchor)
        return parts, {
            "anchor/alpha": alpha,
            "anchor/num_samples": float(len(kept)),
            "anchor/kept_fraction": len(kept) / drawn,
        }
