"""What GRPO and OPD share: mini-batches of whole groups, loss weights of responses, the clipped surrogate."""

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


def split_into_mini_batches(
    samples: Sequence[Sample], count: int, blocks: Sequence[int] | None = None
) -> list[list[Sample]]:
    """Cut ``samples`` into ``count`` mini-batches of whole groups, in order of first occurrence.

    blocks: what stays together instead of groups, one entry per sample.
    """
    keys = [sample.group_id for sample in samples] if blocks is None else blocks
    units = list(dict.fromkeys(keys))
    mini_batch_of = {unit: index * count // len(units) for index, unit in enumerate(units)}
    return [
        [sample for sample, key in zip(samples, keys, strict=True) if mini_batch_of[key] == index]
        for index in range(count)
    ]


def policy_loss_weights(samples: Sequence[Sample], stage: GrpoConfig | OpdConfig) -> np.ndarray:
    """Return the loss weight of every response token of each sample, with the mini-batch's normaliser folded in.

    With ``truncated_responses: mask``, responses that ran into the length limit weigh 0 and are not counted.
    """
    masks = stage.truncated_responses == "mask"
    lengths = [0 if masks and sample.finish_reason == "length" else sample.response_length for sample in samples]
    return token_weights(lengths, stage.loss_agg_mode, ResponseCounts.of(lengths), stage.sampling.max_response_length)
