"""Shared parts of GRPO and OPD: mini-batches of whole groups, loss weights of responses, the clipped surrogate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.objectives.policy import Surrogate
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.records import Sample


def surrogate_of(stage: GrpoConfig | OpdConfig) -> Surrogate:
    """Return the surrogate's settings.

    With one mini-batch per step the sampled weights are the current ones, so ratios start at 1 and old
    log-probabilities are not needed.
    """
    return Surrogate(
        clip_ratio_low=stage.clip_ratio_low,
        clip_ratio_high=stage.clip_ratio_high,
        clip_ratio_c=stage.clip_ratio_c if isinstance(stage, GrpoConfig) else None,
        rollout_correction=stage.rollout_correction.mode,
        rollout_correction_cap=stage.rollout_correction.cap,
        on_policy=stage.num_mini_batches == 1,
    )


def split_into_mini_batches(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """Cut ``samples`` into ``count`` mini-batches of whole groups, in order of first occurrence."""
    groups = list(dict.fromkeys(sample.group_id for sample in samples))
    mini_batch_of = {group: index * count // len(groups) for index, group in enumerate(groups)}
    return [[sample for sample in samples if mini_batch_of[sample.group_id] == index] for index in range(count)]


def mix_into_mini_batches(mini_batches: Sequence[Sequence[Sample]], others: Sequence[Sample]) -> list[list[Sample]]:
    """Append ``others`` (single samples, in order) to the mini-batches, so that all become equally large."""
    count = len(mini_batches)
    total = len(others) + sum(len(part) for part in mini_batches)
    sizes = [total * (index + 1) // count - total * index // count for index in range(count)]
    gaps = np.array([max(0, size - len(part)) for size, part in zip(sizes, mini_batches, strict=True)])
    cuts = np.cumsum(gaps) * len(others) // max(1, gaps.sum())
    return [[*part, *others[start:stop]] for part, start, stop in zip(mini_batches, [0, *cuts], cuts, strict=False)]


def has_loss(sample: Sample, stage: GrpoConfig | OpdConfig) -> bool:
    """Return whether the sample's tokens have a loss weight: means over tokens leave out those that have none."""
    return not (stage.truncated_responses == "mask" and sample.finish_reason == "length")


def policy_loss_weights(samples: Sequence[Sample], stage: GrpoConfig | OpdConfig) -> np.ndarray:
    """Return the loss weight of every response token of each sample, with the mini-batch's normaliser folded in.

    With ``truncated_responses: mask``, responses that ran into the length limit weigh 0 and are not counted.
    """
    lengths = [sample.response_length if has_loss(sample, stage) else 0 for sample in samples]
    return token_weights(lengths, stage.loss_agg_mode, ResponseCounts.of(lengths), stage.sampling.max_response_length)
