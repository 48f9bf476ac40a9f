"""GSPO, CISPO and the entropy bonus: value and gradient through full logits in float64 against their definitions."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from megatron_s2d.columns import TokenColumns
from megatron_s2d.data.packing import pack
from megatron_s2d.errors import UserError
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.objectives.policy import Surrogate, cispo_loss, grpo_objective
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.records import Sample
from megatron_s2d.train.sequence_ratios import with_sequence_log_ratios

LENGTHS = (3, 1, 7, 4, 6)
ADVANTAGES = (1.0, -2.0, 0.5, -0.7, 1.5)
SEQUENCE_LOG_RATIOS = (
    0.01,
    -0.01,
    1e-4,
    -2e-4,
    -0.02,
)  # clipped at 1 + 4e-4 and at 1 - 3e-4; inside twice; not clipped
ROWS, VOCABULARY, WIDTH = sum(LENGTHS), 13, 5
GSPO = Surrogate(policy_loss="gspo", clip_ratio_low=3e-4, clip_ratio_high=4e-4)
CISPO = Surrogate(policy_loss="cispo", clip_ratio_low=0.3, clip_ratio_high=0.5)


def log_probs_of(z, target):
    return torch.log_softmax(z, -1).gather(1, target[:, None]).squeeze(1)


@pytest.fixture(scope="module")
def problem():
    """Hidden states, output weight, targets, and the log-probabilities before the update."""
    generator = torch.Generator().manual_seed(2)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    hidden, weight = normal(ROWS, WIDTH), normal(VOCABULARY, WIDTH)
    target = torch.arange(ROWS) * 5 % VOCABULARY
    noise = [part - part.mean() for part in (0.6 * normal(ROWS)).split(LENGTHS)]
    ratios = torch.cat([part + mean for part, mean in zip(noise, SEQUENCE_LOG_RATIOS, strict=True)])
    return hidden, weight, target, log_probs_of(hidden @ weight.T, target) - ratios


def gspo_definition(z, target, old, low, high):
    """Equations 5 to 7 of arXiv 2507.18071: one length-normalised ratio for each response, clipped as a whole."""
    new = log_probs_of(z, target)
    losses = []
    for mine, before, advantage in zip(new.split(LENGTHS), old.split(LENGTHS), ADVANTAGES, strict=True):
        ratio = torch.exp((mine - before).sum() / len(mine))
        losses.append(-torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
    return torch.stack(losses).mean()


def cispo_definition(z, target, old, low, high):
    """Equations 4 and 5 of arXiv 2506.13585: a mean over all tokens of the batch."""
    new = log_probs_of(z, target)
    ratio = (new - old).exp().detach().clamp(1 - low, 1 + high)
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    return -(ratio * advantages * new).sum() / ROWS


def entropy_definition(z, weights):
    log_p = torch.log_softmax(z, -1)
    return (weights * -(log_p.exp() * log_p).sum(-1)).sum()


def columns_of(old, loss_agg_mode, log_ratios=SEQUENCE_LOG_RATIOS):
    weights = token_weights(LENGTHS, loss_agg_mode, ResponseCounts.of(LENGTHS))
    lengths = torch.tensor(LENGTHS)
    by_sequence = {"policy_weight": weights, "advantages": ADVANTAGES, "sequence_log_ratios": log_ratios}
    columns = {
        name: torch.as_tensor(values, dtype=torch.float64).repeat_interleave(lengths)
        for name, values in by_sequence.items()
    }
    return TokenColumns(old_log_probs=old, **columns)


@pytest.mark.parametrize(
    ("surrogate", "definition", "loss_agg_mode"),
    [
        (GSPO, gspo_definition, "seq_mean_token_mean"),
        (CISPO, cispo_definition, "token_mean"),
        (dataclasses.replace(CISPO, clip_ratio_low=1.0), cispo_definition, "token_mean"),
    ],
)
@pytest.mark.parametrize("entropy_coeff", [0.0, 0.03, -0.5])
def test_loss_and_gradients_are_those_of_the_definition(problem, surrogate, definition, loss_agg_mode, entropy_coeff):
    hidden, weight, target, old = problem
    columns = columns_of(old, loss_agg_mode)
    objective = grpo_objective(surrogate, kl_loss_coef=0, entropy_coeff=entropy_coeff)
    mine = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, outputs = linear_divergence(
        *mine, shard=VocabShard.unsharded(VOCABULARY), outputs=tuple(sorted(objective.needs)), target_ids=target,
        chunk_bytes=4 * VOCABULARY * 8,
        token_loss=lambda outputs, rows: objective.token_loss(outputs, columns.select(rows)),
    )  # fmt: skip
    loss.backward()

    dense = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    z = dense[0] @ dense[1].T
    expected = definition(z, target, old, surrogate.clip_ratio_low, surrogate.clip_ratio_high)
    expected = expected - entropy_coeff * entropy_definition(z, columns.policy_weight)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(mine, dense, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-13)
        assert float(one.grad.norm()) > 1e-2
    metrics = objective.metrics(outputs, columns)
    assert metrics["loss"].value() == pytest.approx(loss.item(), rel=1e-10)
    assert ("loss/entropy" in metrics) == (entropy_coeff != 0)
    assert metrics["entropy"].value() > 0.1


def test_responses_beyond_the_range_of_gspo_get_no_gradient_and_are_counted(problem):
    hidden, weight, target, old = problem
    columns, objective = columns_of(old, "seq_mean_token_mean"), grpo_objective(GSPO, kl_loss_coef=0)
    leaf = log_probs_of(hidden @ weight.T, target).requires_grad_()
    objective.token_loss(TokenOutputs(log_probs=leaf), columns).sum().backward()
    moves = [bool((part != 0).all()) for part in leaf.grad.split(LENGTHS)]
    stays = [bool((part == 0).all()) for part in leaf.grad.split(LENGTHS)]
    # A positive advantage above the range, a negative one below it; the last is below it with a positive one.
    assert moves == [False, False, True, True, True] and stays == [True, True, False, False, False]
    metrics = objective.metrics(TokenOutputs(log_probs=leaf.detach()), columns)
    assert metrics["clip_fraction_high"].value() == pytest.approx(LENGTHS[0] / ROWS)
    assert metrics["clip_fraction_low"].value() == pytest.approx(LENGTHS[1] / ROWS)
    assert metrics["ratio_max"].value() == pytest.approx(np.exp(0.01), rel=1e-12)
    assert metrics["approx_kl"].value() > 0.05  # of the tokens, whose ratios spread far more


def test_float32_resolves_the_range_of_gspo(problem):
    """A ratio is added, not subtracted from log-probabilities: 1e-4 beside -20 would lose its digits."""
    objective = grpo_objective(GSPO, kl_loss_coef=0)
    columns = TokenColumns(
        old_log_probs=torch.full((1,), -20.0),
        advantages=torch.ones(1),
        policy_weight=torch.ones(1),
        sequence_log_ratios=torch.full((1,), 1e-4),
    )
    loss = objective.token_loss(TokenOutputs(log_probs=torch.full((1,), -21.0)), columns)
    assert float(loss) == pytest.approx(-np.exp(1e-4), abs=1.5e-7)


def test_cispo_by_hand_and_far_ratios():
    log_probs = torch.tensor([0.5, 4.0, 0.1, 1e3], dtype=torch.float64).requires_grad_()
    log_ratio = torch.tensor([2.0, 4.0, 0.1, 1.0], dtype=torch.float64).log()
    log_ratio[3] = 2000.0  # its exponential overflows
    advantages = torch.tensor([1.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    loss = cispo_loss(log_probs, log_ratio, advantages, dataclasses.replace(CISPO, clip_ratio_high=1.5))
    assert loss.tolist() == pytest.approx([-2 * 0.5, 2.5 * 4, -0.7 * 0.1, -2.5 * 2 * 1e3])
    loss.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([-2, 2.5, -0.7, -5])  # clipped tokens have a gradient, too
    with pytest.raises(UserError, match="carries a gradient"):
        cispo_loss(log_probs, log_ratio, advantages.clone().requires_grad_(), CISPO)


@pytest.mark.parametrize("policy_loss", ["gspo", "cispo"])
def test_on_policy_all_losses_have_the_gradient_of_reinforce(problem, policy_loss):
    hidden, weight, target, _ = problem
    slopes = {}
    for name in ("grpo", policy_loss):
        surrogate = Surrogate(policy_loss=name, on_policy=True)
        columns = dataclasses.replace(columns_of(None, "token_mean"), sequence_log_ratios=None)
        leaf = log_probs_of(hidden @ weight.T, target).requires_grad_()
        objective = grpo_objective(surrogate, kl_loss_coef=0)
        assert objective.columns == {"advantages", "policy_weight"}
        objective.token_loss(TokenOutputs(log_probs=leaf), columns).sum().backward()
        slopes[name] = leaf.grad
    assert torch.equal(slopes["grpo"], slopes[policy_loss]) and slopes["grpo"].abs().sum() > 0.1


def test_importance_weights_multiply_cispo_and_not_the_entropy(problem):
    hidden, weight, target, old = problem
    outputs = TokenOutputs(log_probs=log_probs_of(hidden @ weight.T, target), entropy=torch.ones(ROWS).double())
    columns = dataclasses.replace(columns_of(old, "token_mean"), rollout_log_probs=old - np.log(1.25))
    losses = {}
    for mode in ("off", "tis"):
        surrogate = dataclasses.replace(CISPO, rollout_correction=mode, rollout_correction_cap=2.0)
        losses[mode] = grpo_objective(surrogate, kl_loss_coef=0, entropy_coeff=0.1).token_loss(outputs, columns)
    bonus = -0.1 * columns.policy_weight
    torch.testing.assert_close(losses["tis"] - bonus, 1.25 * (losses["off"] - bonus))


@pytest.mark.parametrize("packed", [False, True])
def test_ratios_of_responses_come_from_their_own_tokens(packed):
    """Also where responses are interleaved in the batch, and where the mask has a gap (tokens of an environment)."""
    rng = np.random.default_rng(1)
    masks = [np.arange(length) >= 2 for length in (5, 9, 3, 12)]
    masks[3][6:8] = False
    samples, new = [], []
    for index, mask in enumerate(masks):
        old = np.where(mask, rng.normal(size=len(mask)), 0).astype(np.float32)
        new.append(np.where(mask, old + rng.normal(size=len(mask)), 0).astype(np.float32))
        samples.append(
            Sample(
                id=str(index), prompt_id="p", group_id="g", domain="d", seed=0,
                token_ids=rng.integers(0, 9, len(mask)), response_mask=mask, temperature=1.0, finish_reason="stop",
                old_log_probs=old, advantages=np.zeros(len(mask), np.float32),
            )
        )  # fmt: skip
    scored = [
        dataclasses.replace(sample, teacher_log_probs=values) for sample, values in zip(samples, new, strict=True)
    ]
    (batch,) = pack(scored, loss_weights={"policy_weight": np.ones(4)}, max_tokens=64, packed=packed)
    result = with_sequence_log_ratios(batch, batch.columns.teacher_log_probs, None)
    rows = batch.unpack(result.columns.sequence_log_ratios)
    for index, row in zip(batch.indices, rows, strict=True):
        mask = masks[index]
        difference = new[index][mask].astype(np.float64) - samples[index].old_log_probs[mask]
        np.testing.assert_allclose(row.numpy()[mask], difference.mean(), rtol=1e-6)
        assert (row.numpy()[~mask] == 0).all()
