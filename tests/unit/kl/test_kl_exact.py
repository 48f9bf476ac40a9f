"""Values and gradients on one rank against autograd on full logits, over generated shapes, and by gradcheck."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_problems import ALL, MIXTURES, WITH_TEACHER, Problem, combined, make_problem, reference, relative

from megatron_s2d.errors import UserError
from megatron_s2d.kl import fused
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.logits import vocab_parallel_divergence
from megatron_s2d.kl.reference import dense_outputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import Logits


def computed(problem: Problem, names, beta, dtype=torch.float64, chunk_rows=3, teacher=None):
    hidden = problem.hidden.to(dtype, copy=True).requires_grad_()
    weight = problem.weight.to(dtype, copy=True).requires_grad_()
    loss, outputs = linear_divergence(
        hidden,
        weight,
        shard=VocabShard.unsharded(problem.vocab_size),
        outputs=names,
        teacher=teacher or problem.teacher(dtype),
        beta=beta,
        temperature=problem.temperature,
        target_ids=problem.target,
        token_loss=problem.token_loss,
        response_mask=problem.mask,
        chunk_bytes=2 * dtype.itemsize * problem.vocab_size * chunk_rows,
    )
    (loss * 2.0).backward()
    return loss.detach(), outputs, hidden.grad / 2, weight.grad / 2


def assert_same(answer, expected, mask, value_tolerance, gradient_tolerance):
    assert relative(answer[0], expected[0]) <= value_tolerance
    for field in dataclasses.fields(answer[1]):
        value, wanted = getattr(answer[1], field.name), getattr(expected[1], field.name)
        if wanted is not None:
            assert relative(value[mask], wanted.detach()[mask]) <= value_tolerance, field.name
            assert bool((value[~mask] == 0).all())
    assert relative(answer[2], expected[2]) <= gradient_tolerance
    assert relative(answer[3], expected[3]) <= gradient_tolerance
    assert bool((answer[2][~mask] == 0).all())


CASES = (
    [(ALL, None), (WITH_TEACHER, None)] + [((name,), None) for name in ALL] + [((name, *ALL), 0.3) for name in MIXTURES]
)


@pytest.mark.parametrize(("names", "beta"), CASES, ids=lambda case: str(case)[:40])
def test_float64_equals_autograd(names, beta):
    problem = make_problem()
    answer = computed(problem, names, beta)
    assert_same(answer, reference(problem, names, beta), problem.mask, 1e-13, 1e-12)
    assert bool((answer[3][problem.vocab_size :] == 0).all()), "padding rows of the output layer got a gradient"


@pytest.mark.parametrize("chunks", [2, 3, 100])
def test_gradient_products_of_several_chunks(monkeypatch, chunks):
    """As on a GPU: one product for the logits gradients of several chunks, and a smaller one for the last chunks."""
    monkeypatch.setitem(fused.CHUNKS_PER_PRODUCT, "cpu", chunks)
    problem = make_problem(rows=23)
    answer = computed(problem, ALL, None)
    assert_same(answer, reference(problem, ALL, None), problem.mask, 1e-13, 1e-12)


@pytest.mark.parametrize(("names", "beta"), CASES, ids=lambda case: str(case)[:40])
def test_float32_stays_within_rounding_of_float64(names, beta):
    problem = make_problem(rows=40, vocab=503, width=16, teacher_width=24).rounded()
    answer = computed(problem, names, beta, torch.float32)
    assert_same(answer, reference(problem, names, beta), problem.mask, 1e-6, 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 40),
    padding=st.integers(0, 5),
    chunk_rows=st.integers(1, 12),
    beta=st.floats(0.02, 0.98),
    mixture=st.sampled_from(MIXTURES),
    temperatures=st.tuples(st.floats(0.3, 3.0), st.floats(0.3, 3.0)),
    masked=st.lists(st.integers(0, 8), max_size=9),
    single=st.booleans(),
)
def test_generated_shapes(rows, vocab, padding, chunk_rows, beta, mixture, temperatures, masked, single):
    problem = make_problem(rows, vocab, padding=padding, masked=tuple(masked), seed=rows * 41 + vocab)
    problem.temperature, problem.teacher_temperature = temperatures
    names = (mixture, *ALL)
    dtype = torch.float32 if single else torch.float64
    problem = problem.rounded()
    answer = computed(problem, names, beta, dtype, chunk_rows=chunk_rows)
    expected = reference(problem, names, beta)
    scale = max(1.0, float(expected[0].abs()), float(expected[2].norm()), float(expected[3].norm()))
    tolerance = (2e-5 if single else 1e-12) * scale
    for a, b in ((answer[0], expected[0]), (answer[2], expected[2]), (answer[3], expected[3])):
        assert float((a.double() - b).norm()) <= tolerance


def central_differences(function, tensor, step=1e-6):
    slope = torch.zeros_like(tensor)
    for index in range(tensor.numel()):
        ends = []
        for sign in (1, -1):
            moved = tensor.clone()
            moved.view(-1)[index] += sign * step
            ends.append(float(function(moved)))
        slope.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
    return slope


@pytest.mark.parametrize(("name", "beta"), [*((n, None) for n in ALL), *((n, 0.4) for n in MIXTURES)])
def test_finite_differences(name, beta):
    problem = make_problem(rows=5, vocab=11, width=3, teacher_width=4, masked=(1,))

    def loss(hidden, weight):
        return linear_divergence(
            hidden, weight, shard=VocabShard.unsharded(11), outputs=(name,), teacher=problem.teacher(), beta=beta,
            temperature=0.7, target_ids=problem.target, token_loss=lambda o, rows: getattr(o, name) ** 2,
            response_mask=problem.mask, chunk_bytes=2 * 2 * 8 * 11,
        )[0]  # fmt: skip

    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    loss(hidden, weight).backward()  # torch.autograd.gradcheck calls backward twice, which is refused
    with torch.no_grad():
        by_hidden = central_differences(lambda h: loss(h, weight), problem.hidden)
        by_weight = central_differences(lambda w: loss(hidden, w), problem.weight)
    assert torch.allclose(hidden.grad, by_hidden, atol=1e-8) and torch.allclose(weight.grad, by_weight, atol=1e-8)


def test_gradcheck_of_existing_logits():
    z = torch.randn(2, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ids = torch.arange(6).view(2, 3)
    temperature = torch.tensor([[0.5, 1.0, 2.0], [1.5, 0.8, 1.0]], dtype=torch.float64)

    def values(logits):
        names = ("forward_kl", "reverse_kl", "jsd", "entropy", "log_probs")
        outputs = vocab_parallel_divergence(
            logits, Logits(y, 1.2), VocabShard.unsharded(9), names, beta=0.6, temperature=temperature, target_ids=ids
        )
        return tuple(getattr(outputs, name) for name in names)

    assert torch.autograd.gradcheck(values, (z,), eps=1e-6, atol=1e-8)
    log_p = torch.log_softmax(z / temperature.unsqueeze(-1), -1)
    outputs = vocab_parallel_divergence(
        z, None, VocabShard.unsharded(9), ("log_probs", "entropy"), temperature=temperature, target_ids=ids
    )
    assert torch.allclose(outputs.log_probs, log_p.gather(2, ids[..., None])[..., 0])
    assert torch.allclose(outputs.entropy, -(log_p.exp() * log_p).sum(-1))


def test_frozen_operand_gets_no_gradient():
    problem = make_problem()
    names = ("reverse_kl",)
    expected = reference(problem, names, None)
    for frozen in ("hidden", "weight"):
        hidden = problem.hidden.clone().requires_grad_(frozen != "hidden")
        weight = problem.weight.clone().requires_grad_(frozen != "weight")
        loss, _ = linear_divergence(
            hidden, weight, shard=VocabShard.unsharded(37), outputs=names, teacher=problem.teacher(), temperature=0.7,
            token_loss=problem.token_loss, response_mask=problem.mask,
        )  # fmt: skip
        loss.backward()
        if frozen == "hidden":
            assert hidden.grad is None and relative(weight.grad, expected[3]) < 1e-12
        else:
            assert weight.grad is None and relative(hidden.grad, expected[2]) < 1e-12


def test_masked_rows_have_no_influence():
    problem = make_problem()
    clean = computed(problem, ALL, None)
    problem.hidden[2] = torch.nan
    problem.teacher_hidden[2] = torch.nan
    dirty = computed(problem, ALL, None)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[2], dirty[2]) and torch.equal(clean[3], dirty[3])


def test_rows_are_the_mask_by_indices():
    problem = make_problem()
    arguments = {
        "shard": VocabShard.unsharded(problem.vocab_size),
        "outputs": ALL,
        "teacher": problem.teacher(torch.float64),
        "temperature": problem.temperature,
        "target_ids": problem.target,
        "token_loss": problem.token_loss,
    }
    rows = problem.mask.nonzero().squeeze(1)
    results = []
    for selection in ({"response_mask": problem.mask}, {"response_rows": rows, "check_values": False}):
        hidden = problem.hidden.clone().requires_grad_()
        loss, outputs = linear_divergence(hidden, problem.weight, **arguments, **selection)
        loss.backward()
        results.append([loss, hidden.grad, *[value for value in vars(outputs).values() if value is not None]])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    with pytest.raises(UserError, match="response_mask or response_rows, not both"):
        linear_divergence(problem.hidden, problem.weight, **arguments, response_mask=problem.mask, response_rows=rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masked_positions_of_existing_logits(dtype):
    """Invalid ids, infinite divergences and NaN at masked positions do not affect other positions."""
    problem = make_problem(rows=6, masked=(1, 4))
    z = (problem.hidden @ problem.weight.T).to(dtype).view(2, 3, 40)
    y, mask, target = problem.teacher_logits().clone(), problem.mask.view(2, 3), problem.target.clone()
    z[0, 1], y[4], target[1] = torch.nan, -torch.inf, -100
    temperature = torch.tensor([0.5, 0.9, 2.0, 1.5, 0.8, 1.0], dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    outputs = vocab_parallel_divergence(
        leaf, Logits(y), VocabShard.unsharded(37), ("jsd", *ALL), beta=0.3, temperature=temperature.view(2, 3),
        target_ids=target.view(2, 3), response_mask=mask,
    )  # fmt: skip
    combined(outputs, torch.arange(6).view(2, 3)).sum().backward()
    rows = problem.mask.nonzero().squeeze(1)
    few = z.view(6, 40)[rows].double().requires_grad_()
    scaled = few[:, :37] / temperature[rows, None]
    exact = dense_outputs(scaled, y[rows], ("jsd", *ALL), beta=0.3, target_ids=target[rows])
    combined(exact, rows).sum().backward()
    bounds = (1e-13, 1e-12) if dtype == torch.float64 else (1e-6, 2**-8)
    for name in ("jsd", *ALL):
        assert relative(getattr(outputs, name)[mask], getattr(exact, name).detach()) <= bounds[0]
        assert not getattr(outputs, name)[~mask].any()
    assert relative(leaf.grad.view(6, 40)[rows], few.grad) <= bounds[1]
    assert not leaf.grad[~mask].any()
    empty = vocab_parallel_divergence(
        z, None, VocabShard.unsharded(37), ("entropy",), response_mask=torch.zeros_like(mask)
    )
    assert not empty.entropy.any()
    without_teacher = vocab_parallel_divergence(
        z, None, VocabShard.unsharded(37), ("log_probs",), temperature=temperature.view(2, 3),
        target_ids=target.view(2, 3), response_mask=mask,
    )  # fmt: skip
    assert torch.equal(without_teacher.log_probs, outputs.log_probs)


def test_temperature_per_token():
    problem = make_problem(rows=9, masked=(2, 3))
    problem.temperature = torch.linspace(0.5, 2.0, 9, dtype=torch.float64)
    expected_problem = dataclasses.replace(problem, temperature=problem.temperature.unsqueeze(1))
    expected = reference(expected_problem, ("jsd", *ALL), 0.3)
    assert_same(computed(problem, ("jsd", *ALL), 0.3), expected, problem.mask, 1e-13, 1e-12)


def test_empty_response_mask():
    problem = make_problem()
    problem.mask[:] = False
    loss, outputs, hidden, weight = computed(problem, ALL, None)
    assert float(loss) == 0.0 and not hidden.any() and not weight.any() and not outputs.entropy.any()


@pytest.mark.parametrize("chunks", [1, 3])
def test_chunk_with_constant_loss_has_no_gradient(monkeypatch, chunks):
    monkeypatch.setitem(fused.CHUNKS_PER_PRODUCT, "cpu", chunks)
    problem = make_problem(rows=9, masked=())

    def partly_constant(outputs, rows):
        return outputs.log_probs if 3 not in rows else torch.zeros_like(outputs.log_probs.detach())

    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    arguments = {"shard": VocabShard.unsharded(37), "outputs": ("log_probs",), "target_ids": problem.target}
    loss, _ = linear_divergence(hidden, weight, token_loss=partly_constant, chunk_bytes=37 * 8 * 3, **arguments)
    loss.backward()
    z = problem.hidden.requires_grad_() @ problem.weight[:37].T
    log_p = dense_outputs(z, None, ("log_probs",), target_ids=problem.target).log_probs
    log_p[[0, 1, 2, 6, 7, 8]].sum().backward()
    assert relative(hidden.grad, problem.hidden.grad) < 1e-12


def test_same_call_gives_the_same_bits():
    problem = make_problem(rows=40, vocab=503, width=16, teacher_width=24)
    first, second = (computed(problem, ("jsd", *ALL), 0.5, torch.float32) for _ in range(2))
    for a, b in zip((first[0], *first[2:]), (second[0], *second[2:]), strict=True):
        assert torch.equal(a, b)


def test_second_backward_and_double_backward_are_refused():
    problem = make_problem()
    hidden = problem.hidden.clone().requires_grad_()
    arguments = {"shard": VocabShard.unsharded(37), "outputs": ("entropy",), "token_loss": lambda o, rows: o.entropy}
    loss, _ = linear_divergence(hidden, problem.weight, **arguments)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()
    loss, _ = linear_divergence(hidden, problem.weight, **arguments)
    (slope,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        slope.sum().backward()
