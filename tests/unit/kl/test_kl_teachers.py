"""Teacher sources, the geometric target, the policy-gradient identity, and invalid calls."""

from __future__ import annotations

import itertools

import pytest
import torch
from kl_problems import make_problem, relative

from megatron_s2d.errors import UserError
from megatron_s2d.kl import outputs as guards
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.logits import vocab_parallel_divergence
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import GeometricTarget, HiddenStates, Logits, TopK


class _Group:
    """Placeholder for a process group that is not used."""


def evaluate(problem, teacher, names=("forward_kl", "reverse_kl")):
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    loss, outputs = linear_divergence(
        hidden, weight, shard=VocabShard.unsharded(37), outputs=names, teacher=teacher,
        token_loss=lambda o, rows: sum(getattr(o, name) for name in names), response_mask=problem.mask,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), outputs, hidden.grad, weight.grad


def test_hidden_states_and_logits_agree():
    problem = make_problem()
    logits = problem.teacher_hidden @ problem.teacher_weight.T
    by_hidden = evaluate(problem, problem.teacher())
    by_logits = evaluate(problem, Logits(logits, 1.3))
    per_token = evaluate(problem, Logits(logits, torch.full((7,), 1.3, dtype=torch.float64)))
    for other in (by_logits, per_token):
        for actual, expected in ((other[0], by_hidden[0]), (other[2], by_hidden[2]), (other[3], by_hidden[3])):
            assert relative(actual, expected) < 1e-13


def test_reward_scale_one_equals_distillation_bit_for_bit():
    problem = make_problem()
    reference = HiddenStates(torch.full_like(problem.teacher_hidden, torch.nan), problem.teacher_weight)
    plain = evaluate(problem, problem.teacher(), ("reverse_kl",))
    geometric = evaluate(problem, GeometricTarget(problem.teacher(), reference, 1.0), ("reverse_kl",))
    assert all(torch.equal(a, b) for a, b in ((plain[0], geometric[0]), (plain[2], geometric[2])))
    assert torch.equal(plain[3], geometric[3])


@pytest.mark.parametrize("scale", [0.5, 1.25, 2.0])
def test_geometric_target_minimises_the_g_opd_objective(scale):
    """min over p of KL(p || ref) - scale E_p[log teacher - log ref]: value and gradient are those of KL(p || q)."""
    generator = torch.Generator().manual_seed(0)
    z, t, r = (torch.randn(4, 19, generator=generator, dtype=torch.float64) for _ in range(3))
    leaf, wanted = z.clone().requires_grad_(), z.clone().requires_grad_()
    target = GeometricTarget(Logits(t), Logits(r), scale)
    divergence = vocab_parallel_divergence(leaf, target, VocabShard.unsharded(19), ("reverse_kl",)).reverse_kl
    log_p, log_t, log_r = (torch.log_softmax(logits, -1) for logits in (wanted, t, r))
    objective = (log_p.exp() * ((log_p - log_r) - scale * (log_t - log_r))).sum(-1)
    divergence.sum().backward()
    objective.sum().backward()
    constant = torch.logsumexp(scale * log_t + (1 - scale) * log_r, -1)  # minus the objective's minimum
    assert torch.allclose(divergence, objective.detach() + constant, atol=1e-12)
    assert torch.allclose(leaf.grad, wanted.grad, atol=1e-12)
    best = (scale * t + (1 - scale) * r).requires_grad_()
    at_best = vocab_parallel_divergence(best, target, VocabShard.unsharded(19), ("reverse_kl",)).reverse_kl
    at_best.sum().backward()
    assert float(at_best.detach().abs().max()) < 1e-13 and float(best.grad.abs().max()) < 1e-13


def test_geometric_target_with_infinite_logits():
    t, r = torch.zeros(1, 6), torch.zeros(1, 6)
    t[0, 2] = r[0, 2] = t[0, 4] = -torch.inf
    target = GeometricTarget(Logits(t), Logits(r), 1.25)
    divergence = vocab_parallel_divergence(
        torch.zeros(1, 6), target, VocabShard.unsharded(6), ("forward_kl",)
    ).forward_kl
    assert divergence.item() == pytest.approx(torch.tensor(6 / 4).log().item(), rel=1e-6)


def test_sampled_policy_gradient_is_the_reverse_kl_gradient_in_expectation():
    """methods.md M3: E over y ~ old policy of sum_t A_t grad log p(y_t | s_t) is minus the gradient of the reverse KL
    at the visited states. Exact: the sum runs over all sequences of a small policy (4 tokens, length 3)."""
    vocab, length = 4, 3
    prefixes = [p for n in range(length) for p in itertools.product(range(vocab), repeat=n)]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(prefixes), 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, 8, generator=generator, dtype=torch.float64)
    teacher_logits = torch.randn(len(prefixes), vocab, generator=generator, dtype=torch.float64)
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    log_q = torch.log_softmax(teacher_logits, -1)
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    states, tokens, weights, visits = [], [], [], torch.zeros(len(prefixes), dtype=torch.float64)
    for sequence in itertools.product(range(vocab), repeat=length):
        steps = [index[sequence[:t]] for t in range(length)]
        probability = torch.stack([log_p[s, y] for s, y in zip(steps, sequence, strict=True)]).sum().exp()
        states += steps
        tokens += sequence
        weights += [probability] * length
        visits[steps] += probability
    states, tokens, probabilities = torch.tensor(states), torch.tensor(tokens), torch.stack(weights)
    advantage = -guards.sampled_reverse_kl(log_p[states, tokens], log_q[states, tokens])
    old = log_p[states, tokens]
    shard = VocabShard.unsharded(vocab)

    def gradient(states, **arguments):
        leaf = weight.clone().requires_grad_()
        loss, _ = linear_divergence(hidden[states], leaf, shard=shard, **arguments)
        loss.backward()
        return leaf.grad

    policy = gradient(
        states, outputs=("log_probs",), target_ids=tokens,
        token_loss=lambda o, rows: -probabilities[rows] * advantage[rows] * torch.exp(o.log_probs - old[rows]),
    )  # fmt: skip
    exact = gradient(
        torch.arange(len(prefixes)), outputs=("reverse_kl",), teacher=Logits(teacher_logits),
        token_loss=lambda o, rows: visits[rows] * o.reverse_kl,
    )  # fmt: skip
    assert relative(policy, exact) < 1e-12 and float(exact.norm()) > 0.1


def test_back_propagating_k1_is_refused():
    log_probs = torch.zeros(3, requires_grad=True)
    with pytest.raises(UserError, match="must not be back-propagated"):
        guards.sampled_reverse_kl(log_probs, torch.zeros(3))
    assert torch.equal(guards.sampled_reverse_kl(log_probs.detach(), torch.ones(3)), -torch.ones(3))


def test_support_metrics_of_active_rows():
    outputs = TokenOutputs(captured_mass=torch.tensor([0.9, 0.5, 0.7]), student_captured_mass=torch.tensor([0.8, 0, 1]))
    mask = torch.tensor([True, False, True])
    metrics = guards.support_metrics(outputs, mask, "renormalise")
    assert metrics["topk/teacher_mass"][0].item() == pytest.approx(1.6)
    assert metrics["topk/dropped_student_mass"][0].item() == pytest.approx(0.2)
    assert metrics["topk/teacher_mass"][1].item() == 2
    assert guards.support_metrics(outputs, mask, "bucket")["topk/dropped_student_mass"][0].item() == 0


def call(**changes):
    problem = make_problem()
    arguments = {"shard": VocabShard.unsharded(37), "outputs": ("reverse_kl",), "teacher": problem.teacher()} | changes
    hidden = arguments.pop("hidden", problem.hidden)
    return linear_divergence(hidden, arguments.pop("weight", problem.weight), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "reverse_kl needs a teacher"),
        ({"outputs": ("kl",)}, "unknown per-token output 'kl'"),
        ({"outputs": ("log_probs",)}, "log_probs needs target_ids"),
        ({"outputs": ("jsd",)}, "jsd needs beta strictly between 0 and 1"),
        ({"outputs": ("jsd",), "beta": 1.0}, "jsd needs beta strictly between 0 and 1"),
        ({"outputs": ("jsd", "skew_forward_kl"), "beta": 0.5}, "one pass computes one mixture"),
        ({"beta": 0.5}, "beta belongs to jsd"),
        ({"outputs": ("captured_mass",)}, "captured_mass belongs to a TopK teacher"),
        ({"backend": "cuda"}, "choose auto, torch or triton"),
        ({"response_mask": torch.ones(3).bool()}, "response_mask has shape"),
        ({"outputs": ("log_probs",), "target_ids": torch.full((7,), 37)}, "outside the vocabulary of 37"),
        ({"weight": torch.ones(36, 5).double()}, "36 rows for a shard of 37 columns"),
        ({"weight": torch.ones(37, 4).double()}, "hidden size 5 does not fit"),
        ({"teacher": Logits(torch.ones(7, 36))}, "teacher shard has 36 columns"),
        ({"teacher": Logits(torch.ones(6, 37))}, "teacher has 6 rows, student 7"),
        ({"teacher": GeometricTarget(Logits(torch.ones(7, 37)), None, 1.25)}, "needs a reference"),
    ],
)
def test_invalid_calls_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        call(**changes)


def test_mixture_on_a_support_is_refused():
    teacher = TopK(torch.arange(2).expand(7, 2), torch.full((7, 2), -1.0), torch.full((7,), -2.0))
    with pytest.raises(UserError, match="not defined on a top-k support"):
        call(outputs=("jsd",), beta=0.5, teacher=teacher)


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 3), (0, 11)])
def test_shards_outside_the_vocabulary_are_refused(start, stop):
    with pytest.raises(UserError, match="does not lie in"):
        VocabShard(start, stop, 10, _Group())


def test_shard_without_a_group_is_refused():
    with pytest.raises(UserError, match="has no process group"):
        VocabShard(0, 5, 10)
    with pytest.raises(UserError, match="do not hold a vocabulary of 10"):
        VocabShard.of_padded(9, 10, None)
