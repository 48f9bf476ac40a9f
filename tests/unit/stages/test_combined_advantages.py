"""Reward and teacher in one advantage: GRPO with a teacher's term and OPD with the verifier's, against float64."""

import dataclasses

import numpy as np
import pytest
import torch
from toy_models import (
    assert_matches,
    group_advantages,
    model_log_probs,
    response_log_probs,
    response_rows,
    rewards_of,
)

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.stages.grpo import GrpoSource, TeacherAdvantages

GROUP = 3
SETTINGS = {
    "init": "student", "prompts": "pool", "steps": 3, "train_batch_size": 4, "num_generations": GROUP,
    "sampling": {"max_response_length": 8, "temperature": 0.7}, "optimizer": {"lr": 0.02},
}  # fmt: skip
GRPO = SETTINGS | {"type": "grpo", "kl_loss_coef": 0.0}
OPD = SETTINGS | {"type": "opd", "teacher": "teacher", "kl_estimator": "sampled_token"}


def run(workflow, name, **settings):
    """Return (updates, samples of each step, verifier's advantages of each step [b])."""
    context = workflow.run(name, **settings)
    samples = context.rollouts.engines[context.models.trained].samples
    tokenizer, prompts = context.inputs.tokenizer, context.inputs.prompts("pool")
    by_std = (settings.get("reward_advantage") or {}).get("norm_adv_by_std", True)
    rewards = [rewards_of(batch, prompts, tokenizer) for batch in samples]
    return context.models.trained.updates, samples, [group_advantages(r, GROUP, by_std=by_std) for r in rewards]


def surrogate_loss(workflow, update, batch, verifier, verifier_weight, teacher_weight):
    """Return the loss of methods.md M1 with the advantages of M3 as a function of the tables, and the advantages."""
    terms = []
    for sample, advantage in zip(batch, verifier, strict=True):
        teacher = model_log_probs(workflow.models["teacher"], sample) - model_log_probs(update, sample)
        terms.append(verifier_weight * float(advantage) + teacher_weight * teacher)
    num_tokens = sum(sample.response_length for sample in batch)

    def loss(embedding, head):
        total = 0.0
        for sample, advantages in zip(batch, terms, strict=True):
            log_probs = response_log_probs(embedding, head, sample)
            total = total - (advantages * torch.exp(log_probs - log_probs.detach())).sum()
        return total / num_tokens

    return loss, torch.cat(terms)


def test_a_teacher_in_grpo_is_a_second_term_with_a_linear_schedule(workflow):
    settings = {"teacher": "teacher", "weight": 1.5, "final_weight": 0.5}
    updates, samples, verifier = run(workflow, "rl", **GRPO, teacher_advantage=settings)
    assert len(updates) == 3
    for update, batch, advantages, weight in zip(updates, samples, verifier, (1.5, 1.0, 0.5), strict=True):
        assert advantages.any()
        loss, combined = surrogate_loss(workflow, update, batch, advantages, 1.0, weight)
        assert_matches(update, loss)
        assert update.metrics["advantage_abs_mean"] == pytest.approx(combined.abs().mean().item(), rel=1e-5)
        kl = torch.cat([model_log_probs(update, s) - model_log_probs(workflow.models["teacher"], s) for s in batch])
        assert update.metrics["kl"] == update.metrics["teacher_kl"] == pytest.approx(kl.mean().item(), rel=1e-5)


def test_a_reward_in_opd_is_a_second_term_from_nothing_to_its_final_weight(workflow):
    settings = {"weight": 0.0, "final_weight": 2.0, "norm_adv_by_std": False}
    updates, samples, verifier = run(workflow, "opd", **OPD, reward_advantage=settings)
    for update, batch, advantages, weight in zip(updates, samples, verifier, (0.0, 1.0, 2.0), strict=True):
        assert_matches(update, surrogate_loss(workflow, update, batch, advantages, weight, 1.0)[0])


def test_both_stages_are_the_same_method_at_equal_weights(workflow):
    by_grpo, *_ = run(workflow, "rl", **GRPO, teacher_advantage={"teacher": "teacher"})
    by_opd, *_ = run(workflow, "opd", **OPD, reward_advantage={})
    plain, *_ = run(workflow, "plain", **OPD)
    assert [update.loss for update in by_grpo] == [update.loss for update in by_opd]
    assert all(torch.equal(a.head_gradient, b.head_gradient) for a, b in zip(by_grpo, by_opd, strict=True))
    assert plain[0].loss != by_opd[0].loss


def test_opd_takes_the_policy_losses_and_the_entropy_bonus_of_grpo(workflow):
    """CISPO's loss of the second mini-batch with an entropy bonus, against its definition."""
    updates, samples, _ = run(
        workflow, "opd", **(OPD | {"steps": 1, "optimizer": {"lr": 0.5}}), policy_loss="cispo", clip_ratio_high=0.05,
        entropy_coeff=0.3, num_mini_batches=2,
    )  # fmt: skip
    assert len(updates) == 2
    batch = samples[0][2 * GROUP :]

    def loss(embedding, head):
        total = 0.0
        for sample in batch:
            log_probs, old = response_log_probs(embedding, head, sample), model_log_probs(updates[0], sample)
            ratio = torch.exp(log_probs - old).detach().clamp(max=1.05)
            advantages = model_log_probs(workflow.models["teacher"], sample) - old
            rows = response_rows(embedding, head, sample)
            entropy = -(rows.exp() * rows).sum(1)
            total = total - (ratio * advantages * log_probs + 0.3 * entropy).sum()
        return total / sum(sample.response_length for sample in batch)

    assert_matches(updates[1], loss)
    assert updates[1].metrics["clip_fraction_high"] > 0


def test_metrics_leave_out_tokens_without_a_loss(fakes):
    stage = GrpoConfig(
        role="rl", steps=1, truncated_responses="mask", norm_adv_by_std=False,
        teacher_advantage={"teacher": "teacher", "weight": 0.5},
        **{key: SETTINGS[key] for key in ("init", "prompts")},
    )  # fmt: skip
    samples = [fakes.sample("a", 3, reward=1.0), fakes.sample("b", 5, reward=0.0, reason="length")]
    actor, teacher = fakes.Scorer({"a": -2.0, "b": -9.0}), fakes.Scorer({"a": -4.0, "b": -1.0})
    source = GrpoSource(stage, fakes.Buffer(samples), None, 0, TeacherAdvantages(stage, actor, teacher))
    data = source.step(1)
    assert data.mini_batches[0].samples[0].advantages[2:] == pytest.approx([0.5 - 1.0] * 3)
    assert data.metrics["advantage/reward_abs_mean"] == pytest.approx(0.5)
    assert data.metrics["advantage/teacher_abs_mean"] == pytest.approx(1.0)
    assert data.metrics["advantage/conflict_fraction"] == 1.0 and data.metrics["advantage/teacher_weight"] == 0.5
    broken = dataclasses.replace(samples[0], id="n")
    bad = GrpoSource(
        stage, fakes.Buffer([broken, samples[1]]), None, 0,
        TeacherAdvantages(stage, fakes.Scorer({"n": -1.0, "b": -1.0}), fakes.Scorer({"n": np.nan, "b": -1.0})),
    )  # fmt: skip
    with pytest.raises(Exception, match="no finite teacher log-probability"):
        bad.step(1)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (GrpoConfig, {"teacher_advantage": {"teacher": "t", "weight": 0.0}}, "the weight is 0 in all steps"),
        (GrpoConfig, {"teacher_advantage": {"teacher": "t", "weight": -1.0}}, "greater than or equal to 0"),
        (OpdConfig, {"reward_advantage": {}, "kl_estimator": "full_vocab"}, "reward_advantage belongs to the policy"),
        (OpdConfig, {"entropy_coeff": 0.1, "kl_estimator": "top_k"}, "entropy_coeff belongs to the policy loss"),
        (OpdConfig, {"policy_loss": "gspo", "kl_estimator": "full_vocab"}, "policy_loss: gspo belongs to the policy"),
        (OpdConfig, {"policy_loss": "gspo", "loss_agg_mode": "token_mean"}, "gspo is a mean over responses"),
        (OpdConfig, {"reward_advantage": {}, "num_generations": 1}, "needs num_generations of 2 or more"),
        (OpdConfig, {"reward_advantage": {}, "fixed_advantage": {}}, "reward_advantage and fixed_advantage"),
        (
            OpdConfig,
            {"reward_advantage": {}, "sign_gate": {"conflict_fallback": "mask", "lambda_high": 1.0}},
            "reward_advantage and sign_gate",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, settings, message):
    base = {"role": "a", "init": "student", "prompts": "pool", "steps": 2}
    base |= {"teacher": "teacher", "kl_estimator": "sampled_token"} if config is OpdConfig else {}
    with pytest.raises(ValueError, match=message):
        config.model_validate(base | settings)


def test_labels_and_teachers_are_known_to_the_workflow():
    joint = OpdConfig(role="a", init="s", teacher="t", prompts="p", steps=1, kl_estimator="sampled_token")
    assert not joint.uses_labels and joint.model_copy(update={"reward_advantage": object()}).uses_labels
    routed = {"teacher": {"math": "t1", "code": "t2"}}
    grpo = GrpoConfig(role="a", init="s", prompts="p", steps=1, teacher_advantage=routed)
    assert grpo.inputs() == {"init": "s", "teacher.math": "t1", "teacher.code": "t2"}
