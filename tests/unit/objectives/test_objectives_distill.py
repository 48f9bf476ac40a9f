"""Distillation objectives on a policy that can be enumerated, and through the chunked output layer.

Shapes: n states, t tokens of all responses.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from mixtures import weighted_sum

from megatron_s2d.columns import TokenColumns
from megatron_s2d.errors import UserError
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.outputs import DIVERGENCES, TokenOutputs, sampled_reverse_kl
from megatron_s2d.kl.reference import dense_outputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import HiddenStates, TopK
from megatron_s2d.objectives.advantages import distillation_advantage, g_opd_advantage
from megatron_s2d.objectives.distill import divergence_objective, policy_distillation_objective, sft_objective
from megatron_s2d.objectives.policy import Surrogate, clipped_surrogate, grpo_objective

VOCAB, LIMIT, STOP = 3, 3, 2


def enumerate_responses():
    """Return all responses that end at STOP or after LIMIT tokens, and their states (prefixes)."""
    responses = []
    for tokens in itertools.product(range(VOCAB), repeat=LIMIT):
        length = tokens.index(STOP) + 1 if STOP in tokens else LIMIT
        responses.append(tokens[:length])
    responses = sorted(set(responses))
    states = sorted({response[:t] for response in responses for t in range(len(response))})
    return responses, states


class Toy:
    """All responses as flat tokens; a model is a table of float64 logits [n, VOCAB]."""

    def __init__(self):
        self.responses, states = enumerate_responses()
        index = {state: i for i, state in enumerate(states)}
        pairs = [(i, r[:t], r[t]) for i, r in enumerate(self.responses) for t in range(len(r))]
        self.response = torch.tensor([i for i, _, _ in pairs])
        self.state = torch.tensor([index[state] for _, state, _ in pairs])
        self.token = torch.tensor([token for _, _, token in pairs])
        self.num_states = len(states)

    def model(self, seed):
        return torch.randn(self.num_states, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def token_log_probs(self, logits):
        return torch.log_softmax(logits, -1)[self.state, self.token]

    def response_log_probs(self, logits):
        per_token = self.token_log_probs(logits)
        return torch.zeros(len(self.responses), dtype=logits.dtype).index_add(0, self.response, per_token)

    def visits(self, logits):
        """Return the probability of each token's response [t]."""
        return self.response_log_probs(logits).exp()[self.response]


@pytest.fixture(scope="module")
def toy():
    return Toy()


def policy_slope(toy, student, advantages, beta=1.0):
    """Return the gradient of the expected policy loss at the weights that sampled, by the training objective."""
    logits = student.clone().requires_grad_()
    objective = weighted_sum((beta, policy_distillation_objective()))
    log_probs = toy.token_log_probs(logits)
    columns = TokenColumns(
        old_log_probs=log_probs.detach(),
        advantages=torch.as_tensor(advantages),
        teacher_log_probs=log_probs.detach(),
        policy_weight=toy.visits(student),
    )
    loss = objective.token_loss(TokenOutputs(log_probs=log_probs), columns).sum()
    return torch.autograd.grad(loss, logits)[0]


def test_enumeration_is_a_distribution(toy):
    assert float(toy.response_log_probs(toy.model(0)).exp().sum()) == pytest.approx(1.0, abs=1e-14)
    assert len(toy.responses) == 15 and toy.num_states == 7


@pytest.mark.parametrize("seed", [0, 1])
def test_trust_region_identity_of_responses(toy, seed):
    """S2D eq. 6 and 7: the reward beta log(pi_T / pi_k) of the response gives beta times the -reverse-KL gradient."""
    student, teacher, beta = toy.model(seed), toy.model(seed + 10), 0.7
    per_token = distillation_advantage(toy.token_log_probs(teacher).numpy(), toy.token_log_probs(student).numpy())
    reward = torch.zeros(len(toy.responses), dtype=torch.float64).index_add(
        0, toy.response, torch.from_numpy(per_token)
    )
    slope = policy_slope(toy, student, reward[toy.response], beta)

    logits = student.clone().requires_grad_()
    log_p = toy.response_log_probs(logits)
    exact = (log_p.exp() * (log_p - toy.response_log_probs(teacher))).sum()
    (expected,) = torch.autograd.grad(beta * exact, logits)
    # Both are gradients of a loss (minus the reward), so they have the same sign.
    torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-12)
    assert float(expected.norm()) > 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_opd_is_the_full_divergence_in_expectation(toy, seed):
    """With discount 0 (methods.md M3): the reverse KL at every visited state, with constant visit probabilities."""
    student, teacher = toy.model(seed), toy.model(seed + 10)
    advantages = distillation_advantage(toy.token_log_probs(teacher).numpy(), toy.token_log_probs(student).numpy())
    slope = policy_slope(toy, student, advantages)
    torch.testing.assert_close(slope, full_slope(toy, student, teacher), rtol=1e-10, atol=1e-12)


def full_slope(toy, student, target):
    """Return the gradient of divergence_objective("reverse_kl"), weighted by the probability of each token."""
    logits = student.clone().requires_grad_()
    outputs = dense_outputs(logits[toy.state], target[toy.state], ("reverse_kl",))
    columns = TokenColumns(divergence_weight=toy.visits(student))
    loss = divergence_objective("reverse_kl").token_loss(outputs, columns).sum()
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("reward_scale", [0.5, 1.25])
def test_sampled_g_opd_is_the_full_form_in_expectation(toy, reward_scale):
    """G-OPD eq. 12 and 14: the reverse KL to q proportional to pi_T^lambda pi_ref^(1 - lambda); zero gradient at q."""
    student, teacher, reference = (toy.model(seed) for seed in (1, 2, 3))
    models = [toy.token_log_probs(logits).numpy() for logits in (teacher, student, reference)]
    slope = policy_slope(toy, student, g_opd_advantage(*models, reward_scale=reward_scale))
    target = reward_scale * torch.log_softmax(teacher, -1) + (1 - reward_scale) * torch.log_softmax(reference, -1)
    torch.testing.assert_close(slope, full_slope(toy, student, target), rtol=1e-10, atol=1e-12)

    at_target = [toy.token_log_probs(logits).numpy() for logits in (teacher, target, reference)]
    slope_at_target = policy_slope(toy, target, g_opd_advantage(*at_target, reward_scale=reward_scale))
    assert float(slope_at_target.abs().max()) < 1e-14 < 1e-2 < float(slope.abs().max())


def test_lambda_one_updates_bit_for_bit_like_opd():
    random = np.random.default_rng(0)
    teacher, student, reference = (-random.exponential(size=50).astype(np.float32) for _ in range(3))
    objective = policy_distillation_objective()
    slopes = []
    for advantages in (
        distillation_advantage(teacher, student),
        g_opd_advantage(teacher, student, reference, reward_scale=1.0),
        g_opd_advantage(teacher, student, reference, reward_scale=1.0 + 1e-3),
    ):
        leaf = torch.from_numpy(student * 0.98).requires_grad_()
        columns = TokenColumns(
            old_log_probs=torch.from_numpy(student),
            advantages=torch.from_numpy(advantages),
            teacher_log_probs=torch.from_numpy(teacher),
            policy_weight=torch.full((50,), 0.02),
        )
        objective.token_loss(TokenOutputs(log_probs=leaf), columns).sum().backward()
        slopes.append(leaf.grad)
    assert torch.equal(slopes[0], slopes[1]) and not torch.equal(slopes[0], slopes[2])


def test_gradient_of_the_sampled_log_ratio_ignores_the_teacher(toy):
    """The gradient of log pi_S - log pi_T at sampled tokens is the same for every teacher, and zero on average."""
    student = toy.model(0)
    per_sample, expected = [], []
    for teacher in (toy.model(1), toy.model(2)):
        for weights, gradients in ((torch.rand(len(toy.token), dtype=torch.float64,
                                           generator=torch.Generator().manual_seed(5)), per_sample),
                               (toy.visits(student), expected)):  # fmt: skip
            logits = student.clone().requires_grad_()
            log_ratio = toy.token_log_probs(logits) - toy.token_log_probs(teacher)
            gradients.append(torch.autograd.grad((weights * log_ratio).sum(), logits)[0])
    assert torch.equal(per_sample[0], per_sample[1]) and float(per_sample[0].norm()) > 0.1
    assert float(expected[0].abs().max()) < 1e-14
    # The advantage of the same tokens does depend on the teacher.
    slopes = [
        policy_slope(toy, student, (toy.token_log_probs(teacher) - toy.token_log_probs(student)).numpy())
        for teacher in (toy.model(1), toy.model(2))
    ]
    assert float((slopes[0] - slopes[1]).norm()) > 0.1


def test_sampled_log_ratio_is_refused(toy):
    logits = toy.model(0).requires_grad_()
    log_ratio = toy.token_log_probs(logits) - toy.token_log_probs(toy.model(1))
    with pytest.raises(UserError, match="does not depend on the teacher"):
        TokenColumns(advantages=-log_ratio)
    with pytest.raises(UserError, match="does not depend on the teacher"):
        clipped_surrogate(toy.token_log_probs(logits), -log_ratio, Surrogate())
    with pytest.raises(UserError, match="does not depend on the teacher"):
        sampled_reverse_kl(toy.token_log_probs(logits), toy.token_log_probs(toy.model(1)))
    for kind in ("k1", "sampled"):
        with pytest.raises(UserError, match="gradient does not depend on the teacher"):
            divergence_objective(kind)


@dataclasses.dataclass
class Layer:
    """A small float64 output layer with its inputs."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher: HiddenStates
    target: torch.Tensor
    columns: TokenColumns

    def teacher_logits(self):
        return self.teacher.hidden @ self.teacher.weight_shard.T


ROWS, VOCABULARY, WIDTH = 23, 17, 4


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, target = normal(ROWS, WIDTH), normal(VOCABULARY, WIDTH), torch.arange(ROWS) % VOCABULARY
    teacher = HiddenStates(normal(ROWS, WIDTH), normal(VOCABULARY, WIDTH))
    log_probs = torch.log_softmax(hidden @ weight.T, -1).gather(-1, target[:, None]).squeeze(-1)
    anchors = torch.arange(ROWS) % 4 == 0
    columns = TokenColumns(
        old_log_probs=log_probs + 0.3 * normal(ROWS),
        rollout_log_probs=log_probs + 0.3 * normal(ROWS),
        advantages=normal(ROWS),
        teacher_log_probs=log_probs + normal(ROWS),
        reference_log_probs=log_probs + normal(ROWS),
        policy_weight=normal(ROWS).abs() * ~anchors,
        supervised_weight=normal(ROWS).abs() * anchors,
        divergence_weight=normal(ROWS).abs(),
    )
    return Layer(hidden, weight, teacher, target, columns)


OBJECTIVES = {
    "supervised": sft_objective(),
    "grpo": grpo_objective(Surrogate(0.1, 0.28, 2.0, "tis", 1.1), kl_loss_coef=0.05),
    "sg_opd": policy_distillation_objective(
        Surrogate(rollout_correction="mask", rollout_correction_cap=1.3), anchor=True
    ),
    **{kind: divergence_objective(kind) for kind in DIVERGENCES},
    "mixture": weighted_sum((1.0, grpo_objective()), (0.3, divergence_objective("forward_kl"))),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunked_output_layer_matches_autograd(layer, name):
    """Loss and gradients of the chunked layer equal autograd through full logits."""
    objective = OBJECTIVES[name]
    beta = 0.3 if name in ("jsd", "skew_forward_kl", "skew_reverse_kl") else None
    needs = tuple(sorted(objective.needs))
    teacher = layer.teacher if objective.needs & set(DIVERGENCES) else None
    hidden, weight = layer.hidden.clone().requires_grad_(), layer.weight.clone().requires_grad_()
    loss, outputs = linear_divergence(
        hidden, weight, shard=VocabShard.unsharded(VOCABULARY), outputs=needs, teacher=teacher, beta=beta,
        target_ids=layer.target, chunk_bytes=5 * VOCABULARY * 16,
        token_loss=lambda outputs, rows: objective.token_loss(outputs, layer.columns.select(rows)),
    )  # fmt: skip
    loss.backward()

    dense_hidden, dense_weight = layer.hidden.clone().requires_grad_(), layer.weight.clone().requires_grad_()
    z, y = dense_hidden @ dense_weight.T, layer.teacher_logits()
    dense = dense_outputs(z, y, needs, beta=beta, target_ids=layer.target)
    expected = objective.token_loss(dense, layer.columns).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hidden.grad, dense_hidden.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weight.grad, dense_weight.grad, rtol=1e-9, atol=1e-12)
    assert float(weight.grad.norm()) > 1e-3
    assert objective.metrics(outputs, layer.columns)["loss"].value() == pytest.approx(loss.item(), rel=1e-10)


def test_cross_entropy_matches_torch(layer):
    z = layer.hidden @ layer.weight.T
    outputs = dense_outputs(z, None, ("log_probs",), target_ids=layer.target)
    anchors = layer.columns.supervised_weight != 0
    count = int(anchors.sum())
    columns = TokenColumns(supervised_weight=anchors / count)
    expected = torch.nn.functional.cross_entropy(z[anchors], layer.target[anchors])
    objective = sft_objective()
    torch.testing.assert_close(objective.token_loss(outputs, columns).sum(), expected, rtol=1e-6, atol=0)
    assert objective.metrics(outputs, columns)["cross_entropy"].value() == pytest.approx(float(expected), rel=1e-12)


def test_top_k_support_reports_captured_mass(layer):
    y = torch.log_softmax(layer.teacher_logits(), -1)
    log_probs, ids = y.topk(5, dim=-1)
    tail = torch.log1p(-log_probs.exp().sum(-1))
    objective = divergence_objective("forward_kl", tail="renormalise")
    _, outputs = linear_divergence(
        layer.hidden, layer.weight, shard=VocabShard.unsharded(VOCABULARY), outputs=tuple(sorted(objective.needs)),
        teacher=TopK(ids, log_probs, tail, "renormalise"),
    )  # fmt: skip
    metrics = objective.metrics(outputs, layer.columns)
    assert metrics["topk/teacher_mass"].value() == pytest.approx(float(log_probs.exp().sum(-1).mean()), rel=1e-9)
    student = torch.softmax(layer.hidden @ layer.weight.T, -1).gather(-1, ids).sum(-1).mean()
    assert metrics["topk/student_mass"].value() == pytest.approx(float(student), rel=1e-9)
    assert metrics["topk/dropped_student_mass"].value() == pytest.approx(1 - float(student), rel=1e-9)
    assert metrics["kl"].value() == pytest.approx(float(outputs.forward_kl.mean()), rel=1e-9)
    assert "captured_mass" not in divergence_objective("forward_kl").needs
