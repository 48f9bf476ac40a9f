"""GRPO from start to end on a toy policy: every update against the formula of methods.md M1 in float64."""

import numpy as np
import pytest
import torch
from toy_models import (
    ToyEngine,
    assert_matches,
    group_advantages,
    log_probs_of,
    model_log_probs,
    response_log_probs,
    rewards_of,
)

GROUP = 3
SETTINGS = {
    "type": "grpo", "init": "student", "prompts": "pool", "steps": 2, "train_batch_size": 4, "num_generations": GROUP,
    "sampling": {"max_response_length": 8, "temperature": 0.7}, "optimizer": {"lr": 0.02},
}  # fmt: skip


def run(workflow, **settings):
    """Return (updates, samples of each step, their rewards, context)."""
    context = workflow.run("rl", **(SETTINGS | settings))
    actor = context.models.trained
    samples = context.rollouts.engines[actor].samples
    tokenizer, prompts = context.inputs.tokenizer, context.inputs.prompts("pool")
    return actor.updates, samples, [rewards_of(batch, prompts, tokenizer) for batch in samples], context


def k3(reference, log_probs):
    return torch.exp(reference - log_probs) - (reference - log_probs) - 1


def test_loss_is_the_policy_gradient_with_a_penalty_to_the_reference(workflow):
    updates, samples, rewards, context = run(workflow, kl_loss_coef=0.1, reference="reference")
    assert len(updates) == 2 and context.models.trained.total_updates == 2
    for update, batch, batch_rewards in zip(updates, samples, rewards, strict=True):
        assert 0 < batch_rewards.mean() < 1
        advantages = group_advantages(batch_rewards, GROUP)
        num_tokens = sum(sample.response_length for sample in batch)

        def loss(embedding, head, batch=batch, advantages=advantages, num_tokens=num_tokens):
            total = 0.0
            for sample, advantage in zip(batch, advantages, strict=True):
                log_probs = response_log_probs(embedding, head, sample)
                ratio = torch.exp(log_probs - log_probs.detach())
                penalty = k3(model_log_probs(workflow.models["reference"], sample), log_probs)
                total = total + (-advantage * ratio + 0.1 * penalty).sum()
            return total / num_tokens

        assert_matches(update, loss)


def test_every_step_samples_other_prompts_from_the_updated_weights(workflow):
    updates, samples, _, context = run(workflow, kl_loss_coef=0)
    first, second = updates
    for before, after, gradient in (
        (first.embedding, second.embedding, first.embedding_gradient),
        (first.head, second.head, first.head_gradient),
    ):
        torch.testing.assert_close(after, before - 0.2 * gradient)
    for update, batch in zip(updates, samples, strict=True):
        assert len({sample.prompt_id for sample in batch}) == 4 and len({sample.seed for sample in batch}) == 12
        for sample in batch:
            expected = model_log_probs(update, sample).numpy()
            np.testing.assert_allclose(sample.rollout_log_probs[sample.response_mask], expected, atol=1e-6)
    assert not {sample.prompt_id for sample in samples[0]} & {sample.prompt_id for sample in samples[1]}
    assert [{span.version for sample in batch for span in sample.weight_versions} for batch in samples] == [{0}, {1}]
    trained = context.models.trained
    assert context.rollouts.engines[trained].version == 2
    assert all(map(torch.equal, trained.saved, trained.chunks[0]))


def test_the_reference_is_the_start_by_default(workflow):
    (start, update), (_, batch), (_, rewards), _ = run(workflow, kl_loss_coef=0.5)
    advantages = group_advantages(rewards, GROUP)
    num_tokens = sum(sample.response_length for sample in batch)

    def loss(embedding, head):
        total = 0.0
        for sample, advantage in zip(batch, advantages, strict=True):
            log_probs = response_log_probs(embedding, head, sample)
            penalty = k3(model_log_probs(start, sample), log_probs)
            total = total + (-advantage * torch.exp(log_probs - log_probs.detach()) + 0.5 * penalty).sum()
        return total / num_tokens

    assert_matches(update, loss)


def clipped_loss(pairs, old, divisor, low=0.2, high=0.2, dual=None):
    """Return the clipped surrogate of (sample, advantage) ``pairs`` against the model ``old``, over ``divisor``."""

    def loss(embedding, head):
        total = 0.0
        for sample, advantage in pairs:
            ratio = torch.exp(response_log_probs(embedding, head, sample) - model_log_probs(old, sample))
            value = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            if advantage < 0 and dual is not None:
                value = torch.maximum(value, torch.tensor(dual * advantage))
            total = total - value.sum()
        return total / divisor

    return loss


def test_second_mini_batch_is_clipped_around_the_weights_that_sampled(workflow):
    """Dr. GRPO with a length penalty, masked truncated responses, and all three clip ranges."""
    limit, buffer = 8, 5
    updates, samples, rewards, _ = run(
        workflow, steps=1, num_mini_batches=2, kl_loss_coef=0, norm_adv_by_std=False, truncated_responses="mask",
        loss_agg_mode="seq_mean_token_sum_norm", clip_ratio_low=0.1, clip_ratio_high=0.15, clip_ratio_c=1.2,
        overlong_buffer={"len": buffer, "penalty_factor": 0.6}, optimizer={"lr": 0.6},
    )  # fmt: skip
    (batch,), (batch_rewards,) = samples, rewards
    lengths = np.array([sample.response_length for sample in batch])
    assert lengths.max() > limit - buffer and any(sample.finish_reason == "length" for sample in batch)
    penalty = 0.6 * np.clip((lengths - (limit - buffer)) / buffer, 0, 1)
    advantages = group_advantages(batch_rewards - penalty, GROUP, by_std=False)
    assert len(updates) == 2
    for index, update in enumerate(updates):
        half = slice(6 * index, 6 * index + 6)
        pairs = [pair for pair in zip(batch[half], advantages[half], strict=True) if pair[0].finish_reason == "stop"]
        assert_matches(update, clipped_loss(pairs, updates[0], len(pairs) * limit, 0.1, 0.15, 1.2))
    clipped = [updates[1].metrics[f"clip_fraction_{name}"] for name in ("low", "high", "dual")]
    assert updates[0].metrics["ratio_max"] == pytest.approx(1.0, abs=1e-5) and min(clipped) > 0


def gspo_loss(pairs, old, low, high):
    """Return the mean over responses of the surrogate of their geometric mean ratios to the model ``old``."""

    def loss(embedding, head):
        total = 0.0
        for sample, advantage in pairs:
            ratio = (response_log_probs(embedding, head, sample) - model_log_probs(old, sample)).mean().exp()
            total = total - torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        return total / len(pairs)

    return loss


def cispo_loss(pairs, old, high, entropy_coeff):
    """Return the mean over tokens of -min(ratio, 1 + high) A log pi, the ratio detached, minus the entropy bonus."""

    def loss(embedding, head):
        total, num_tokens = 0.0, 0
        for sample, advantage in pairs:
            log_probs = response_log_probs(embedding, head, sample)
            ratio = (log_probs.detach() - model_log_probs(old, sample)).exp().clamp(max=1 + high)
            full = log_probs_of(embedding, head, sample.token_ids, sample.temperature)[sample.prompt_length - 1 :]
            total = total - (ratio * advantage * log_probs).sum() + entropy_coeff * (full.exp() * full).sum()
            num_tokens += len(log_probs)
        return total / num_tokens

    return loss


@pytest.mark.parametrize("policy_loss", ["gspo", "cispo"])
def test_policy_losses_of_the_second_mini_batch(workflow, policy_loss):
    settings = {
        "gspo": {"optimizer": {"lr": 1e-4}},
        "cispo": {"entropy_coeff": 0.2, "clip_ratio_high": 0.1, "optimizer": {"lr": 0.1}},
    }[policy_loss]
    updates, (batch,), (rewards,), _ = run(
        workflow,
        steps=1,
        num_mini_batches=2,
        kl_loss_coef=0,
        policy_loss=policy_loss,
        **settings,
    )
    pairs = list(zip(batch, group_advantages(rewards, GROUP), strict=True))
    for update, part in zip(updates, (pairs[:6], pairs[6:]), strict=True):
        gspo = gspo_loss(part, updates[0], 3e-4, 4e-4)
        assert_matches(update, gspo if policy_loss == "gspo" else cispo_loss(part, updates[0], 0.1, 0.2))
    clipped = [updates[1].metrics[f"clip_fraction_{name}"] for name in ("low", "high")]
    assert 0 < sum(clipped) < 1, clipped


def test_a_second_pass_takes_the_groups_in_another_order(workflow):
    """All four updates are compared with the weights that sampled."""
    updates, (batch,), (rewards,), context = run(
        workflow, steps=1, num_mini_batches=2, ppo_epochs=2, kl_loss_coef=0, optimizer={"lr": 0.05}
    )
    assert len(updates) == context.models.trained.total_updates == 4
    pairs = list(zip(batch, group_advantages(rewards, GROUP), strict=True))
    groups = [pairs[start : start + GROUP] for start in range(0, 12, GROUP)]
    order = np.random.default_rng([context.seed, 1, 1]).permutation(4)
    assert {*order[:2]} not in ({0, 1}, {2, 3})
    for update, members in zip(updates, ([0, 1], [2, 3], order[:2], order[2:]), strict=True):
        part = [pair for index in members for pair in groups[index]]
        assert_matches(update, clipped_loss(part, updates[0], sum(sample.response_length for sample, _ in part)))


def test_importance_weights_correct_an_engine_that_samples_from_another_distribution(workflow, monkeypatch):
    monkeypatch.setattr(ToyEngine, "shift", -0.4)
    correction = {"mode": "tis", "cap": 1.3}
    (update,), (batch,), (rewards,), _ = run(workflow, steps=1, kl_loss_coef=0, rollout_correction=correction)
    advantages = group_advantages(rewards, GROUP)
    num_tokens = sum(sample.response_length for sample in batch)
    weight = min(np.exp(0.4), 1.3)

    def loss(embedding, head):
        pairs = zip(batch, advantages, strict=True)
        return (
            -sum(
                (weight * advantage * torch.exp(log_probs - log_probs.detach())).sum()
                for log_probs, advantage in (
                    (response_log_probs(embedding, head, sample), advantage) for sample, advantage in pairs
                )
            )
            / num_tokens
        )

    assert_matches(update, loss)
    assert update.metrics["importance_ratio_mean"] == pytest.approx(np.exp(0.4), rel=1e-5)
