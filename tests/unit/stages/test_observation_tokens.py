"""Tokens of an environment have no loss, no KL and no gradient: bit for bit, in every objective."""

import dataclasses

import numpy as np
import pytest
import torch
from toy_models import VOCAB, ToyModel, model_log_probs, response_log_probs

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.kl.teachers import HiddenStates
from megatron_s2d.objectives.distill import divergence_objective, policy_distillation_objective, sft_objective
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.objectives.terms import LOSS_AGG_MODES
from megatron_s2d.records import Sample
from megatron_s2d.stages.grpo import with_advantages
from megatron_s2d.stages.policy_loss import policy_loss_weights

# prompt, turn, observation, turn: lengths of three episodes
PARTS = [(2, 3, 2, 2), (3, 1, 4, 3), (1, 2, 1, 1)]
OFF_POLICY = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "on_policy": False}


def episodes(student: ToyModel) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for number, lengths in enumerate(PARTS):
        mask = np.repeat([False, True, False, True], lengths)
        arrays = {
            name: np.where(mask, rng.normal(size=len(mask)) - 2.0, 0.0).astype(np.float32)
            for name in ("rollout_log_probs", "old_log_probs", "teacher_log_probs", "reference_log_probs")
        }
        sample = Sample(
            id=f"s{number}", prompt_id=f"p{number}", group_id="g", domain="math", seed=0,
            token_ids=rng.integers(2, VOCAB, size=len(mask)), response_mask=mask, temperature=1.0,
            finish_reason="stop", reward=float(number % 2), verifier_label="x", **arrays,
        )  # fmt: skip
        scores = student.score([sample])[0] + 0.05 * rng.normal(size=len(mask)).astype(np.float32)
        samples.append(dataclasses.replace(sample, old_log_probs=np.where(mask, scores, 0.0).astype(np.float32)))
    stage = GrpoConfig(role="rl", init="s", prompts="p", steps=1)
    return with_advantages(samples, stage)[0]


def spoiled(sample: Sample) -> Sample:
    """The episode with other numbers at all tokens that the model did not sample; its tokens are the same."""
    arrays = {
        name: np.where(sample.response_mask, getattr(sample, name), -7.5).astype(np.float32)
        for name in ("rollout_log_probs", "old_log_probs", "teacher_log_probs", "reference_log_probs", "advantages")
    }
    return dataclasses.replace(sample, **arrays)


def gradients(student, samples, objective, column, weights, *, spoils_labels=False, teacher=None):
    batches = student.pack(samples, {column: weights})
    if spoils_labels:
        batches = [
            dataclasses.replace(
                batch, labels=torch.where(batch.response_mask, batch.labels, (batch.labels + 5) % VOCAB)
            )
            for batch in batches
        ]
    teachers = None
    if teacher is not None:
        hidden = [teacher.embedding[batch.token_ids.t().reshape(-1)].detach() for batch in batches]
        teachers = [HiddenStates(states, teacher.head.detach()) for states in hidden]
    student.forward_backward(batches, objective, teachers, num_tokens=sum(batch.num_tokens for batch in batches))
    return student.updates[-1]


OBJECTIVES = {
    "grpo": (grpo_objective(Surrogate(**OFF_POLICY), kl_loss_coef=0.1, entropy_coeff=0.01), "policy_weight"),
    "tis": (grpo_objective(Surrogate(**OFF_POLICY, rollout_correction="tis")), "policy_weight"),
    "gspo": (grpo_objective(Surrogate(**OFF_POLICY, policy_loss="gspo"), kl_loss_coef=0.0), "policy_weight"),
    "cispo": (grpo_objective(Surrogate(**OFF_POLICY, policy_loss="cispo"), kl_loss_coef=0.0), "policy_weight"),
    "opd": (policy_distillation_objective(Surrogate(**OFF_POLICY)), "policy_weight"),
    "cross_entropy": (sft_objective(), "supervised_weight"),
    "reverse_kl": (divergence_objective("reverse_kl", measure_rollouts=True), "divergence_weight"),
    "forward_kl": (divergence_objective("forward_kl"), "divergence_weight"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_number_of_an_observation_reaches_a_gradient(name):
    objective, column = OBJECTIVES[name]
    student, teacher = ToyModel(1), ToyModel(2)
    samples = episodes(student)
    teacher = teacher if column == "divergence_weight" else None
    weights = policy_loss_weights(samples, OpdConfig(role="a", init="s", teacher="t", prompts="p", steps=1))
    plain = gradients(student, samples, objective, column, weights, teacher=teacher)
    assert plain.head_gradient.abs().max() > 1e-3
    everywhere = [np.where(sample.response_mask, weight, 9.0) for sample, weight in zip(samples, weights, strict=True)]
    others = {
        "weights": gradients(student, samples, objective, column, everywhere, teacher=teacher),
        "arrays": gradients(student, list(map(spoiled, samples)), objective, column, weights, teacher=teacher),
        "labels": gradients(student, samples, objective, column, weights, spoils_labels=True, teacher=teacher),
    }
    for what, other in others.items():
        assert torch.equal(other.head_gradient, plain.head_gradient), what
        assert torch.equal(other.embedding_gradient, plain.embedding_gradient), what
        assert other.metrics == plain.metrics, what


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_normalisers_count_the_tokens_of_the_model_only(mode):
    """The loss of episodes against the sum over the model's tokens, written out in float64."""
    student = ToyModel(1)
    samples = episodes(student)
    stage = GrpoConfig(
        role="rl", init="s", prompts="p", steps=1, loss_agg_mode=mode, sampling={"max_response_length": 12}
    )
    lengths = [turn + second for _, turn, _, second in PARTS]
    divisors = {
        "token_mean": [sum(lengths)] * 3,
        "seq_mean_token_mean": [3 * length for length in lengths],
        "seq_mean_token_sum_norm": [3 * 12] * 3,
    }[mode]
    objective = grpo_objective(Surrogate(on_policy=True), kl_loss_coef=0.0)
    update = gradients(student, samples, objective, "policy_weight", policy_loss_weights(samples, stage))
    embedding, head = (table.clone().requires_grad_() for table in (update.embedding, update.head))
    total = 0.0
    for sample, divisor in zip(samples, divisors, strict=True):
        advantage = float(sample.advantages[sample.response_mask][0])
        ratio = torch.exp(response_log_probs(embedding, head, sample) - model_log_probs(student, sample))
        total = total - advantage * ratio.sum() / divisor
    for result, wanted in zip(
        (update.embedding_gradient, update.head_gradient), torch.autograd.grad(total, (embedding, head)), strict=True
    ):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-8)
    assert update.loss == pytest.approx(total.item(), rel=1e-5)
