"""Loss weights of truncated responses, kept or masked."""

import dataclasses

import numpy as np
import pytest

from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.records import Sample
from megatron_s2d.stages.policy_loss import policy_loss_weights


def sample(length, finish_reason):
    return Sample(
        id=f"{length}", prompt_id="p", group_id="p", domain="d", seed=0, token_ids=np.arange(length + 2),
        response_mask=np.arange(length + 2) >= 2, temperature=1.0, finish_reason=finish_reason,
    )  # fmt: skip


@pytest.mark.parametrize("loss_agg_mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
def test_masked_responses_have_zero_weight_and_are_not_counted(loss_agg_mode):
    stage = OpdConfig(role="opd", init="a", steps=1, teacher="t", prompts="p", loss_agg_mode=loss_agg_mode)
    samples = [sample(4, "stop"), sample(10, "length"), sample(6, "stop")]
    masked = policy_loss_weights(samples, stage.model_copy(update={"truncated_responses": "mask"}))
    finished = policy_loss_weights([samples[0], samples[2]], stage)
    assert masked.tolist() == [finished[0], 0.0, finished[1]]
    assert policy_loss_weights(samples, stage)[1] > 0


def test_only_truncated_responses_give_no_gradient():
    stage = OpdConfig(role="opd", init="a", steps=1, teacher="t", prompts="p", truncated_responses="mask")
    assert not policy_loss_weights([sample(4, "length"), dataclasses.replace(sample(5, "length"))], stage).any()
