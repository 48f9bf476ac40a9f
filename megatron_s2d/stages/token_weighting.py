"""Weights of single response tokens in OPD (``token_weighting``): by entropy, log-ratio or position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.records import AnySample, Sample, with_array
from megatron_s2d.stages.opd_teachers import AnyTeachers
from megatron_s2d.stages.policy_loss import has_loss
from megatron_s2d.train.megatron_model import MegatronModel
from megatron_s2d.train.metrics import timed


def token_factors(
    stage: OpdConfig, samples: Sequence[AnySample], student: MegatronModel, teachers: AnyTeachers
) -> dict[str, np.ndarray]:
    """Return the factor of each token [length] by the id of this rank's samples.

    Their mean is 1 over the step's tokens that have a loss weight, of all ranks. Empty without ``token_weighting``, and
    where all factors would be 0, such as for a student that equals its teacher.
    """
    if stage.token_weighting == "none":
        return {}
    if stage.token_weighting == "entropy":
        with timed("score"):
            raw = student.score(samples, "entropy")
    elif stage.token_weighting == "log_ratio":
        raw = _log_ratios(samples, student, teachers)
    else:
        limit = stage.sampling.max_response_length
        raw = [
            1.0 - np.maximum(sample.response_mask.cumsum() - 1, 0) / limit if isinstance(sample, Sample) else None
            for sample in samples
        ]
    own = {sample.id: (sample, value) for sample, value in zip(samples, raw, strict=True) if isinstance(sample, Sample)}
    counted = [value[sample.response_mask] for sample, value in own.values() if has_loss(sample, stage)]
    values = np.concatenate(counted) if counted else np.zeros(0, dtype=np.float32)
    total, count = student.layout.host_dp.sum(np.array([values.sum(), len(values)], dtype=np.float64))
    mean = float(values.dtype.type(total / max(count, 1)))
    if mean == 0:
        return {}
    return {id_: value / mean for id_, (_, value) in own.items()}


def _log_ratios(samples: Sequence[AnySample], student: MegatronModel, teachers: AnyTeachers) -> list[np.ndarray | None]:
    """Return |log q - log p| [length] of this rank's samples; both are computed only where the samples lack them."""
    if all(sample.has("teacher_log_probs") and sample.has("old_log_probs") for sample in samples):
        scored: Sequence[AnySample] = samples
    else:
        with timed("teacher"):
            scored = with_array(samples, "teacher_log_probs", teachers.score(samples, holders=student.layout))
        with timed("score"):
            scored = with_array(scored, "old_log_probs", student.score(samples))
    return [
        np.abs(sample.require("teacher_log_probs", "the teacher") - sample.require("old_log_probs", "the student"))
        if isinstance(sample, Sample)
        else None
        for sample in scored
    ]


def with_factors(
    samples: Sequence[AnySample], weights: np.ndarray, factors: Mapping[str, np.ndarray]
) -> Sequence[float | np.ndarray]:
    """Multiply the weight of each of this rank's samples by its tokens' factors."""
    if not factors:
        return weights
    return [weight * factors.get(sample.id, 1.0) for sample, weight in zip(samples, weights, strict=True)]
