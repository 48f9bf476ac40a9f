"""Accuracy in float32 and bfloat16 (confident tokens, extreme and infinite logits), and peak memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from kl_problems import relative

from megatron_s2d.errors import UserError
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.logits import vocab_parallel_divergence
from megatron_s2d.kl.outputs import DIVERGENCES
from megatron_s2d.kl.reference import dense_outputs
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import Logits

VOCAB = 128_256


def divergence(z, y, names, beta=None, shard=None, **keywords):
    return vocab_parallel_divergence(
        z, Logits(y), shard or VocabShard.unsharded(z.shape[-1]), names, beta=beta, **keywords
    )


def value_and_slope(z, y, name, beta=None):
    z = z.clone().requires_grad_()
    value = getattr(divergence(z, y, (name,), beta), name)
    value.sum().backward()
    return value.detach(), z.grad


def by_definition(z, y, name, beta=None):
    z = z.clone().requires_grad_()
    value = getattr(dense_outputs(z, y, (name,), beta=beta), name)
    value.sum().backward()
    return value.detach(), z.grad


def confident(lead: float, noise: float, seed=0):
    """Return float32 logits of two close models; one token has the logit ``lead``."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1, VOCAB, generator=generator)
    y = z + noise * torch.randn(1, VOCAB, generator=generator)
    z[0, 77], y[0, 77] = lead, lead + 0.37
    return z, y


@pytest.mark.parametrize("lead", [3.0, 15.0, 19.0, 24.0], ids=["flat", "p 0.93", "p 0.999", "p 0.99999"])
@pytest.mark.parametrize(("name", "beta"), [(n, None if n.endswith("e_kl") or n == "forward_kl" else 0.3) for n in
                                            ("forward_kl", "reverse_kl", "jsd")])  # fmt: skip
def test_confident_tokens_are_accurate(lead, name, beta):
    z, y = confident(lead, 0.2)
    expected = by_definition(z.double(), y.double(), name, beta)
    value, slope = value_and_slope(z, y, name, beta)
    assert relative(value, expected[0]) <= 1e-5
    assert relative(slope, expected[1]) <= 1e-5


@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
def test_confident_tokens_are_accurate_in_skew_divergences(name):
    z, y = confident(24.0, 0.2)
    expected = by_definition(z.double(), y.double(), name, 0.3)
    value, slope = value_and_slope(z, y, name, 0.3)
    assert relative(value, expected[0]) <= 1e-5 and relative(slope, expected[1]) <= 1e-5


def test_log_softmax_loses_accuracy():
    """Control: with p_max 0.99999, float32 log_softmax has errors above one percent, so the test above can fail."""
    z, y = confident(24.0, 0.2)
    assert float(torch.softmax(z.double(), -1).max()) > 0.9999
    expected = by_definition(z.double(), y.double(), "forward_kl")
    value, slope = by_definition(z, y, "forward_kl")
    assert relative(value, expected[0]) > 1e-2
    assert relative(slope, expected[1]) > 1e-3


@pytest.mark.parametrize("name", DIVERGENCES)
def test_identical_distributions_give_exactly_zero(name):
    z = 4 * torch.randn(3, 5003, generator=torch.Generator().manual_seed(0))
    value, slope = value_and_slope(z, z.clone(), name, 0.3 if name not in ("forward_kl", "reverse_kl") else None)
    assert not value.any()
    assert float(slope.abs().max()) <= 1e-7 * (name not in ("forward_kl", "reverse_kl"))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_shifted_logits_give_the_same_result(name):
    """Logits are multiples of 2^-12, so the shifted logits are exact too."""
    generator = torch.Generator().manual_seed(0)
    z, y = ((torch.randn(3, 503, generator=generator) * 4096).round() / 4096 for _ in range(2))
    beta = 0.3 if name not in ("forward_kl", "reverse_kl") else None
    base, moved = value_and_slope(z, y, name, beta), value_and_slope(z + 512, y - 256, name, beta)
    assert relative(moved[0], base[0].double()) <= 1e-7 and relative(moved[1], base[1].double()) <= 1e-7


@pytest.mark.parametrize("name", DIVERGENCES)
def test_large_logits(name):
    z = torch.full((2, 40), -1e4)
    y = torch.full((2, 40), -1e4)
    z[:, 3], y[:, 5] = 1e4, 1e4
    y[1, 3] = 1e4 - 1  # second row: the student's token is the teacher's second choice
    beta = 0.3 if name not in ("forward_kl", "reverse_kl") else None
    value, slope = value_and_slope(z, y, name, beta)
    expected = by_definition(z.double(), y.double(), name, beta)
    assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(slope).all())
    assert relative(value, expected[0]) < 1e-6 and relative(slope, expected[1]) < 1e-6


@pytest.mark.parametrize("name", DIVERGENCES)
def test_infinite_teacher_logits(name):
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(3, 40, generator=generator), torch.randn(3, 40, generator=generator)
    y[:, 7:20] = -torch.inf
    y[2] = -torch.inf
    y[2, 30] = 1.0  # one-hot
    beta = 0.3 if name not in ("forward_kl", "reverse_kl") else None
    if name == "reverse_kl":
        with pytest.raises(UserError, match="reverse_kl is infinite at 3 of 3 tokens"):
            value_and_slope(z, y, name)
        return
    value, slope = value_and_slope(z, y, name, beta)
    expected = by_definition(z.double(), y.double(), name, beta)
    assert relative(value, expected[0]) < 1e-6 and relative(slope, expected[1]) < 1e-6


@pytest.mark.parametrize("name", DIVERGENCES)
def test_infinite_logits_of_both_models(name):
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(3, 40, generator=generator), torch.randn(3, 40, generator=generator)
    z[:, 7:20] = y[:, 7:20] = -torch.inf
    beta = 0.3 if name not in ("forward_kl", "reverse_kl") else None
    value, slope = value_and_slope(z, y, name, beta)
    keep = [*range(7), *range(20, 40)]
    expected = value_and_slope(z[:, keep], y[:, keep], name, beta)
    assert relative(value, expected[0].double()) < 1e-6 and relative(slope[:, keep], expected[1].double()) < 1e-6
    assert not slope[:, 7:20].any()


def test_infinite_student_logits():
    z, y = torch.zeros(2, 10), torch.zeros(2, 10)
    z[1, 3] = -torch.inf
    with pytest.raises(UserError, match="forward_kl is infinite at 1 of 2 tokens"):
        divergence(z, y, ("forward_kl",))
    assert bool(torch.isfinite(divergence(z, y, ("reverse_kl", "jsd"), 0.5).jsd).all())


def test_nan_is_propagated():
    z, y = torch.zeros(2, 10), torch.zeros(2, 10)
    z[1, 3] = torch.nan
    value = divergence(z, y, ("forward_kl", "reverse_kl", "entropy"))
    assert torch.isnan(value.forward_kl).tolist() == [False, True]
    assert torch.isnan(value.reverse_kl).tolist() == [False, True]


def bfloat16_operands(rows, vocab, width):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).bfloat16()
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).bfloat16()
    teacher = (weight.float() + 0.05 * torch.randn(vocab, width, generator=generator) / width**0.5).bfloat16()
    return hidden, weight, teacher


def test_bfloat16_operands_keep_float32_logits():
    """Against float64 of the same bfloat16 operands; rounding the logits themselves to bfloat16 is the control."""
    hidden, weight, teacher_weight = bfloat16_operands(24, 4001, 64)
    z = (hidden.double() @ weight.double().T).requires_grad_()
    y = hidden.double() @ teacher_weight.double().T
    expected = dense_outputs(z, y, ("forward_kl",)).forward_kl
    expected.sum().backward()
    leaf = (hidden.float() @ weight.float().T).requires_grad_()
    losses = divergence(leaf, hidden.float() @ teacher_weight.float().T, ("forward_kl",)).forward_kl
    losses.sum().backward()
    assert relative(leaf.grad, z.grad) <= 2e-5
    rounded = (hidden @ weight.T).requires_grad_()
    divergence(rounded, hidden @ teacher_weight.T, ("forward_kl",)).forward_kl.sum().backward()
    assert relative(rounded.grad, z.grad) > 2e-2


def test_weight_gradient_is_summed_in_float32():
    """With many chunks of bfloat16 operands, the gradient differs from the float64 sum by one rounding."""
    hidden, weight, teacher_weight = bfloat16_operands(96, 301, 64)
    from megatron_s2d.kl.teachers import HiddenStates

    weight.requires_grad_()
    loss, _ = linear_divergence(
        hidden, weight, shard=VocabShard.unsharded(301), outputs=("forward_kl",),
        teacher=HiddenStates(hidden, teacher_weight), token_loss=lambda o, rows: o.forward_kl, chunk_bytes=301 * 4 * 4,
    )  # fmt: skip
    loss.backward()
    exact = weight.detach().double().requires_grad_()
    y = hidden.double() @ teacher_weight.double().T
    dense_outputs(hidden.double() @ exact.T, y, ("forward_kl",)).forward_kl.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert relative(weight.grad, exact.grad) <= 1.05 * relative(exact.grad.bfloat16(), exact.grad) + 1e-6


_PEAK = """
import pathlib, sys, torch
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import HiddenStates
torch.set_num_threads(1)
rows, vocab, width = int(sys.argv[1]), 32768, 32
hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
teacher = HiddenStates(torch.randn(rows, width), torch.randn(vocab, width))
def peak():  # of this process alone; ru_maxrss would include the parent's
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
def step(h, t):
    loss, _ = linear_divergence(h, weight, shard=VocabShard.unsharded(vocab), outputs=("reverse_kl",), teacher=t,
        token_loss=lambda o, r: o.reverse_kl, chunk_bytes=32 << 20)
    loss.backward()
step(hidden[:128], HiddenStates(teacher.hidden[:128], teacher.weight_shard))
before = peak()
step(hidden, teacher)
print(peak() - before)
full = hidden.detach() @ weight.detach().T
print(peak() - before)
"""


def test_peak_memory_is_independent_of_the_number_of_tokens():
    """16 times the tokens raise peak memory by a few megabytes; one model's full logits take 256 MiB."""
    grown = subprocess.run(
        [sys.executable, "-c", _PEAK, "2048"], capture_output=True, text=True, check=True, timeout=120
    )
    ours, with_full_logits = (int(line) for line in grown.stdout.split())
    assert ours < 20 * 1024, "KiB beyond the peak of a call with 128 tokens"
    assert with_full_logits > 150 * 1024, "this measure does not see full logits"
