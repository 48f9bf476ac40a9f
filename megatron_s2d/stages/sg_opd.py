"""SG-OPD: the sign gate on distillation advantages, and phased teacher sampling (methods.md M5).

Shapes: t response tokens of a step, flat over its samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_s2d.arithmetic import log2_bin_starts
from megatron_s2d.config.opd import OpdConfig, SignGateConfig
from megatron_s2d.data.sample_exchange import move_samples, ranks_in_layout
from megatron_s2d.objectives.advantages import (
    ONE_RANK,
    AnchorSchedule,
    GateCounts,
    SignGate,
    Totals,
    group_relative,
    sg_opd_gate,
    stability_weight,
)
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, Prompt, Sample, without_array
from megatron_s2d.rollout.sampler import RolloutWorker
from megatron_s2d.stages.context import StageContext
from megatron_s2d.teachers.frozen import TeacherRouter
from megatron_s2d.teachers.views import as_student_reads
from megatron_s2d.verify import RewardManager


def gated_advantages(
    settings: SignGateConfig,
    samples: Sequence[AnySample],
    teacher: np.ndarray,
    student: np.ndarray,
    reference: np.ndarray | None,
    counted: np.ndarray,
    totals: Totals = ONE_RANK,
) -> tuple[np.ndarray, dict[str, float]]:
    """Return (advantages [t] of this rank's samples, metrics of all) of graded samples.

    teacher, student, reference: log-probabilities [t] of this rank's response tokens. counted: bool [t], the tokens
    that have a loss weight, over which the stability weight averages. totals: of the data-parallel ranks.
    """
    is_own = np.array([isinstance(sample, Sample) for sample in samples])
    lengths = np.array([sample.response_length for sample in samples])
    rewards = np.array([sample.require("reward", "the verifier") for sample in samples])
    groups = group_relative(rewards, np.array([sample.group_id for sample in samples]))
    verifier = np.repeat(groups.advantages[is_own], lengths[is_own])
    gate = SignGate(settings.lambda_high, settings.lambda_base, settings.conflict_fallback, settings.conflict_beta)
    gated = sg_opd_gate(verifier, teacher, student, reference, gate)
    counts = GateCounts(*map(int, totals.sum(np.array(dataclasses.astuple(gated.counts)))))
    metrics = {f"gate/{name}": value for name, value in counts.fractions().items()}
    positions = np.concatenate([np.zeros(0, dtype=np.int64), *map(np.arange, lengths[is_own])])
    metrics |= agreement_by_position(gated.agreement, positions, int(lengths.max(initial=1)) - 1, totals)
    advantages = gated.advantages
    if settings.stability_clip is not None:
        stability = stability_weight(teacher - student, clip=settings.stability_clip, counted=counted, totals=totals)
        advantages = advantages * stability.weights
        metrics["gate/stability_clipped_fraction"] = stability.num_clipped / max(1, stability.num_tokens)
    return advantages, metrics


def agreement_by_position(
    agreement: np.ndarray, positions: np.ndarray, last: int, totals: Totals = ONE_RANK
) -> dict[str, float]:
    """Return the shares of consensus and conflict among response tokens 0, 1, 2-3, 4-7, ... of all ranks.

    The bins are those of ``means_by_position``. agreement: [t], 1, -1 or 0. positions: [t] of this rank's tokens in
    their responses. last: the largest position of all ranks.
    """
    starts = log2_bin_starts(last)
    bins = np.searchsorted(starts, positions, side="right") - 1
    counts = totals.sum(np.bincount(bins, minlength=len(starts)))
    metrics = {}
    for sign, name in ((1, "consensus"), (-1, "conflict")):
        sums = totals.sum(np.bincount(bins, weights=agreement == sign, minlength=len(starts)))
        shares = sums / np.maximum(counts, 1)
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
    layout: Layout  # of the student, whose data-parallel ranks train on the responses

    @classmethod
    def of(
        cls,
        context: StageContext,
        stage: OpdConfig,
        teachers: TeacherRouter,
        reward_manager: RewardManager,
        layout: Layout,
    ) -> TeacherAnchorSource:
        """Create rollout workers over the frozen teachers. layout: of the student."""
        settings = stage.teacher_sampling
        schedule = AnchorSchedule(settings.alpha_high, settings.alpha_end, settings.phase_1_end, settings.phase_2_end)
        params = context.rollouts.sampling_params(stage.sampling, context.models.name_of(context.name))
        workers = {}
        for domain in teachers.models:
            name = stage.teacher if domain is None else stage.teacher[domain]
            with teachers.model_for(domain) as teacher:
                longest = 0 if teachers.views is None else teachers.views.longest
                engine = context.rollouts.engine(teacher, context.models.name_of(name), params, longest_prompt=longest)
            workers[domain] = RolloutWorker(
                teacher.layout,
                engine,
                params,
                context.seed + 1,
                context.inputs.tokenizer,
                reward_manager,
                context.rollouts.environments(context.models.name_of(name), reward_manager),
            )
        return cls(stage, teachers, workers, schedule, layout)

    def batch_for_step(
        self, step: int, prompts: Sequence[Prompt]
    ) -> tuple[list[list[AnySample]], float, dict[str, float]]:
        """Return (anchors of each mini-batch, alpha, metrics); nothing is sampled where alpha is 0."""
        stage, settings = self.stage, self.stage.teacher_sampling
        progress = (step - 1) / stage.steps
        mini_batches: list[list[AnySample]] = [[] for _ in range(stage.num_mini_batches)]
        if not self.schedule.samples_teacher(progress):
            return mini_batches, 0.0, {"anchor/alpha": 0.0, "anchor/num_samples": 0.0}
        alpha = self.schedule.alpha(progress)
        selected = prompts[: max(1, round(settings.fraction * len(prompts)))]
        generated: list[AnySample] = []
        for domain, worker in self.workers.items():
            in_domain = [prompt for prompt in selected if domain is None or prompt.domain == domain]
            if in_domain:
                # Several teachers take turns on the device: scoring has offloaded them all.
                views = self.teachers.views
                read = in_domain if views is None else views.prompts(in_domain)
                with self.teachers.model_for(domain):
                    samples = worker.sample(read, settings.num_generations, step)
                if views is not None:
                    samples = as_student_reads(samples, in_domain, read)
                ranks = ranks_in_layout(samples, worker.layout, self.layout)
                generated += move_samples(samples, worker.layout, self.layout, ranks)[0]
        accepted = [sample for sample in generated if sample.verifier_label == "correct" or not settings.only_correct]
        for index, sample in enumerate(accepted):
            renamed = dataclasses.replace(sample, id=f"{sample.id}~teacher")
            anchor = without_array(without_array(renamed, "rollout_log_probs"), "routed_experts")
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
