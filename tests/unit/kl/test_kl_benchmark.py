"""benchmarks/kl.py: its variants compute the same gradients, and its rows are correct. Nothing is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import kl

ON_CPU = [name for name in kl.VARIANTS if "liger" not in name]


@pytest.fixture(scope="module")
def operands():
    return kl.Operands.random(72, 1000, (32, 64), "cpu", torch.float32)


@pytest.mark.parametrize("name", [name for name in ON_CPU if kl.VARIANTS[name].divergence])
def test_variants_compute_the_gradients_of_their_divergence(operands, name):
    gradients = kl.VARIANTS[name].run(operands, 16)
    for value, expected in zip(gradients, kl.exact_gradients(operands, kl.VARIANTS[name].divergence), strict=True):
        assert kl.relative_error(value[: len(expected)], expected) < 1e-5


def test_lower_bound_computes_the_four_products(operands):
    hidden, weight = kl.products(operands, 16)
    assert hidden.shape == operands.hidden.shape and weight.shape == operands.weight.shape


def test_number_of_gathers_per_chunk(operands):
    assert kl.gathers_per_chunk(operands, 16, "linear_divergence") == 1
    assert kl.gathers_per_chunk(operands, 16, "linear_divergence_jsd") == 2


def test_accuracy_rows_meet_their_bar():
    rows = kl.accuracy(128_256, "cpu")
    assert max(row["p_max"] for row in rows) > 0.99999 - 5e-6
    assert all(row["met"] for row in rows), rows


def test_ratios_compare_variants_at_their_fastest_chunk():
    row = {"vocab": 10, "peak_bytes": {3: 8, 5: 9}, "hidden_gradient_error": 1e-3, "weight_gradient_error": 1e-3}
    rows = [
        row | {"name": "linear_divergence", "chunk": 1, "seconds": 2.0},
        row | {"name": "linear_divergence", "chunk": 2, "seconds": 1.2, "peak_bytes": {3: 4, 5: 4}},
        row | {"name": "matrix_products", "chunk": None, "seconds": 1.0},
        row | {"name": "stored_logits_chunked", "chunk": 1, "seconds": 3.0, "peak_bytes": {3: 10, 5: 40, 7: 80}},
    ]
    ratios = kl.ratios(rows, "cuda")
    by_bar = {(row["to"], row["of"]): row for row in ratios if row["tokens"] in (None, 3)}
    assert by_bar["matrix_products", "seconds"]["ratio"] == pytest.approx(1.2)
    assert by_bar["matrix_products", "seconds"]["met"] and by_bar["matrix_products", "seconds"]["chunk"] == 2
    assert by_bar["stored_logits_chunked", "peak_bytes"]["ratio"] == pytest.approx(0.4)
    assert not by_bar["stored_logits_chunked", "peak_bytes"]["met"]
    assert [row["ratio"] for row in ratios if row["tokens"] == 5] == [pytest.approx(0.1)]
    assert len(ratios) == 4  # no row for variants that were not measured
