"""Checks that stop a run before an update, comparison with the engine, and metrics of a step from its updates."""

import dataclasses
import types

import numpy as np
import pytest

pytest.importorskip("torch")

from megatron_s2d.data.packing import MiniBatch, pack
from megatron_s2d.errors import UserError
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.objectives.terms import Metric
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import Sample, WeightVersionSpan
from megatron_s2d.train.loop import (
    aggregate_metrics,
    check_kl,
    check_mismatch_kl,
    drop_incomparable_rollout_log_probs,
    policy_lag,
    with_old_log_probs,
)


def metrics(**values: float) -> dict[str, Metric]:
    return {name.replace("__", "/"): Metric.of(value) for name, value in values.items()}


def test_mismatch_kl_above_the_limit_stops_the_run():
    check_mismatch_kl(metrics(mismatch__k3_kl=0.01), 0.01, 3)
    check_mismatch_kl(metrics(mismatch__k3_kl=5.0), None, 3)
    check_mismatch_kl({}, 0.01, 3)  # a stage that does not use the engine's log-probabilities
    with pytest.raises(
        UserError, match="step 3: .* 0.02 nats a token .*rollout.max_mismatch_kl 0.01.*weight_sync/max_log_prob_diff"
    ):
        check_mismatch_kl(metrics(mismatch__k3_kl=0.02), 0.01, 3)


def test_kl_above_the_limit_stops_the_run():
    check_kl(metrics(kl=0.5), 1.0, 2)
    with pytest.raises(UserError, match="above max_kl 1.0"):
        check_kl(metrics(kl=1.5), 1.0, 2)


def sample(name: str, rollout: bool) -> Sample:
    log_probs = np.array([0, -1, -2], np.float32)
    return Sample(
        id=name, prompt_id=name, group_id=name, domain="math", seed=0, token_ids=np.array([1, 2, 3]),
        response_mask=np.array([False, True, True]), temperature=1.0, finish_reason="stop",
        rollout_log_probs=log_probs if rollout else None,
    )  # fmt: skip


def test_rollout_log_probs_are_compared_under_the_sampling_weights_only():
    mini_batch = MiniBatch([sample("a", True)], {})
    full = divergence_objective("reverse_kl", measure_rollouts=True)
    assert drop_incomparable_rollout_log_probs(full, mini_batch, 0) is mini_batch
    assert drop_incomparable_rollout_log_probs(full, mini_batch, 1).samples[0].rollout_log_probs is None
    # Old log-probabilities are those of the sampling weights, in every mini-batch.
    grpo = grpo_objective(Surrogate(), kl_loss_coef=0)
    assert drop_incomparable_rollout_log_probs(grpo, mini_batch, 1) is mini_batch


class CountingScorer:
    """Log-probabilities that count the forward passes so far, as if every pass had other weights."""

    def __init__(self):
        self.scored = []

    def score(self, samples):
        self.scored += [sample.id for sample in samples]
        return [np.full(3, -float(len(self.scored)), np.float32) for _ in samples]


def test_old_log_probs_of_later_passes_are_those_of_the_first():
    a, b = sample("a", True), sample("b", True)
    mini_batches = [MiniBatch([a], {}), MiniBatch([b], {}), MiniBatch([b], {}), MiniBatch([a], {})]
    model = CountingScorer()
    scored = with_old_log_probs(model, grpo_objective(Surrogate(), kl_loss_coef=0), mini_batches)
    assert model.scored == ["a", "b"]
    values = [(batch.samples[0].id, batch.samples[0].old_log_probs[1]) for batch in scored]
    assert values == [("a", -1.0), ("b", -2.0), ("b", -2.0), ("a", -1.0)]
    # One update per step does not use them.
    assert (
        with_old_log_probs(model, grpo_objective(Surrogate(on_policy=True), kl_loss_coef=0), mini_batches)[0]
        is (mini_batches[0])
    )


def test_policy_lag_counts_tokens_of_the_policy_only():
    spans = {"a": (WeightVersionSpan(1, 2, 3), WeightVersionSpan(2, 3, 5)), "b": (WeightVersionSpan(1, 3, 5),)}
    spans["teacher"] = (WeightVersionSpan(1, 3, 0),)
    samples = [dataclasses.replace(sample(name, name != "teacher"), weight_versions=spans[name]) for name in spans]
    mini_batches = [MiniBatch(samples[:1], {}), MiniBatch(samples[1:], {})]
    layout = types.SimpleNamespace(host_dp=HostGroup())
    # One of four tokens is two updates old.
    assert policy_lag(mini_batches, 5, layout) == {"policy_lag": 0.5, "policy_lag_max": 2.0}
    assert policy_lag([MiniBatch(samples[2:], {})], 5, layout) == {}


def test_teacher_responses_among_the_students_are_not_compared():
    samples = [sample("a", True), sample("b", False)]
    (batch,) = pack(samples, loss_weights={"divergence_weight": [0.5, 0.5]}, max_tokens=100)
    log_probs = batch.columns.rollout_log_probs[batch.response_mask].view(-1, 2)
    comparable = log_probs.isnan().logical_not().all(0)
    assert comparable.sum() == 1 and log_probs[:, comparable].flatten().tolist() == [-1, -2]
    with pytest.raises(UserError, match="sample b has no rollout_log_probs"):
        pack(samples, loss_weights={"policy_weight": [0.5, 0.5]}, max_tokens=100)


def metric(value: float, reduction: str = "mean", omit: str = "never") -> Metric:
    return dataclasses.replace(Metric.of(value), reduction=reduction, omit=omit)


def test_step_metrics_are_means_and_extremes_over_updates_without_empty_bins():
    updates = [
        {
            "loss": metric(1.0, "sum"),
            "ratio/upper": metric(2.0, "max"),  # the reduction decides, not the name
            "ratio/lower": metric(0.5, "min"),
            "half_max": metric(1.0),
            "hist/0.1": metric(0.5, omit="zero"),
            "hist/0.3": metric(0.0, omit="zero"),
            "by_position/1": metric(0.0, omit="empty"),
        },
        {
            "loss": metric(3.0, "sum"),
            "ratio/upper": metric(5.0, "max"),
            "ratio/lower": metric(0.7, "min"),
            "half_max": metric(2.0),
            "hist/0.1": metric(0.0, omit="zero"),
            "hist/0.3": metric(0.0, omit="zero"),
        },
        {"loss": metric(5.0, "sum")},
    ]
    row = aggregate_metrics(updates, {"reward": 0.0}, 10, {"timing_s/step": 2.0})
    assert row == {
        "loss": 3.0, "ratio/upper": 5.0, "ratio/lower": 0.5, "half_max": 1.5, "hist/0.1": 0.25, "by_position/1": 0.0,
        "reward": 0.0, "tokens_per_second": 5.0, "timing_s/step": 2.0,
    }  # fmt: skip
