"""On-policy distillation from start to end on toy models: every update against the formulas of methods.md M2 to M5.

Names as there: p student, q teacher.
"""

import dataclasses
import json

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

GROUP, TEMPERATURE = 3, 0.7
SETTINGS = {
    "type": "opd", "init": "student", "teacher": "teacher", "prompts": "pool", "steps": 2, "train_batch_size": 4,
    "num_generations": GROUP, "sampling": {"max_response_length": 8, "temperature": TEMPERATURE},
    "optimizer": {"lr": 0.02},
}  # fmt: skip


def run(workflow, **settings):
    """Return (updates, samples of each step, context)."""
    context = workflow.run("opd", **(SETTINGS | settings))
    student = context.models.trained
    return student.updates, context.rollouts.engines[student].samples, context


def scores_of(workflow, update, samples):
    """Return the response tokens' log pi of student, teacher and reference, one after the other: [t] float64 each."""
    models = (update, workflow.models["teacher"], workflow.models["reference"])
    return [torch.cat([model_log_probs(model, sample) for sample in samples]).numpy() for model in models]


def policy_loss(samples, advantages, factors=1.0):
    """Return the loss -sum A ratio / number of tokens as a function of the tables. advantages, factors: [t]."""
    weighted = torch.from_numpy(np.asarray(advantages * factors)) / sum(sample.response_length for sample in samples)

    def loss(embedding, head):
        log_probs = torch.cat([response_log_probs(embedding, head, sample) for sample in samples])
        return -(weighted * torch.exp(log_probs - log_probs.detach())).sum()

    return loss


@pytest.mark.parametrize("reward_scale", [1.0, 1.5])
def test_sampled_tokens_carry_the_log_ratio_to_teacher_and_reference(workflow, reward_scale):
    reference = {"reference": "reference"} if reward_scale != 1 else {}
    updates, samples, _ = run(workflow, kl_estimator="sampled_token", reward_scale=reward_scale, **reference)
    for update, batch in zip(updates, samples, strict=True):
        student, teacher, reference = scores_of(workflow, update, batch)
        advantages = (teacher - student) + (reward_scale - 1) * (teacher - reference)
        assert_matches(update, policy_loss(batch, advantages))
        assert update.metrics["kl"] == pytest.approx((student - teacher).mean(), rel=1e-5)
        assert all(sample.reward is None for sample in batch)  # nothing is graded


@pytest.mark.parametrize("token_weighting", ["entropy", "log_ratio", "position"])
def test_token_weights_have_mean_1(workflow, token_weighting):
    updates, samples, _ = run(workflow, kl_estimator="sampled_token", token_weighting=token_weighting)
    for update, batch in zip(updates, samples, strict=True):
        student, teacher, _ = scores_of(workflow, update, batch)
        rows = torch.cat([response_rows(update.embedding, update.head, sample) for sample in batch])
        positions = np.concatenate([np.arange(sample.response_length) for sample in batch])
        raw = {
            "entropy": -(rows.exp() * rows).sum(1).numpy(),
            "log_ratio": np.abs(teacher - student),
            "position": 1 - positions / 8,
        }[token_weighting]
        assert_matches(update, policy_loss(batch, teacher - student, raw / raw.mean()))


def test_gate_and_anchors_of_sg_opd(workflow):
    """Steps 1 and 2 of 4 with anchors (the second phase has begun at step 2), 3 and 4 without."""
    gate = {"lambda_high": 1.8, "lambda_base": 1.0, "conflict_fallback": "interp", "conflict_beta": 0.3}
    anchor = {"fraction": 0.5, "num_generations": 4, "alpha_high": 0.8, "alpha_end": 0.2, "phase_1_end": 0.0,
              "phase_2_end": 0.5}  # fmt: skip
    updates, samples, context = run(
        workflow, kl_estimator="sampled_token", sign_gate=gate | {"stability_clip": 0.5}, teacher_sampling=anchor,
        reference="reference", steps=4,
    )  # fmt: skip
    anchors = context.rollouts.engines[workflow.models["teacher"]].samples
    prompts, tokenizer = context.inputs.prompts("pool"), context.inputs.tokenizer
    assert len(anchors) == 2
    kinds = set()
    for step, (update, batch) in enumerate(zip(updates, samples, strict=True), start=1):
        student, teacher, reference = scores_of(workflow, update, batch)
        verifier = group_advantages(rewards_of(batch, prompts, tokenizer), GROUP)
        verifier = np.repeat(verifier, [sample.response_length for sample in batch])
        opd = teacher - student
        agreement = np.sign(verifier) * np.sign(opd)
        kinds |= set(agreement.tolist())
        advantages = np.where(agreement > 0, opd + 0.8 * (teacher - reference), np.where(agreement < 0, 0.3 * opd, opd))
        stability = np.minimum(1, 0.5 / np.abs(opd))
        loss = policy_loss(batch, advantages, stability / stability.mean())
        if step <= 2:
            alpha = {1: 0.8, 2: 0.5}[step]  # half a cosine from 0.8 to 0.2, at its start and middle
            answers = anchors[step - 1]
            asked = list(dict.fromkeys(sample.prompt_id for sample in batch))[:2]
            assert [sample.prompt_id for sample in answers] == [name for name in asked for _ in range(4)]
            assert not {sample.seed for sample in answers} & {sample.seed for sample in batch}
            right = rewards_of(answers, prompts, tokenizer)
            assert 0 < right.sum() < 8
            correct = [sample for sample, reward in zip(answers, right, strict=True) if reward]

            def with_anchors(embedding, head, loss=loss, correct=correct, alpha=alpha):
                log_probs = torch.cat([response_log_probs(embedding, head, sample) for sample in correct])
                return loss(embedding, head) - alpha * log_probs.mean()

            assert_matches(update, with_anchors)
        else:
            assert_matches(update, loss)
    assert kinds == {-1, 0, 1}


def divergence_of(p, q, kind, beta):
    """Return the divergence [t] of log-probabilities p, q [t, v], by its definition."""
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(1)
    if kind == "forward_kl":
        return (q.exp() * (q - p)).sum(1)
    mixture = torch.log(beta * q.exp() + (1 - beta) * p.exp())
    if kind == "jsd":
        return beta * (q.exp() * (q - mixture)).sum(1) + (1 - beta) * (p.exp() * (p - mixture)).sum(1)
    assert kind == "skew_forward_kl"
    return (q.exp() * (q - mixture)).sum(1)


def mean_divergence(samples, divergence, rows_of_teacher):
    """Return the mean of ``divergence(p, q)`` over all tokens of ``samples`` as a function of the tables."""
    q = torch.cat([rows_of_teacher(sample) for sample in samples])

    def loss(embedding, head):
        p = torch.cat([response_rows(embedding, head, sample) for sample in samples])
        return divergence(p, q).mean()

    return loss


def rows_of(model):
    return lambda sample: response_rows(model.embedding, model.head, sample).detach()


@pytest.mark.parametrize(
    ("divergence", "beta"), [("reverse_kl", None), ("forward_kl", None), ("jsd", 0.3), ("skew_forward_kl", 0.2)]
)
def test_full_vocabulary_divergences(workflow, divergence, beta):
    updates, samples, _ = run(workflow, divergence=divergence, beta=beta)
    for update, batch in zip(updates, samples, strict=True):

        def value(p, q):
            return divergence_of(p, q, divergence, beta)

        assert_matches(update, mean_divergence(batch, value, rows_of(workflow.models["teacher"])))


def test_shown_responses_have_the_teachers_probabilities_of_their_tokens(workflow):
    _, samples, context = run(workflow, num_mini_batches=2)
    lines = (context.directory.path / "rollouts.jsonl").read_text().splitlines()
    assert len(lines) == 4  # two of each step, from different mini-batches
    teacher = workflow.models["teacher"]
    for index, row in enumerate(map(json.loads, lines)):
        values = [token["teacher_log_prob"] for token in row["tokens"]]
        expected = [model_log_probs(teacher, sample).numpy() for sample in samples[index // 2]]
        assert min(np.abs(e - values).max() if len(e) == len(values) else 1 for e in expected) < 1e-4
        assert all("student_log_prob" in token for token in row["tokens"])


def test_reward_scale_mixes_teacher_and_reference_geometrically(workflow):
    (update,), (batch,), _ = run(workflow, reward_scale=1.5, reference="reference", steps=1)

    def target(sample):
        teacher, reference = (rows_of(workflow.models[name])(sample) for name in ("teacher", "reference"))
        return torch.log_softmax(1.5 * teacher - 0.5 * reference, dim=1)

    assert_matches(update, mean_divergence(batch, lambda p, q: divergence_of(p, q, "reverse_kl", None), target))


@pytest.mark.parametrize("top_k_source", ["student", "teacher", "union"])
def test_top_k_divergence_keeps_the_tail_as_one_outcome(workflow, top_k_source):
    (update,), (batch,), _ = run(workflow, kl_estimator="top_k", top_k=4, top_k_source=top_k_source, steps=1)

    def divergence(p, q):
        ids = (q if top_k_source == "teacher" else p).detach().topk(4, dim=1).indices
        if top_k_source == "union":
            others = q.scatter(1, ids, -torch.inf).topk(4, dim=1).indices  # the teacher's that are not the student's
            ids = torch.cat([ids, others], dim=1)
        on_p, on_q = p.gather(1, ids), q.gather(1, ids)
        off_p, off_q = 1 - on_p.exp().sum(1), 1 - on_q.exp().sum(1)
        return (on_p.exp() * (on_p - on_q)).sum(1) + off_p * (off_p.log() - off_q.log())

    assert_matches(update, mean_divergence(batch, divergence, rows_of(workflow.models["teacher"])))


def test_cached_responses_of_gkd_are_scored_by_the_live_teacher(workflow):
    """Half of each step's twelve responses come from the cache of another model, the next ones at every step."""
    workflow.run("cache", type="teacher_cache", teacher="reference", prompts="pool", num_generations=1,
                 sampling=SETTINGS["sampling"] | {"temperature": 1.0}, representation="sampled_token")  # fmt: skip
    updates, samples, context = run(workflow, cache="cache", on_policy_fraction=0.5)
    stored = {sample.id: sample for sample in context.inputs.teacher_cache("cache").samples}
    assert len(stored) == 12 and [len(batch) for batch in samples] == [6, 6]
    order = np.random.default_rng([context.seed, 0]).permutation(12)
    names = [list(stored)[index] for index in order]
    for step, (update, batch) in enumerate(zip(updates, samples, strict=True)):
        cached = [dataclasses.replace(stored[name], temperature=TEMPERATURE) for name in names[6 * step : 6 * step + 6]]
        loss = mean_divergence(
            [*batch, *cached], lambda p, q: divergence_of(p, q, "reverse_kl", None), rows_of(workflow.models["teacher"])
        )
        assert_matches(update, loss)


def test_second_mini_batch_is_clipped_around_the_weights_that_sampled(workflow):
    updates, samples, _ = run(
        workflow, kl_estimator="sampled_token", num_mini_batches=2, steps=1, clip_ratio_low=0.05, clip_ratio_high=0.1,
        optimizer={"lr": 0.3},
    )  # fmt: skip
    ((first, second), (batch,)) = updates, samples
    half = batch[6:]
    student, teacher, _ = (torch.from_numpy(scores) for scores in scores_of(workflow, first, half))

    def loss(embedding, head):
        log_probs = torch.cat([response_log_probs(embedding, head, sample) for sample in half])
        ratio = torch.exp(log_probs - student)
        return -torch.minimum(ratio * (teacher - student), ratio.clamp(0.95, 1.1) * (teacher - student)).mean()

    assert_matches(second, loss)
    assert second.metrics["clip_fraction_low"] > 0 and second.metrics["clip_fraction_high"] > 0
