"""What stops a run before an update, what is compared with the engine, and how updates make a row of metrics."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")

from megatron_s2d.config.base import UserError
from megatron_s2d.data.packing import MiniBatch, pack
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.records import Sample, WeightVersionSpan
from megatron_s2d.train.loop import (
    aggregate_metrics,
    check_kl,
    check_mismatch_kl,
    drop_incomparable_rollout_log_probs,
    policy_lag,
)


def test_an_engine_that_drifts_from_the_trainer_stops_the_run():
    check_mismatch_kl({"mismatch/k3_kl": 0.01}, 0.01, 3)
    check_mismatch_kl({"mismatch/k3_kl": 5.0}, None, 3)
    check_mismatch_kl({}, 0.01, 3)  # a stage that does not use the engine's log-probabilities
    with pytest.raises(
        UserError, match="step 3: .* 0.02 nats a token .*rollout.max_mismatch_kl 0.01.*weight_sync/max_log_prob_diff"
    ):
        check_mismatch_kl({"mismatch/k3_kl": 0.02}, 0.01, 3)


def test_a_student_that_leaves_its_teacher_stops_the_run():
    check_kl({"kl": 0.5}, 1.0, 2)
    with pytest.raises(UserError, match="above max_kl 1.0"):
        check_kl({"kl": 1.5}, 1.0, 2)


def sample(name: str, rollout: bool) -> Sample:
    log_probs = np.array([0, -1, -2], np.float32)
    return Sample(
        id=name, prompt_id=name, group_id=name, domain="math", seed=0, token_ids=np.array([1, 2, 3]),
        response_mask=np.array([False, True, True]), temperature=1.0, finish_reason="stop",
        rollout_log_probs=log_probs if rollout else None,
    )  # fmt: skip


def test_the_engine_is_compared_with_the_weights_that_sampled_only():
    update = MiniBatch([sample("a", True)], {})
    full = divergence_objective("reverse_kl", measure_rollouts=True)
    assert drop_incomparable_rollout_log_probs(full, update, 0) is update
    assert drop_incomparable_rollout_log_probs(full, update, 1).samples[0].rollout_log_probs is None
    # Old log-probabilities are of the weights that sampled, whatever the update.
    assert drop_incomparable_rollout_log_probs(grpo_objective(Surrogate(), kl_loss_coef=0), update, 1) is update


def test_staleness_counts_tokens_of_the_policy_and_no_others():
    spans = {"a": (WeightVersionSpan(1, 2, 3), WeightVersionSpan(2, 3, 5)), "b": (WeightVersionSpan(1, 3, 5),)}
    spans["teacher"] = (WeightVersionSpan(1, 3, 0),)
    samples = [dataclasses.replace(sample(name, name != "teacher"), weight_versions=spans[name]) for name in spans]
    updates = [MiniBatch(samples[:1], {}), MiniBatch(samples[1:], {})]
    assert policy_lag(updates, 5) == {"policy_lag": 0.5, "policy_lag_max": 2.0}  # of four tokens one is two updates old
    assert policy_lag([MiniBatch(samples[2:], {})], 5) == {}


def test_responses_of_a_teacher_beside_the_students_are_not_compared():
    samples = [sample("a", True), sample("b", False)]
    (batch,) = pack(samples, loss_weights={"divergence_weight": [0.5, 0.5]}, max_tokens=100)
    found = batch.columns.rollout_log_probs[batch.response_mask].view(-1, 2)
    known = found.isnan().logical_not().all(0)
    assert known.sum() == 1 and found[:, known].flatten().tolist() == [-1, -2]
    with pytest.raises(UserError, match="sample b has no rollout_log_probs"):
        pack(samples, loss_weights={"policy_weight": [0.5, 0.5]}, max_tokens=100)


def test_a_row_has_means_of_updates_extremes_of_extremes_and_no_empty_bins():
    reports = [
        {"loss": 1.0, "ratio_max": 2.0, "ratio_min": 0.5, "mismatch/hist/0.1": 0.5, "mismatch/hist/0.3": 0.0},
        {"loss": 3.0, "ratio_max": 5.0, "ratio_min": 0.7, "mismatch/hist/0.1": 0.0, "mismatch/hist/0.3": 0.0},
        {"loss": 5.0},
    ]
    row = aggregate_metrics(reports, {"reward": 0.0}, 10, {"timing_s/step": 2.0})
    assert row == {
        "loss": 3.0, "ratio_max": 5.0, "ratio_min": 0.5, "mismatch/hist/0.1": 0.25, "reward": 0.0,
        "tokens_per_second": 5.0, "timing_s/step": 2.0,
    }  # fmt: skip
