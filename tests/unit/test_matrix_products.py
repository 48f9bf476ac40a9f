"""Products by oneDNN, on any processor here, against PyTorch's in float64; and where they are chosen."""

import pytest
import torch

from megatron_s2d import matrix_products
from megatron_s2d.matrix_products import add_weight_gradient, linear, linear_out

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def by_onednn(monkeypatch):
    """Calls of oneDNN, in parts of a few lines."""
    shapes = []

    def multiply(input, weight, *arguments, original=torch.ops.mkldnn._linear_pointwise):
        shapes.append((tuple(input.shape), tuple(weight.shape)))
        return original(input, weight, *arguments)

    monkeypatch.setattr(matrix_products, "_is_faster_here", lambda: True)
    monkeypatch.setattr(matrix_products, "_PART", 1 << 13)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", multiply)
    return shapes


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-4)


def test_linear(by_onednn):
    input, weight, bias = random(2, 50, 96), random(130, 96), random(130)
    close(linear(input, weight), input.double() @ weight.double().t())
    close(linear(input, weight, bias), input.double() @ weight.double().t() + bias.double())
    close(linear(input, random(96, 130).t()), input.double() @ random(96, 130).double())
    assert len(by_onednn) == 3


def test_a_product_is_written_in_parts(by_onednn):
    input, weight = random(100, 96), random(130, 96)
    out = torch.full((100, 140), 7.0)
    assert linear_out(input, weight, out[:, :130]).shape == (100, 130)
    close(out[:, :130], input.double() @ weight.double().t())
    assert (out[:, 130:] == 7.0).all() and len(by_onednn) == 2


@pytest.mark.parametrize("is_first", [False, True])
def test_weight_gradients_are_added_in_parts(by_onednn, is_first):
    upstream, input, gradient = random(100, 200), random(100, 96), random(200, 96)
    expected = upstream.double().t() @ input.double() + (0 if is_first else gradient.double())
    add_weight_gradient(gradient, upstream, input, is_first=is_first)
    close(gradient, expected)
    assert len(by_onednn) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_pytorch(by_onednn, dtype):
    input, weight = random(100, 96).to(dtype), random(130, 96).to(dtype)
    assert torch.equal(linear(input, weight), torch.nn.functional.linear(input, weight))
    assert torch.equal(linear_out(input, weight, input.new_empty(100, 130)), torch.mm(input, weight.t()))
    assert not by_onednn


def test_small_products_are_left_to_pytorch(by_onednn):
    for rows, width in ((63, 500), (100, 30)):
        input, weight = random(rows, 96), random(width, 96)
        assert torch.equal(linear(input, weight), torch.nn.functional.linear(input, weight))
    assert linear(random(0, 96), random(500, 96)).shape == (0, 500)
    assert not by_onednn


def test_only_processors_of_amd_with_avx512_use_onednn(monkeypatch, tmp_path):
    for name, capability, expected in (
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ):
        (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {name}\n")
        monkeypatch.setattr(matrix_products, "_CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert matrix_products._is_faster_here.__wrapped__() is expected
