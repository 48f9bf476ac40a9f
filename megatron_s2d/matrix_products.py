"""Float32 matrix products by oneDNN on AMD's processors with AVX-512, at twice the speed of MKL, which PyTorch calls.

MKL uses half of their vector width. PyTorch brings oneDNN along, and calls it for half precision only. Elsewhere,
and for small products, these functions are PyTorch's own. Results differ by rounding.

Shapes: t rows, in and out those of a matrix.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F

_CPU_INFO = Path("/proc/cpuinfo")

_FEWEST_ROWS = 64  # with fewer ones, a matrix that is not packed multiplies no faster
_FEWEST_OPERATIONS = 1 << 20  # multiplications; a call costs 10 microseconds more
_PART = 1 << 20  # elements of a product that are computed before they are added or copied: 4 MiB


@functools.cache
def _is_faster_here() -> bool:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return _CPU_INFO.exists() and "AuthenticAMD" in _CPU_INFO.read_text()


def _is_faster(left: torch.Tensor, right: torch.Tensor, num_columns: int) -> bool:
    """Return whether oneDNN is faster for the product of ``left`` [..., in] and ``right`` to [..., num_columns]."""
    if left.is_cuda or not left.dtype == right.dtype == torch.float32:
        return False
    rows = left.numel() // max(left.shape[-1], 1)
    return rows >= _FEWEST_ROWS and left.numel() * num_columns >= _FEWEST_OPERATIONS and _is_faster_here()


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``input`` [..., in] times ``weight`` [out, in] (any strides), plus ``bias``: [..., out]; no autograd."""
    if not _is_faster(input, weight, len(weight)):
        return F.linear(input, weight, bias)
    return _multiply(input, weight, bias)


def linear_out(input: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write ``input`` [t, in] times ``weight`` [out, in] to ``out`` [t, out]; no autograd."""
    if not _is_faster(input, weight, len(weight)):
        return torch.mm(input, weight.t(), out=out)
    step = max(1, _PART // len(input))
    for start in range(0, len(weight), step):
        out[:, start : start + step] = _multiply(input, weight[start : start + step])
    return out


def add_weight_gradient(
    gradient: torch.Tensor, upstream: torch.Tensor, input: torch.Tensor, *, is_first: bool = False
) -> None:
    """Add ``upstream`` [t, out] transposed times ``input`` [t, in] to ``gradient`` [out, in].

    is_first: replace what is in ``gradient`` instead.
    """
    if not _is_faster(upstream.t(), input, input.shape[1]):
        torch.addmm(gradient, upstream.t(), input, beta=0.0 if is_first else 1.0, out=gradient)
        return
    step = max(1, _PART // input.shape[1])
    for start in range(0, len(gradient), step):
        product = _multiply(upstream[:, start : start + step].t(), input.t())
        part = gradient[start : start + step]
        part.copy_(product) if is_first else part.add_(product)


def _multiply(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product
