"""The policy loss against its float64 formula, its gradients, and its metrics by hand."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_s2d.columns import TokenColumns
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.objectives.policy import (
    Surrogate,
    clip_regions,
    clipped_surrogate,
    grpo_objective,
    importance_weight,
    k3,
)

ZERO = torch.zeros(1, dtype=torch.float64)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def as_written(log_probs, old, advantages, low, high, dual):
    """The formula of methods.md M1 in scalar arithmetic."""
    losses = []
    for new, before, advantage in zip(log_probs.tolist(), old.tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(new - before)
        value = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        if dual is not None and advantage < 0:
            value = max(value, dual * advantage)
        losses.append(-value)
    return double(*losses)


@given(
    rows=st.lists(st.tuples(st.floats(-4, 0), st.floats(-2, 2), st.floats(-3, 3)), min_size=1, max_size=20),
    low=st.floats(0.05, 0.6),
    high=st.floats(0.05, 1.0),
    dual=st.none() | st.floats(1.1, 4.0),
)
@settings(max_examples=80, deadline=None)
def test_surrogate_matches_the_formula(rows, low, high, dual):
    log_probs, difference, advantages = double(*rows).T
    old = log_probs - difference
    surrogate = Surrogate(clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=dual)
    losses = clipped_surrogate(log_probs - old, advantages, surrogate)
    torch.testing.assert_close(losses, as_written(log_probs, old, advantages, low, high, dual), rtol=1e-12, atol=1e-12)
    # float32 inputs give float32 outputs; at a clip boundary both sides have the same value.
    single = clipped_surrogate(log_probs.float() - old.float(), advantages.float(), surrogate)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), losses, rtol=1e-5, atol=1e-5)


def test_surrogate_and_slopes_by_hand():
    # Ratios 1, 2, 2, 1/2, 1/2, 8 with advantages 3, 1, -1, 1, -1, -1 at clip 0.2 / 0.28 and dual clip 3.
    log_probs = double(1, 2, 2, 0.5, 0.5, 8).log().requires_grad_()
    advantages = double(3, 1, -1, 1, -1, -1)
    surrogate = Surrogate(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0)
    loss = clipped_surrogate(log_probs, advantages, surrogate)
    torch.testing.assert_close(loss.detach(), double(-3, -1.28, 2, -0.5, 0.8, 3), rtol=1e-12, atol=0)
    loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, double(-3, 0, 2, -0.5, 0, 0), rtol=1e-12, atol=0)
    regions = clip_regions(log_probs.detach(), advantages, surrogate)
    assert regions.high.tolist() == [False, True, False, False, False, False]
    assert regions.low.tolist() == [False, False, False, False, True, False]
    assert regions.dual.tolist() == [False, False, False, False, False, True]


def test_gradcheck_away_from_clip_boundaries():
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(12, generator=generator, dtype=torch.float64)
    log_probs = (old + torch.linspace(-1.03, 1.01, 12, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    for surrogate in (Surrogate(), Surrogate(0.1, 0.4, 1.7)):
        assert torch.autograd.gradcheck(lambda x, s=surrogate: clipped_surrogate(x - old, advantages, s), log_probs)
    assert torch.autograd.gradcheck(lambda x: k3(old - x), log_probs)


def test_overflow_beyond_the_clip_has_zero_gradient():
    log_probs = torch.tensor([200.0, -200.0, 200.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.0])
    loss = clipped_surrogate(log_probs, advantages, Surrogate())
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.2, 0.8, 0.0]))
    assert log_probs.grad.tolist() == [0.0, 0.0, 0.0]


def test_ratio_one_is_the_policy_gradient():
    log_probs = double(-0.3, -1.2).requires_grad_()
    clipped_surrogate(log_probs - log_probs.detach(), double(0.5, -2.0), Surrogate()).sum().backward()
    assert log_probs.grad.tolist() == [-0.5, 2.0]


def test_k3_by_hand_and_for_small_ratios():
    torch.testing.assert_close(k3(double(0, math.log(2), -math.log(2))), double(0, 1 - math.log(2), math.log(2) - 0.5))
    small = torch.tensor([1e-3, -1e-3])
    expected = small.double() ** 2 / 2 + small.double() ** 3 / 6 + small.double() ** 4 / 24
    # exp(d) - d - 1 in float32 is off by tens of times this tolerance.
    torch.testing.assert_close(k3(small).double(), expected, rtol=5e-4, atol=0)
    naive = (small.exp() - small - 1).double()
    assert ((naive - expected).abs() / expected).max() > 0.02


def test_k3_estimates_the_kl_and_pulls_towards_the_reference():
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    reference = torch.log_softmax(torch.linspace(-1, 1, 6, dtype=torch.float64), 0)
    log_probs = torch.log_softmax(logits, 0)
    probs = log_probs.exp().detach()
    estimate = (probs * k3(reference - log_probs)).sum()
    exact = (log_probs.exp() * (log_probs - reference)).sum()
    torch.testing.assert_close(estimate, exact)
    (slope,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((reference.exp() * (reference - log_probs)).sum(), logits)
    torch.testing.assert_close(slope, expected)


def test_importance_weight_by_hand():
    old, rollout = double(0, math.log(3), math.log(8)), ZERO.expand(3)
    modes = {"off": [1, 1, 1], "tis": [1, 3, 5], "mask": [1, 3, 0]}
    for mode, expected in modes.items():
        weights = importance_weight(old.requires_grad_(), rollout, Surrogate(rollout_correction=mode))
        torch.testing.assert_close(weights, double(*expected))
        assert not weights.requires_grad
    assert importance_weight(torch.tensor([500.0]), torch.zeros(1), Surrogate(rollout_correction="tis")).tolist() == [
        5.0
    ]
    assert importance_weight(torch.tensor([500.0]), torch.zeros(1), Surrogate(rollout_correction="mask")).tolist() == [
        0.0
    ]


def example(on_policy=False):
    """Return three active tokens and an inactive one: ratios 1, 2, 1/4; engine ratios 1, 1, 10."""
    log_probs = double(0.5, 0.5, 0.25, 0.9).log()
    old = log_probs - double(1, 2, 0.25, 1).log()
    columns = TokenColumns(
        old_log_probs=None if on_policy else old,
        rollout_log_probs=(log_probs if on_policy else old) - double(1, 1, 10, 1).log(),
        advantages=double(1, 1, -2, 5),
        reference_log_probs=log_probs + double(0, math.log(2), 0, 3),
        policy_weight=double(0.25, 0.25, 0.5, 0),
    )
    return TokenOutputs(log_probs=log_probs, entropy=double(1, 2, 3, 100)), columns


def test_grpo_objective_by_hand():
    outputs, columns = example()
    objective = grpo_objective(Surrogate(rollout_correction="tis", rollout_correction_cap=4.0), kl_loss_coef=0.1)
    penalty = 0.1 * (1 - math.log(2))
    expected = [-0.25, 0.25 * (-1.2 + penalty), 0.5 * 4 * 1.6, 0.0]
    assert objective.token_loss(outputs, columns).tolist() == pytest.approx(expected, rel=1e-12)

    metrics = {name: metric.value() for name, metric in objective.metrics(outputs, columns).items()}
    assert metrics["loss"] == pytest.approx(sum(expected))
    assert metrics["loss/reference"] == pytest.approx(0.25 * penalty)
    assert metrics["kl"] == metrics["reference_kl"] == pytest.approx((1 - math.log(2)) / 3)
    assert metrics["ratio_mean"] == pytest.approx(3.25 / 3)
    assert (metrics["ratio_max"], metrics["ratio_min"]) == pytest.approx((2.0, 0.25))
    assert metrics["clip_fraction_high"] == metrics["clip_fraction_low"] == pytest.approx(1 / 3)
    assert metrics["approx_kl"] == pytest.approx((0 + 1 - math.log(2) + math.log(4) - 0.75) / 3)
    assert metrics["importance_ratio_mean"] == pytest.approx(4.0)
    assert metrics["importance_ratio_max"] == pytest.approx(10.0)
    assert metrics["importance_weight_mean"] == pytest.approx(2.0)
    assert metrics["importance_clipped_fraction"] == pytest.approx(1 / 3)
    assert metrics["mismatch/k3_kl"] == pytest.approx((9 - math.log(10)) / 3)
    assert metrics["entropy"] == pytest.approx(2.0)
    assert metrics["advantage_mean"] == pytest.approx(0.0) and metrics["advantage_abs_mean"] == pytest.approx(4 / 3)


def test_mismatch_is_reported_without_correction():
    outputs, columns = example()
    metrics = grpo_objective(kl_loss_coef=0).metrics(outputs, columns)
    assert metrics["importance_clipped_fraction"].value() == pytest.approx(1 / 3)
    assert metrics["importance_weight_mean"].value() == 1.0
    without = dataclasses.replace(columns, rollout_log_probs=None)
    assert "mismatch/k3_kl" not in grpo_objective(kl_loss_coef=0).metrics(outputs, without)


def test_on_policy_equals_old_log_probs_of_the_same_weights():
    outputs, columns = example(on_policy=True)
    scored = dataclasses.replace(columns, old_log_probs=outputs.log_probs)
    slopes = []
    for on_policy, inputs in ((True, columns), (False, scored)):
        leaf = outputs.log_probs.clone().requires_grad_()
        objective = grpo_objective(Surrogate(on_policy=on_policy, rollout_correction="mask"), kl_loss_coef=0.1)
        objective.token_loss(dataclasses.replace(outputs, log_probs=leaf), inputs).sum().backward()
        slopes.append(leaf.grad)
        assert objective.metrics(outputs, inputs)["ratio_max"].value() == 1.0
    assert torch.equal(*slopes) and slopes[0].abs().sum() > 0
