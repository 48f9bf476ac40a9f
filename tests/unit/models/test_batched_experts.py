"""Experts of decoded tokens as batched products give what Megatron-Core's layer gives, in the weights as they lie."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from test_routing_replay import EXPERTS, build

from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.models import batched_experts
from megatron_s2d.models.batched_experts import BatchedExperts
from megatron_s2d.parallel.layout import build_layout, initialize_distributed


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


def layers(model) -> list[MoELayer]:
    return [module for module in model.chunks[0].modules() if isinstance(module, MoELayer)]


@pytest.mark.parametrize("trained", [False, True])
def test_every_token_gets_the_output_of_its_experts(layout, trained):
    model = build(layout)
    if trained:  # its weights lie in the optimizer's buffer, in reverse
        model.prepare_training(OptimizerConfig(), 10)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    experts = BatchedExperts(model.chunks[0], layout)
    assert experts.is_possible
    assert (places == [parameter.data_ptr() for parameter in model.parameters()]) == trained
    hidden = torch.randn(1, 5, model.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    for moe in layers(model):
        with torch.no_grad(), layout.active():
            expected, _ = moe(hidden)
            experts.begin_pass(experts.padded_rows(5))
            torch.testing.assert_close(experts.run(moe, hidden), expected, rtol=1e-5, atol=1e-5)


def test_rows_are_padded_to_few_numbers_up_to_a_limit(layout):
    experts = BatchedExperts(build(layout).chunks[0], layout)
    assert [experts.padded_rows(rows) for rows in (0, 1, 3, 4, 5, 512, 513)] == [1, 1, 4, 4, 8, 512, None]


@pytest.mark.parametrize(("target", "batched"), [("q_proj", True), ("experts", False)])
def test_experts_with_adapters_are_not_batched(layout, target, batched):
    model = build(layout)
    model.add_adapter(LoraConfig(rank=2, targets=[target]), seed=0)
    assert BatchedExperts(model.chunks[0], layout).is_possible == batched


def test_weights_that_lie_elsewhere_are_not_batched(layout):
    model = build(layout)
    model.prepare_training(OptimizerConfig(), 10)
    moe = layers(model)[0]
    weight = moe.experts.local_experts[EXPERTS - 1].linear_fc2.weight
    weight.data = weight.data.clone()
    assert batched_experts._stacked(moe) is None
