"""Decoding in buffers of fixed size, and its fused kernels, give what PyTorch's operations in exact ones give."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import test_rollout_megatron_engine as cases
import torch.nn.functional as F

from megatron_s2d.models import packed_weights
from megatron_s2d.models.kv_cache import _rotate
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.rollout.megatron import step_graph


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(cases.ParallelConfig())


@pytest.mark.parametrize("preset", ["tiny-teacher", "tiny-llama", "tiny-moe"])
def test_fixed_buffers_change_no_sample(layout, monkeypatch, preset):
    """With growing and shrinking batches; log-probabilities differ by the rounding of sums over masked columns."""
    chunks = cases.model(layout, preset)
    requests = cases.make_requests(lengths=(4, 9, 1), groups=4, max_new_tokens=40)
    reference = cases.engine(chunks, layout).generate(requests)
    monkeypatch.setattr(cases.kv_cache, "_MIN_FREE_COLUMNS", 3)
    monkeypatch.setitem(cases.buffer_sizes.POSITIONS_PER_CHECK, "cpu", 4)
    fixed = cases.engine(chunks, layout)
    fixed._passes.fixed_buffers = True
    fixed._passes.batches_experts = preset == "tiny-moe"
    for sample, expected in zip(fixed.generate(requests), reference, strict=True):
        assert np.array_equal(sample.token_ids, expected.token_ids)
        np.testing.assert_allclose(sample.rollout_log_probs, expected.rollout_log_probs, rtol=0, atol=2e-5)


def test_a_step_that_runs_again_without_the_host_goes_on(layout, monkeypatch):
    """As a CUDA graph does: the same operations on the same tensors, whatever the host has counted since."""
    chunks = cases.model(layout)
    requests = cases.make_requests(lengths=(4, 9), groups=2, max_new_tokens=12, stop_token_ids=())
    reference = cases.engine(chunks, layout).generate(requests)
    seen = []

    def run(self, step, num_left, key):
        cache = step.args[2]
        offset, cache.sequence_len_offset = cache.sequence_len_offset, 7  # the host's counter is not looked at
        step()
        cache.sequence_len_offset = offset
        seen.append(num_left)

    monkeypatch.setattr(step_graph.StepGraph, "run", run)
    fixed = cases.engine(chunks, layout)
    fixed._passes.fixed_buffers = True
    for sample, expected in zip(fixed.generate(requests), reference, strict=True):
        assert np.array_equal(sample.token_ids, expected.token_ids)
    assert seen == list(range(11, 0, -1))


@pytest.mark.parametrize("preset", ["tiny-teacher", "tiny-llama", "tiny-moe"])
def test_packed_weights_change_no_sample(layout, monkeypatch, preset):
    """Responses of several lengths, so that the batch shrinks below the rows that the weights were packed for."""
    chunks = cases.model(layout, preset)
    requests = cases.make_requests(lengths=(4, 9, 1), groups=4, max_new_tokens=24)
    requests = [
        dataclasses.replace(request, params=dataclasses.replace(request.params, max_new_tokens=24 if i == 0 else i + 2))
        for i, request in enumerate(requests)
    ]
    reference = cases.engine(chunks, layout).generate(requests)  # these models are too small
    before = {name: (value.data_ptr(), value.clone()) for name, value in chunks[0].named_parameters()}
    monkeypatch.setattr(cases.buffer_sizes, "FEWEST_PACKED_VALUES", 1)
    rows = []

    def multiply(self, input, bias=None, original=packed_weights.PackedProduct.multiply):
        rows.append(input.numel() // input.shape[-1])
        return original(self, input, bias)

    monkeypatch.setattr(packed_weights.PackedProduct, "multiply", multiply)
    for got, expected in zip(cases.engine(chunks, layout).generate(requests), reference, strict=True):
        assert np.array_equal(got.token_ids, expected.token_ids)
        np.testing.assert_allclose(got.rollout_log_probs, expected.rollout_log_probs, rtol=0, atol=2e-5)
    assert {12, 1} < set(rows) and max(rows) > 12  # prompts too
    assert not any("_forward_impl" in vars(module) for module in chunks[0].modules())
    for name, value in chunks[0].named_parameters():  # the optimizer and the gradient buffers refer to this memory
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [70, 1024, 16384])
def test_packed_products(bias, out):
    """Also of a matrix that gets more features, and of one that is packed in blocks; no rows, a few, and many."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, 33, generator=generator)
    added = torch.randn(out, generator=generator) if bias else None
    product = packed_weights.PackedProduct(weight)
    for rows in (3, 16, 1, 0, 65):
        input = torch.randn(1, rows, 33, generator=generator)
        torch.testing.assert_close(product.multiply(input, added), F.linear(input, weight, added), rtol=0, atol=2e-5)


def test_short_responses_do_not_pay_for_packed_weights(layout, monkeypatch):
    chunks = cases.model(layout)
    monkeypatch.setattr(cases.buffer_sizes, "FEWEST_PACKED_VALUES", 1)
    monkeypatch.setattr(packed_weights, "PackedProduct", lambda weight: pytest.fail("a weight was packed"))
    cases.engine(chunks, layout).generate(cases.make_requests(lengths=(4,), max_new_tokens=8))


def check_kernels() -> None:
    """In a process of its own, which starts with Triton's interpreter."""
    from megatron_s2d.models import decode_kernels as kernels

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    delta, residual, weight = random(1, 3, 96), random(1, 3, 96), random(96)
    normed, total = kernels.add_rms_norm(delta, residual, weight, 1e-6)
    assert torch.equal(total, delta + residual)
    torch.testing.assert_close(normed, F.rms_norm(delta + residual, (96,), weight, 1e-6))

    centered, _ = kernels.add_rms_norm(delta, residual, weight, 1e-6, True)
    torch.testing.assert_close(centered, F.rms_norm(delta + residual, (96,), 1 + weight, 1e-6))

    gate_up = random(1, 3, 2 * 1100)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(kernels.swiglu(gate_up), F.silu(gate) * up)

    for rows, heads, groups, dim, norm in ((3, 6, 2, 16, True), (2, 4, 4, 24, False), (1, 4, 1, 8, True)):
        qkv = random(1, rows, (heads + 2 * groups) * dim)
        weights = (random(dim), random(dim)) if norm else None
        table = (random(20, dim), random(20, dim))
        lengths, column = torch.arange(5, 5 + rows, dtype=torch.int32), torch.tensor([7])
        keys, values = torch.zeros(2, rows, 11, groups, dim).unbind()
        query = kernels.norm_rotate_store(qkv, weights, 1e-6, table, lengths, column, keys, values, heads, rows == 3)
        parts = qkv.view(1, rows, groups, -1).split([heads // groups * dim, dim, dim], dim=-1)
        expected_query, key, value = (part.reshape(1, rows, -1, dim) for part in parts)
        if weights is not None:
            weights = tuple(weight + (rows == 3) for weight in weights)
            expected_query = F.rms_norm(expected_query, (dim,), weights[0], 1e-6)
            key = F.rms_norm(key, (dim,), weights[1], 1e-6)
        turn = [part[lengths - 1][None, :, None] for part in table]
        torch.testing.assert_close(query, _rotate(expected_query, *turn))
        torch.testing.assert_close(keys[:, 7], _rotate(key, *turn)[0])
        assert torch.equal(values[:, 7], value[0])
        assert keys.count_nonzero() == values.count_nonzero() == rows * groups * dim  # and nothing else


def test_fused_kernels_compute_what_pytorch_computes():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    code = "import test_decoding; test_decoding.check_kernels()"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=os.path.dirname(__file__), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
