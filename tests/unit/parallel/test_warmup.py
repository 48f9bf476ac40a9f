"""Learning rates of the updates: every one moves the weights, the warm-up's first included."""

import pytest
import torch

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.train.megatron_model import MegatronModel


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


def learning_rates(layout, updates: int, **settings) -> list[float]:
    """Return the learning rate that each update uses; the weights must change in every one."""
    spec = ModelConfig(preset="tiny-student", vocab_size=27).resolve()
    model = MegatronModel(spec, layout, precision="float32", max_tokens=16, seed=1)
    model.prepare_training(OptimizerConfig(**settings), updates)
    rates = []
    for _ in range(updates):
        before = [parameter.detach().clone() for parameter in model.chunks[0].parameters()]
        for parameter in model.chunks[0].parameters():
            parameter.main_grad.fill_(1.0)
        rates.append(model.trainable.optimizer.param_groups[0]["lr"])
        model.optim_step()
        after = model.chunks[0].parameters()
        assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return rates


def test_no_update_of_the_warmup_is_lost(layout):
    rates = learning_rates(layout, 6, lr=8e-3, warmup_steps=3)
    assert rates == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 8e-3, 8e-3])


def test_without_warmup_the_peak_comes_first_and_the_decay_ends_above_its_minimum(layout):
    rates = learning_rates(layout, 4, lr=8e-3, lr_schedule="linear")
    assert rates == pytest.approx([8e-3, 6e-3, 4e-3, 2e-3])
