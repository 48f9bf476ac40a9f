"""Mismatch metrics of trainer and engine against float64 numbers by hand, and excluded tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from megatron_s2d.columns import TokenColumns
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.objectives.policy import (
    MISMATCH_EDGES,
    MISMATCH_HISTOGRAM,
    Surrogate,
    grpo_objective,
    mismatch_metrics,
)
from megatron_s2d.objectives.terms import merge_metrics

LOG_PROBS = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1])
DIFFERENCES = [0.0, 2e-4, -0.02, 0.7, -12.0]


def rollout(differences=DIFFERENCES) -> torch.Tensor:
    return (LOG_PROBS.double() - torch.tensor(differences, dtype=torch.float64)).float()


def values(metrics) -> dict[str, float]:
    return {name: metric.value() for name, metric in metrics.items()}


def test_mismatch_metrics_by_hand():
    metrics = values(mismatch_metrics(LOG_PROBS, rollout(), torch.ones(5, dtype=torch.bool)))
    differences = np.array(DIFFERENCES)
    assert metrics["mismatch/log_prob_abs_diff_mean"] == pytest.approx(np.abs(differences).mean(), rel=1e-5)
    assert metrics["mismatch/log_prob_abs_diff_max"] == pytest.approx(12.0)
    assert metrics["mismatch/k3_kl"] == pytest.approx((np.expm1(differences) - differences).mean(), rel=1e-4)
    shares = {name: share for name, share in metrics.items() if name.startswith(MISMATCH_HISTOGRAM) and share}
    assert shares == {f"{MISMATCH_HISTOGRAM}{edge}": 0.2 for edge in ("0", "0.0001", "0.01", "0.3", "10")}
    assert len(MISMATCH_EDGES) == 18 and list(MISMATCH_EDGES) == sorted(MISMATCH_EDGES)


def test_inactive_and_unsampled_tokens_are_excluded():
    active = torch.tensor([True, True, False, True, True])
    sampled = rollout()
    sampled[4] = math.nan
    metrics = values(mismatch_metrics(LOG_PROBS, sampled, active))
    assert metrics["mismatch/log_prob_abs_diff_max"] == pytest.approx(0.7, rel=1e-5)
    assert metrics["mismatch/log_prob_abs_diff_mean"] == pytest.approx((0.7 + 2e-4) / 3, rel=1e-3)
    assert sum(share for name, share in metrics.items() if name.startswith(MISMATCH_HISTOGRAM)) == pytest.approx(1.0)


def test_metrics_of_parts_merge_into_those_of_the_batch():
    expected = mismatch_metrics(LOG_PROBS, rollout(), torch.ones(5, dtype=torch.bool))
    parts = [
        mismatch_metrics(LOG_PROBS[rows], rollout()[rows], torch.ones(len(rows), dtype=torch.bool))
        for rows in (torch.tensor([0, 1]), torch.tensor([2, 3, 4]), torch.zeros(0, dtype=torch.int64))
    ]
    assert values(merge_metrics(parts)) == pytest.approx(values(expected))


@pytest.mark.parametrize("tail", [None, "bucket"])
def test_divergence_reports_mismatch_with_the_same_loss(tail):
    weight = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])
    masses = {} if tail is None else {"captured_mass": torch.ones(5), "student_captured_mass": torch.ones(5)}
    outputs = TokenOutputs(log_probs=LOG_PROBS, reverse_kl=torch.arange(5.0), **masses)
    columns = TokenColumns(divergence_weight=weight, rollout_log_probs=rollout())
    plain, measuring = (divergence_objective("reverse_kl", tail=tail, measure_rollouts=on) for on in (False, True))
    assert "log_probs" in measuring.needs and "log_probs" not in plain.needs
    assert torch.equal(plain.token_loss(outputs, columns), measuring.token_loss(outputs, columns))
    metrics = values(measuring.metrics(outputs, columns))
    assert metrics["mismatch/log_prob_abs_diff_max"] == pytest.approx(0.7, rel=1e-5)
    assert not any(name.startswith("mismatch/") for name in plain.metrics(outputs, columns))
    without = TokenColumns(divergence_weight=weight)
    assert not any(name.startswith("mismatch/") for name in measuring.metrics(outputs, without))


def test_grpo_reports_mismatch_of_the_old_weights():
    weight = torch.full((5,), 0.2)
    columns = TokenColumns(
        policy_weight=weight, advantages=torch.ones(5), old_log_probs=LOG_PROBS, rollout_log_probs=rollout()
    )
    outputs = TokenOutputs(log_probs=LOG_PROBS + 3.0)  # after an update
    metrics = values(grpo_objective(Surrogate(), kl_loss_coef=0).metrics(outputs, columns))
    expected = values(mismatch_metrics(LOG_PROBS, rollout(), torch.ones(5, dtype=torch.bool)))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
