"""Every cut of the vocabulary into shards gives the same result; shards are evaluated one by one in one process."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_problems import ALL, MIXTURES

from megatron_s2d.kl import chunk
from megatron_s2d.kl import top_k as support
from megatron_s2d.kl import torch_backend as statistics
from megatron_s2d.kl.logits import vocab_parallel_topk
from megatron_s2d.kl.merge import merge
from megatron_s2d.kl.reference import dense_outputs, dense_support_outputs
from megatron_s2d.kl.shards import VocabShard


class _Shard(VocabShard):
    """A shard without a process group; the tests collect its statistics."""

    def __post_init__(self) -> None:
        pass


@st.composite
def cuts(draw) -> list[int]:
    vocab = draw(st.integers(1, 30))
    inner = draw(st.lists(st.integers(0, vocab), max_size=7))
    return [0, *sorted(inner), vocab]


def operands(vocab: int, seed: int, forbid: bool):
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(3, vocab, generator=generator, dtype=torch.float64)
    y = z + torch.randn(3, vocab, generator=generator, dtype=torch.float64)
    if forbid and vocab > 1:
        both = torch.rand(3, vocab, generator=generator) < 0.4
        both[:, 0] = False
        z, y = z.masked_fill(both, -torch.inf), y.masked_fill(both, -torch.inf)
    return z, y, torch.zeros(3, dtype=torch.long), torch.rand(3, generator=generator, dtype=torch.float64)


@settings(max_examples=120, deadline=None)
@given(
    edges=cuts(),
    seed=st.integers(0, 1000),
    mixture=st.sampled_from(MIXTURES),
    beta=st.floats(0.05, 0.95),
    forbid=st.booleans(),
)
def test_full_teachers(edges, seed, mixture, beta, forbid):
    z, y, target, weight = operands(edges[-1], seed, forbid)
    names = (*ALL, mixture)
    plan = chunk.make_plan(names, teacher="dense", beta=beta, has_target=True)
    shards = [_Shard(a, b, edges[-1]) for a, b in itertools.pairwise(edges)]
    parts = [(z[:, s.start : s.stop], y[:, s.start : s.stop], *s.local(target)) for s in shards]
    evaluated = [statistics.statistics(*part, plan) for part in parts]
    merged = merge(torch.stack([numbers for numbers, _ in evaluated]), plan)
    sums = [
        statistics.divergence_sums(part[0], part[1], merged, plan, masked)
        for part, (_, masked) in zip(parts, evaluated, strict=True)
    ]
    merged.outputs[mixture], merged.expected_slope = torch.stack([numbers for numbers, _ in sums]).sum(0).unbind(1)
    cotangents = {name: (index + 1) * weight for index, name in enumerate(names)}
    slopes = [
        statistics.logits_gradient(*part, merged, cotangents, plan, masked, torch.empty_like(part[0]))
        for part, (_, masked) in zip(parts, sums, strict=True)
    ]
    allowed = torch.isfinite(z)
    leaf = z.masked_fill(~allowed, -80.0).requires_grad_()  # autograd of the definition gives NaN for two infinities
    exact = dense_outputs(leaf, y.masked_fill(~allowed, -80.0), names, beta=beta, target_ids=target)
    sum((cotangents[name] * getattr(exact, name)).sum() for name in names).backward()
    for name in names:
        assert torch.allclose(merged.outputs[name], getattr(exact, name), rtol=1e-9, atol=1e-11), name
    assert torch.allclose(torch.cat(slopes, 1), leaf.grad, rtol=1e-9, atol=1e-11)


@settings(max_examples=120, deadline=None)
@given(edges=cuts(), seed=st.integers(0, 1000), tail=st.sampled_from(support.TAILS), share=st.floats(0.01, 1.0))
def test_top_k_teachers(edges, seed, tail, share):
    vocab = edges[-1]
    z, y, target, weight = operands(vocab, seed, False)
    k = max(1, round(share * vocab))
    ids, log_q, log_tail = vocab_parallel_topk(y, k, VocabShard.unsharded(vocab))
    names = ("log_probs", "entropy", "forward_kl", "reverse_kl", "captured_mass", "student_captured_mass")
    plan = chunk.make_plan(names, teacher="support", beta=None, has_target=True)
    numbers, slopes = [], []
    shards = [_Shard(a, b, vocab) for a, b in itertools.pairwise(edges)]
    chunks = [support.SupportChunk(*s.local(ids), log_q, log_tail, tail) for s in shards]
    for shard, part in zip(shards, chunks, strict=True):
        numbers.append(support.support_statistics(z[:, shard.start : shard.stop], part, *shard.local(target), plan))
    merged = support.support_merge(torch.stack(numbers), chunks[0], plan)
    cotangents = {name: (index + 1) * weight for index, name in enumerate(names[:4])}
    for shard, part in zip(shards, chunks, strict=True):
        local = z[:, shard.start : shard.stop].clone()
        slopes.append(support.support_gradient(local, part, *shard.local(target), merged, cotangents))
    leaf = z.clone().requires_grad_()
    exact = vars(dense_outputs(leaf, None, names[:2], target_ids=target)).copy()
    exact |= {
        name: getattr(dense_support_outputs(leaf, ids, log_q, log_tail, tail, (name,)), name) for name in names[2:]
    }
    sum((cotangents[name] * exact[name]).sum() for name in cotangents).backward()
    for name in names:
        assert torch.allclose(merged.outputs[name], exact[name], rtol=1e-9, atol=1e-11), name
    assert torch.allclose(torch.cat(slopes, 1), leaf.grad, rtol=1e-9, atol=1e-11)
