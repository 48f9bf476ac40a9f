"""SG-OPD: the sign gate on distillation advantages, and phased teacher sampling (methods.md M5).

Shapes: t response tokens of a step, flat over its samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_s2d.arithmetic import log2_bin_starts
from megatron_s2d.config.opd import OpdConfig, SignGateConfig
from megatron_s2d.objectives.advantages import (
    AnchorSchedule,
    SignGate,
    group_relative,
    sg_opd_gate,
    stability_weight,
)
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.sampler import RolloutWorker
from megatron_s2d.stages.context import StageContext
from megatron_s2d.teachers.frozen import TeacherRouter
from megatron_s2d.verify import RewardManager


def gated_advantages(
    settings: SignGateConfig,
    samples: Sequence[Sample],
    teacher: np.ndarray,
    student: np.ndarray,
    reference: np.ndarray | None,
    counted: np.ndarray,
) -> tuple[np.ndarray, dict[str, float]]:
    """Return (advantages [t], metrics) of graded samples.

    teacher, student, reference: log-probabilities [t] of the response tokens. counted: bool [t], the tokens that have a
    loss weight, over which the stability weight averages.
    """
    lengths = [sample.response_length for sample in samples]
    rewards = np.array([sample.require("reward", "the verifier") for sample in samples])
    groups = group_relative(rewards, np.array([sample.group_id for sample in samples]))
    verifier = np.repeat(groups.advantages, lengths)
    gate = SignGate(settings.lambda_high, settings.lambda_base, settings.conflict_fallback, settings.conflict_beta)
    gated = sg_opd_gate(verifier, teacher, student, reference, gate)
    metrics = {f"gate/{name}": value for name, value in gated.counts.fractions().items()}
    positions = np.concatenate([np.arange(length) for length in lengths])
    metrics |= agreement_by_position(gated.agreement, positions)
    advantages = gated.advantages
    if settings.stability_clip is not None:
        stability = stability_weight(teacher - student, clip=settings.stability_clip, counted=counted)
        advantages = advantages * stability.weights
        metrics["gate/stability_clipped_fraction"] = stability.num_clipped / max(1, stability.num_tokens)
    return advantages, metrics


def agreement_by_position(agreement: np.ndarray, positions: np.ndarray) -> dict[str, float]:
    """Return the shares of consensus and conflict among response tokens 0, 1, 2-3, 4-7, ...

    The bins are those of ``means_by_position``. agreement: [t], 1, -1 or 0. positions: [t] of the tokens in
    their responses.
    """
    starts = log2_bin_starts(int(positions.max(initial=0)))
    bins = np.searchsorted(starts, positions, side="right") - 1
    counts = np.bincount(bins, minlength=len(starts))
    metrics = {}
    for sign, name in ((1, "consensus"), (-1, "conflict")):
        shares = np.bincount(bins, weights=agreement == sign, minlength=len(starts)) / np.maximum(counts, 1)
        metrics |= {
            f"gate/{name}_by_position/{start}": float(share)
            for start, share, count in zip(starts, shares, counts, strict=True)
            if count
        }
    return metrics


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherAnchorSource:
    """Phased teacher sampling: verified responses of the teacher to a share of the step's prompts."""

    stage: OpdConfig
    teachers: TeacherRouter
    workers: dict[str | None, RolloutWorker]  # by domain, as the teachers
    schedule: AnchorSchedule

    @classmethod
    def of(
        cls, context: StageContext, stage: OpdConfig, teachers: TeacherRouter, reward_manager: RewardManager
    ) -> TeacherAnchorSource:
        """Create rollout workers over the frozen teachers."""
        settings = stage.teacher_sampling
        schedule = AnchorSchedule(settings.alpha_high, settings.alpha_end, settings.phase_1_end, settings.phase_2_end)
        params = context.rollouts.sampling_params(stage.sampling, context.models.name_of(context.name))
        workers = {}
        for domain in teachers.models:
            name = stage.teacher if domain is None else stage.teacher[domain]
            with teachers.model_for(domain) as teacher:
                engine = context.rollouts.engine(teacher, context.models.name_of(name), params)
            workers[domain] = RolloutWorker(
                teacher.layout, engine, params, context.seed + 1, context.inputs.tokenizer, reward_manager
            )
        return cls(stage, teachers, workers, schedule)

    def batch_for_step(
        self, step: int, prompts: Sequence[Prompt]
    ) -> tuple[list[list[Sample]], float, dict[str, float]]:
        """Return (anchors of each mini-batch, alpha, metrics); nothing is sampled where alpha is 0."""
        stage, settings = self.stage, self.stage.teacher_sampling
        progress = (step - 1) / stage.steps
        mini_batches: list[list[Sample]] = [[] for _ in range(stage.num_mini_batches)]
        if not self.schedule.samples_teacher(progress):
            return mini_batches, 0.0, {"anchor/alpha": 0.0, "anchor/num_samples": 0.0}
        alpha = self.schedule.alpha(progress)
        selected = prompts[: max(1, round(settings.fraction * len(prompts)))]
        generated: list[Sample] = []
        for domain, worker in self.workers.items():
            in_domain = [prompt for prompt in selected if domain is None or prompt.domain == domain]
            if in_domain:
                # Several teachers take turns on the device: scoring has offloaded them all.
                with self.teachers.model_for(domain):
                    generated += worker.sample(in_domain, settings.num_generations, step)
        accepted = [sample for sample in generated if sample.reward == 1.0 or not settings.only_correct]
        for index, sample in enumerate(accepted):
            anchor = dataclasses.replace(sample, id=f"{sample.id}~teacher", rollout_log_probs=None)
            mini_batches[index % len(mini_batches)].append(anchor)
        return (
            mini_batches,
            alpha,
            {
                "anchor/alpha": alpha,
                "anchor/num_samples": float(len(accepted)),
                "anchor/kept_fraction": len(accepted) / len(generated),
            },
        )
