"""Packed copies of weights for decoding on a CPU: their memory. Their products are tested in test_hf_parity.py."""

import psutil
import pytest
import torch

from megatron_s2d.models.packed_weights import PackedProduct, is_worth_packing


@pytest.mark.parametrize("out", [15360, 16384])
def test_a_packed_copy_takes_the_memory_of_its_matrix(out):
    weight = torch.randn(out, 1024)
    if not is_worth_packing(weight):
        pytest.skip("PyTorch was built without oneDNN")
    product, resident = PackedProduct(weight), psutil.Process().memory_info
    input = torch.randn(64, 1024)
    expected = torch.nn.functional.linear(input, weight)
    before = resident().rss
    output = product.multiply(input)
    added = resident().rss - before - output.numel() * 4
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert 0.8 < added / (4 * weight.numel()) < 1.3
