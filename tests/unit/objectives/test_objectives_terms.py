"""Token weights, metrics and sums of terms do not depend on the partition of tokens among ranks and micro-batches."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import weighted_sum

from megatron_s2d.columns import TokenColumns
from megatron_s2d.errors import UserError
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.objectives.distill import divergence_objective, policy_distillation_objective, sft_objective
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.objectives.terms import (
    Metric,
    Objective,
    ResponseCounts,
    merge_metrics,
    pack_metrics,
    token_weights,
    unpack_metrics,
)


def random_batch(tokens=40, seed=0):
    """Return float64 outputs and columns; a third of the tokens each is policy, anchor and inactive."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return scale * torch.randn(tokens, generator=generator, dtype=torch.float64)

    log_probs = -normal().abs()
    third = torch.arange(tokens) % 3
    outputs = TokenOutputs(log_probs=log_probs, entropy=normal().abs(), reverse_kl=normal().abs())
    columns = TokenColumns(
        old_log_probs=log_probs + normal(0.3),
        rollout_log_probs=log_probs + normal(0.3),
        advantages=normal(),
        teacher_log_probs=log_probs + normal(),
        reference_log_probs=log_probs + normal(0.3),
        policy_weight=normal().abs() * (third == 0),
        supervised_weight=normal().abs() * (third == 1),
        divergence_weight=normal().abs() * (third == 0),
    )
    return outputs, columns


def rows_of(outputs, rows):
    values = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return TokenOutputs(**{name: None if value is None else value[rows] for name, value in values.items()})


def everything():
    policy = policy_distillation_objective(
        Surrogate(clip_ratio_c=3.0, rollout_correction="tis", rollout_correction_cap=1.2)
    )
    return weighted_sum((1.0, policy), (0.5, sft_objective()), (0.25, divergence_objective("reverse_kl")))


def definition(loss_agg_mode, lengths, values, limit):
    """Return the mean over responses or tokens by its definition."""
    responses = [response for response in values if len(response)]
    if loss_agg_mode == "token_mean":
        return np.concatenate(responses).mean()
    if loss_agg_mode == "seq_mean_token_mean":
        return np.mean([response.mean() for response in responses])
    return np.mean([response.sum() / limit for response in responses])


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@pytest.mark.parametrize("loss_agg_mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
@given(lengths=LENGTHS, seed=st.integers(0, 2**16), parts=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_every_partition_gives_the_same_mean(loss_agg_mode, lengths, seed, parts):
    random = np.random.default_rng(seed)
    lengths = np.array(lengths)
    values = [random.normal(size=length) for length in lengths]
    owner = random.integers(0, parts, size=len(lengths))
    # The counts of all ranks are summed first, then every rank computes the weights of its tokens.
    counts = ResponseCounts(0, 0)
    for part in range(parts):
        counts = counts + ResponseCounts.of(lengths[owner == part])
    total = 0.0
    for part in range(parts):
        local = np.flatnonzero(owner == part)
        weights = token_weights(lengths[local], loss_agg_mode, counts, 9)
        total += sum(weight * values[i].sum() for weight, i in zip(weights, local, strict=True))
    assert total == pytest.approx(definition(loss_agg_mode, lengths, values, 9), rel=1e-12, abs=1e-12)


def test_weights_by_hand():
    counts = ResponseCounts.of([2, 0, 4])
    assert counts == ResponseCounts(tokens=6, sequences=2)
    assert token_weights([2, 0, 4], "token_mean", counts).tolist() == [1 / 6, 0.0, 1 / 6]
    assert token_weights([2, 0, 4], "seq_mean_token_mean", counts).tolist() == [1 / 4, 0.0, 1 / 8]
    assert token_weights([2, 0, 4], "seq_mean_token_sum_norm", counts, 10).tolist() == [1 / 20, 0.0, 1 / 20]


def test_weights_refuse_invalid_arguments():
    counts = ResponseCounts.of([3])
    with pytest.raises(ValueError, match="token_mean, seq_mean_token_mean"):
        token_weights([3], "mean", counts)
    with pytest.raises(UserError, match="max_response_length"):
        token_weights([3], "seq_mean_token_sum_norm", counts)
    with pytest.raises(ValueError, match="cannot be part of"):
        token_weights([3, 1], "token_mean", counts)


def test_mean_of_micro_batch_means_differs():
    """The global normaliser avoids this difference."""
    values = [np.array([1.0]), np.array([0.0, 0.0, 0.0])]
    counts = ResponseCounts.of([1, 3])
    weights = token_weights([1, 3], "token_mean", counts)
    exact = sum(weight * response.sum() for weight, response in zip(weights, values, strict=True))
    assert exact == 0.25 and np.mean([response.mean() for response in values]) == 0.5


@given(seed=st.integers(0, 2**16), parts=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_loss_gradient_and_metrics_do_not_depend_on_the_partition(seed, parts):
    objective = everything()
    outputs, columns = random_batch(seed=seed % 7)
    owner = torch.from_numpy(np.random.default_rng(seed).integers(0, parts, size=40))

    full = outputs.log_probs.clone().requires_grad_()
    loss = objective.token_loss(dataclasses.replace(outputs, log_probs=full), columns).sum()
    loss.backward()
    expected = objective.metrics(outputs, columns)

    leaf = outputs.log_probs.clone().requires_grad_()
    partial_loss, partial_metrics = 0.0, []
    for part in range(parts):
        rows = torch.nonzero(owner == part).squeeze(-1)  # may be empty
        outputs_of_part = rows_of(dataclasses.replace(outputs, log_probs=leaf), rows)
        partial_loss = partial_loss + objective.token_loss(outputs_of_part, columns.select(rows)).sum()
        partial_metrics.append(objective.metrics(rows_of(outputs, rows), columns.select(rows)))
    partial_loss.backward()
    torch.testing.assert_close(partial_loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, full.grad, rtol=1e-12, atol=0)
    merged = merge_metrics(partial_metrics)
    assert merged.keys() == expected.keys()
    for name, metric in expected.items():
        assert merged[name].reduction == metric.reduction
        assert merged[name].value() == pytest.approx(metric.value(), rel=1e-12, abs=1e-12), name
    assert expected["loss"].value() == pytest.approx(loss.item(), rel=1e-12)
    assert sum(expected[f"loss/{term.name}"].value() for term in objective.terms) == pytest.approx(loss.item())


def test_metrics_survive_packing_for_two_all_reduces():
    outputs, columns = random_batch()
    ranks = [torch.arange(0, 11), torch.arange(11, 40), torch.arange(0)]
    parts = [everything().metrics(rows_of(outputs, rows), columns.select(rows)) for rows in ranks]
    packed = [pack_metrics(part) for part in parts]
    sums = torch.stack([sums for sums, _ in packed]).sum(0)
    maxima = torch.stack([maxima for _, maxima in packed]).amax(0)
    expected = merge_metrics(parts)
    for part in parts:
        reduced = unpack_metrics(part, sums, maxima)
        assert {name: metric.value() for name, metric in reduced.items()} == pytest.approx(
            {name: metric.value() for name, metric in expected.items()}
        )
    assert [part.shape for part in pack_metrics({})] == [(0,), (0,)]


def test_metric_reductions_by_hand():
    values, active = torch.tensor([1.0, -4.0, 7.0]), torch.tensor([True, True, False])
    assert Metric.over(values, active).value() == -1.5
    assert Metric.over(values, active, "sum").value() == -3.0
    assert Metric.over(values, active, "max").value() == 1.0
    assert Metric.over(values, active, "min").value() == -4.0
    assert Metric.over(values > 0, active).value() == 0.5
    nothing = torch.zeros(3, dtype=torch.bool)
    assert math.isnan(Metric.over(values, nothing).value())
    assert Metric.over(values, nothing, "max").value() == -math.inf
    with pytest.raises(ValueError, match="cannot be combined"):
        Metric.over(values, active).combine(Metric.over(values, active, "max"))


def test_values_of_inactive_tokens_have_no_influence():
    """Anchor tokens have no old log-probabilities; their NaN must not reach the loss, its gradient or a metric."""
    grpo = grpo_objective(Surrogate(rollout_correction="mask"), kl_loss_coef=0.1)
    objective = weighted_sum((1.0, grpo), (1.0, sft_objective()))
    outputs, columns = random_batch()
    inactive = columns.policy_weight == 0
    spoiled = {
        name: torch.where(inactive, bad, getattr(columns, name))
        for name, bad in {
            "old_log_probs": math.nan, "rollout_log_probs": -math.inf, "advantages": math.nan,
            "reference_log_probs": math.inf,
        }.items()
    }  # fmt: skip
    results = []
    for inputs in (columns, dataclasses.replace(columns, **spoiled)):
        leaf = outputs.log_probs.clone().requires_grad_()
        loss = objective.token_loss(dataclasses.replace(outputs, log_probs=leaf), inputs)
        loss.sum().backward()
        metrics = {name: metric.value() for name, metric in objective.metrics(outputs, inputs).items()}
        results.append((loss.detach(), leaf.grad, metrics))
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=0, atol=0)
    assert results[1][2] == results[0][2] and all(math.isfinite(value) for value in results[0][2].values())
    assert (results[0][0] != 0).sum() == (columns.policy_weight != 0).sum() + (columns.supervised_weight != 0).sum()


def test_zero_advantages_count_and_zero_weights_do_not():
    outputs, columns = random_batch()
    objective = grpo_objective(kl_loss_coef=0)
    counted = int((columns.policy_weight != 0).sum())
    muted = dataclasses.replace(columns, advantages=torch.zeros(40, dtype=torch.float64))
    metrics = objective.metrics(outputs, muted)
    assert metrics["ratio_mean"].denominator == counted and metrics["loss"].value() == 0.0
    assert objective.metrics(outputs, columns)["entropy"].denominator == counted


def test_missing_column_is_reported_with_its_step():
    outputs, columns = random_batch()
    with pytest.raises(UserError, match="needs reference_log_probs: run scoring by the reference"):
        grpo_objective().token_loss(outputs, dataclasses.replace(columns, reference_log_probs=None))
    with pytest.raises(UserError, match="supervised_weight"):
        sft_objective().metrics(outputs, dataclasses.replace(columns, supervised_weight=None))


def test_needs_and_columns_of_objectives():
    assert grpo_objective().needs == {"log_probs", "entropy"}
    assert grpo_objective().columns == {"old_log_probs", "advantages", "reference_log_probs", "policy_weight"}
    assert grpo_objective(Surrogate(on_policy=True), kl_loss_coef=0).columns == {"advantages", "policy_weight"}
    assert "rollout_log_probs" in grpo_objective(Surrogate(rollout_correction="tis")).columns
    assert divergence_objective("jsd").needs == {"jsd", "entropy"}
    assert divergence_objective("jsd").columns == {"divergence_weight"}
    assert everything().columns == {
        "old_log_probs", "rollout_log_probs", "advantages", "teacher_log_probs",
        "policy_weight", "supervised_weight", "divergence_weight",
    }  # fmt: skip


def test_coefficient_scales_a_term():
    outputs, columns = random_batch()
    single = sft_objective().token_loss(outputs, columns)
    assert torch.equal(weighted_sum((0.5, sft_objective())).token_loss(outputs, columns), 0.5 * single)


def test_objective_needs_distinct_terms():
    with pytest.raises(UserError, match="each term once"):
        Objective((*sft_objective().terms, *sft_objective().terms))
    with pytest.raises(UserError, match="at least one term"):
        Objective(())


def test_columns_must_have_one_shape():
    with pytest.raises(ValueError, match="one shape"):
        TokenColumns(advantages=torch.zeros(3), policy_weight=torch.zeros(4))
    picked = TokenColumns(advantages=torch.arange(5.0)).select(torch.tensor([4, 1]))
    assert picked.advantages.tolist() == [4.0, 1.0] and picked.policy_weight is None


def test_kl_is_among_the_metrics():
    outputs, columns = random_batch()
    assert "kl" not in sft_objective().metrics(outputs, columns)
    metrics = everything().metrics(outputs, columns)
    assert {"ratio_mean", "clip_fraction_dual", "mismatch/k3_kl", "cross_entropy", "reverse_kl"} <= metrics.keys()
    active = columns.policy_weight != 0
    expected = (outputs.log_probs - columns.teacher_log_probs)[active].mean()
    assert metrics["kl"].value() == metrics["teacher_kl"].value() == pytest.approx(float(expected))
