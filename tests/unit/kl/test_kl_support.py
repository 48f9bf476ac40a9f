"""Top-k teachers: the tail modes against their dense definitions, bounds, limits, and the top-k itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_problems import combined, relative

from megatron_s2d.errors import UserError
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.logits import vocab_parallel_divergence, vocab_parallel_support, vocab_parallel_topk
from megatron_s2d.kl.reference import dense_outputs, dense_support_outputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import TopK

NAMES = ("forward_kl", "reverse_kl", "captured_mass", "student_captured_mass")


def pair(rows=6, vocab=41, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return z, z + torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


def top_k(y, k, tail) -> TopK:
    ids, log_probs, log_tail = vocab_parallel_topk(y, k, VocabShard.unsharded(y.shape[1]))
    return TopK(ids, log_probs, log_tail, tail=tail, support="union")


def outputs_of(z, teacher, names=NAMES):
    return vocab_parallel_divergence(z, teacher, VocabShard.unsharded(z.shape[1]), names)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "truncate"])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_values_and_gradients_equal_the_dense_definition(tail, k):
    z, y = pair()
    teacher = top_k(y, k, tail)
    for name in ("forward_kl", "reverse_kl"):
        leaf, wanted = z.clone().requires_grad_(), z.clone().requires_grad_()
        outputs = outputs_of(leaf, teacher, (name, *NAMES[2:]))
        expected = dense_support_outputs(
            wanted, teacher.ids, teacher.log_probs, teacher.log_tail_mass, tail, (name, *NAMES[2:])
        )
        weight = torch.arange(1.0, 7.0, dtype=torch.float64)
        (getattr(outputs, name) * weight).sum().backward()
        (getattr(expected, name) * weight).sum().backward()
        assert torch.allclose(getattr(outputs, name), getattr(expected, name), rtol=0, atol=1e-13)
        assert torch.allclose(leaf.grad, wanted.grad, rtol=0, atol=1e-13)
        for mass in NAMES[2:]:
            assert torch.allclose(getattr(outputs, mass), getattr(expected, mass), rtol=0, atol=1e-13)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "truncate"])
def test_all_outputs_of_linear_divergence(tail):
    z, y = pair()
    names = ("log_probs", "entropy", "forward_kl", "reverse_kl")
    hidden = torch.randn(6, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = torch.linalg.lstsq(hidden, z).solution.T.contiguous()  # so that the logits are z / 0.7
    teacher, target = top_k(y, 5, tail), torch.arange(6)
    leaves = [(hidden.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2)]
    loss, _ = linear_divergence(
        *leaves[0], shard=VocabShard.unsharded(41), outputs=names, teacher=teacher, temperature=0.7, target_ids=target,
        token_loss=combined, chunk_bytes=41 * 8 * 4,
    )  # fmt: skip
    loss.backward()
    logits = leaves[1][0] @ leaves[1][1].T / 0.7
    plain = vars(dense_outputs(logits, None, names[:2], target_ids=target)).copy()
    on_support = dense_support_outputs(logits, teacher.ids, teacher.log_probs, teacher.log_tail_mass, tail, names[2:])
    plain |= {name: getattr(on_support, name) for name in names[2:]}
    combined(type(on_support)(**plain), torch.arange(6)).sum().backward()
    for leaf, expected in zip(leaves[0], leaves[1], strict=True):
        assert relative(leaf.grad, expected.grad) < 1e-11


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 30), spread=st.floats(0.1, 4.0))
def test_bucket_is_a_lower_bound_and_grows_with_k(seed, vocab, spread):
    z, y = pair(rows=3, vocab=vocab, seed=seed)
    z, y = z * spread, y * spread
    full = dense_outputs(z, y, ("forward_kl", "reverse_kl"))
    last = {"forward_kl": torch.zeros(3), "reverse_kl": torch.zeros(3)}
    for k in range(1, vocab + 1):
        outputs = outputs_of(z, top_k(y, k, "bucket"))
        for name in last:
            value = getattr(outputs, name)
            assert bool((value <= getattr(full, name) + 1e-12).all())
            assert bool((value >= last[name] - 1e-12).all())
            last[name] = value
    for name, value in last.items():
        assert torch.allclose(value, getattr(full, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "truncate"])
def test_full_support_equals_the_full_divergence(tail):
    z, y = pair()
    leaf, wanted = z.clone().requires_grad_(), z.clone().requires_grad_()
    outputs = outputs_of(leaf, top_k(y, 41, tail), ("forward_kl", "reverse_kl"))
    expected = dense_outputs(wanted, y, ("forward_kl", "reverse_kl"))
    (outputs.forward_kl + outputs.reverse_kl).sum().backward()
    (expected.forward_kl + expected.reverse_kl).sum().backward()
    assert torch.allclose(outputs.forward_kl, expected.forward_kl, rtol=0, atol=1e-12)
    assert torch.allclose(leaf.grad, wanted.grad, rtol=0, atol=1e-12)


def test_top_k_matches_sorting_with_a_tiny_tail():
    _, y = pair(vocab=600)
    y[:, 3] += 40  # a tail of about e^-40, which 1 - sum would round away
    ids, log_probs, tail = vocab_parallel_topk(y, 5, VocabShard.unsharded(600))
    log_q, order = torch.log_softmax(y, -1).sort(descending=True)
    assert torch.equal(ids, order[:, :5])
    assert torch.allclose(log_probs, log_q[:, :5], rtol=0, atol=1e-12)
    assert torch.allclose(tail, torch.logsumexp(log_q[:, 5:], -1), rtol=0, atol=1e-12)
    support_log_probs, support_tail = vocab_parallel_support(y, ids, VocabShard.unsharded(600))
    assert torch.allclose(support_log_probs, log_probs, rtol=0, atol=1e-12)
    assert torch.allclose(support_tail, tail, rtol=0, atol=1e-12)


def test_top_k_with_forbidden_tokens():
    y = torch.zeros(2, 10)
    y[:, 4:] = -torch.inf
    ids, log_probs, tail = vocab_parallel_topk(y, 10, VocabShard.unsharded(10))
    assert torch.equal(ids.sort(1).values, torch.arange(10).expand(2, 10))
    assert torch.allclose(log_probs[:, :4], torch.full((2, 4), 0.25).log())
    assert bool(torch.isinf(log_probs[:, 4:]).all()) and bool(torch.isinf(tail).all())


def test_infinite_reverse_kl_is_refused():
    z, y = pair()
    teacher = top_k(y, 5, "bucket")
    teacher.log_tail_mass[2] = -torch.inf
    assert bool(torch.isfinite(outputs_of(z, teacher, ("forward_kl",)).forward_kl).all())
    with pytest.raises(UserError, match="reverse_kl is infinite at 1 of 6"):
        outputs_of(z, teacher, ("reverse_kl",))


def test_teacher_support_warns_for_reverse_kl_only():
    z, y = pair()
    ids, log_probs, tail = vocab_parallel_topk(y, 5, VocabShard.unsharded(41))
    with pytest.warns(UserWarning, match="teacher's top-k only"):
        outputs_of(z, TopK(ids, log_probs, tail), ("reverse_kl",))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs_of(z, TopK(ids, log_probs, tail), ("forward_kl",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": "ignore"}, "tail 'ignore'"),
        ({"ids": torch.full((6, 5), 3)}, "names a token twice"),
        ({"ids": torch.arange(41, 46).expand(6, 5)}, "outside the vocabulary of 41"),
        ({"ids": torch.arange(5).expand(4, 5)}, "teacher has 4 rows, student 6"),
    ],
)
def test_invalid_supports_are_refused(change, message):
    z, y = pair()
    good = top_k(y, 5, "bucket")
    fields = {"ids": good.ids, "log_probs": good.log_probs, "log_tail_mass": good.log_tail_mass, "tail": "bucket"}
    with pytest.raises(UserError, match=message):
        outputs_of(z, TopK(**(fields | change)), ("forward_kl",))
