"""The comparison of tests/gpu on a CPU, with the same tolerances: bfloat16 with float32, packed with padded."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "gpu"))

from parity_case import differences, divergence, loss_curve, measure, policy

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.parallel.layout import build_layout, initialize_distributed


@pytest.fixture(scope="module")
def layout():
    torch.set_num_threads(1)
    initialize_distributed()
    return build_layout(ParallelConfig())


@pytest.fixture(scope="module")
def float32(layout):
    return measure(layout, "float32")


def test_megatrons_gradient_buffers_equal_autograd(layout, float32):
    gaps = differences(measure(layout, "float32", plain=True), float32)
    assert gaps["log_prob_largest_gap"] == 0 and gaps["loss_relative_gap"] <= 1e-6
    assert gaps["least_cosine_of_a_tensor"] >= 1 - 1e-9


def test_packed_equals_padded_to_rounding(layout, float32):
    gaps = differences(measure(layout, "float32", packed=False), float32)
    print("packed against padded, float32:", gaps)
    assert gaps["log_prob_largest_gap"] <= 1e-5 and gaps["loss_relative_gap"] <= 1e-6
    assert gaps["least_cosine_of_a_tensor"] >= 1 - 1e-8


def test_bfloat16_against_float32(layout, float32):
    gaps = differences(measure(layout, "bfloat16"), float32)
    print("bfloat16 against float32:", gaps)
    padded = differences(measure(layout, "bfloat16", packed=False), measure(layout, "bfloat16"))
    print("packed against padded, bfloat16:", padded)
    assert padded["log_prob_mean_gap"] <= 0.01 and padded["gradient_cosine"] >= 0.999
    assert 0 < gaps["log_prob_mean_gap"] <= 0.03 and gaps["log_prob_largest_gap"] <= 0.25
    assert gaps["loss_relative_gap"] <= 2e-3
    assert gaps["gradient_cosine"] >= 0.998 and gaps["least_cosine_of_a_tensor"] >= 0.995
    assert 0 < divergence(layout, policy(layout, "bfloat16"), policy(layout, "float32")) <= 1e-3


@pytest.mark.slow
def test_loss_curves_of_both_precisions_agree(layout):
    expected, losses = (loss_curve(layout, precision, 25) for precision in ("float32", "bfloat16"))
    assert expected[-1] < 0.5 * expected[0]
    assert abs(losses - expected).mean() / expected[0] <= 0.05
