"""Load of experts and auxiliary loss of an update, against the routers' inputs in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Sample
from megatron_s2d.train.expert_load import ExpertLoad
from megatron_s2d.train.loop import aggregate_metrics
from megatron_s2d.train.megatron_model import MegatronModel

VOCAB, EXPERTS, TOP_K = 27, 4, 2


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


def samples() -> list[Sample]:
    rng = np.random.default_rng(3)
    batch = []
    for index, length in enumerate((9, 4, 7, 12, 3)):
        mask = np.arange(length) >= 2
        batch.append(
            Sample(
                id=str(index), prompt_id="p", group_id="g", domain="d", seed=0, temperature=1.0, finish_reason="stop",
                token_ids=rng.integers(0, VOCAB, length), response_mask=mask,
            )
        )  # fmt: skip
    return batch


def build(layout, max_tokens=24, **options) -> MegatronModel:
    config = ModelConfig(preset="tiny-moe", vocab_size=VOCAB, **options)
    model = MegatronModel(config.resolve(), layout, precision="float32", max_tokens=max_tokens, seed=1, options=config)
    model.prepare_training(OptimizerConfig(), 10)
    return model


def routers(model) -> list[TopKRouter]:
    return [module for module in model.chunks[0].modules() if isinstance(module, TopKRouter)]


def update(model) -> dict[str, float]:
    batch = samples()
    weights = {"supervised_weight": [1 / 20] * len(batch)}
    metrics = model.forward_backward(model.pack(batch, weights), sft_objective(), num_tokens=35)
    return {name: metric.value() for name, metric in metrics.items() if name.startswith("moe/")}


def expected(model) -> tuple[list[np.ndarray], list[float]]:
    """Return the counts of each layer [e], and the loss of each micro-batch and layer, from an update's inputs."""
    counts, losses = [np.zeros(EXPERTS) for _ in routers(model)], []

    def look(router, inputs, _):
        if not torch.is_grad_enabled():  # the first of the two passes with recomputation
            return
        hidden, padding = inputs
        rows = hidden.detach().flatten(0, 1)[~padding.flatten()].double()
        scores = torch.softmax(rows @ router.weight.detach().double().T, dim=1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(TOP_K).indices, 1)
        counts[router.layer_number - 1] += chosen.sum(0).numpy()
        share, probability = chosen.sum(0) / (TOP_K * len(rows)), scores.mean(0)
        losses.append(float(EXPERTS * (share * probability).sum()))

    handles = [router.register_forward_hook(look) for router in routers(model)]
    update(model)
    for handle in handles:
        handle.remove()
    return counts, losses


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_metrics_equal_the_definitions(layout, recompute):
    model = build(layout, recompute=recompute, moe_aux_loss_coeff=0.01)
    assert len(model.pack(samples(), {})) > 1  # micro-batches, with padding
    counts, losses = expected(model)
    model.score(samples())  # counts nothing
    metrics = update(model)
    assert sum(count.sum() for count in counts) == 35 * TOP_K * 2
    assert metrics["moe/load_max_over_mean"] == pytest.approx(max(c.max() / c.mean() for c in counts), abs=1e-12)
    assert metrics["moe/aux_loss"] == pytest.approx(np.mean(losses), rel=1e-5) and metrics["moe/aux_loss"] > 1
    assert metrics["moe/dropped_tokens"] == 0
    assert update(model) == metrics  # every update starts from zero


def test_a_deeper_model_after_another_counts_all_of_its_layers(layout):
    update(build(layout, moe_aux_loss_coeff=0.01, num_layers=1))
    assert update(build(layout, moe_aux_loss_coeff=0.01, num_layers=3))["moe/aux_loss"] > 1


def test_without_a_coefficient_there_is_no_loss_and_dense_models_have_no_metrics(layout):
    assert update(build(layout)).keys() == {"moe/load_max_over_mean", "moe/dropped_tokens"}
    config = ModelConfig(preset="tiny-student", vocab_size=VOCAB)
    dense = MegatronModel(config.resolve(), layout, precision="float32", max_tokens=64, seed=1, options=config)
    dense.prepare_training(OptimizerConfig(), 1)
    assert update(dense) == {}


def test_tokens_beyond_the_capacity_of_an_expert_are_counted(layout):
    model = build(layout)
    load = ExpertLoad(model.chunks, model.spec, layout)
    (router, *_) = routers(model)
    config, generator = router.config, torch.Generator().manual_seed(0)
    router.config = dataclasses.replace(
        config, moe_expert_capacity_factor=0.5, moe_token_drop_policy="probs", moe_token_dispatcher_type="alltoall"
    )
    hidden = torch.randn(10, 2, model.spec.hidden_size, generator=generator)
    with load.recording():
        _, routing_map = router(hidden, None)
    metrics = load.metrics(load.totals(1))
    dropped = 20 * TOP_K - int(routing_map.sum())
    assert dropped > 0 and metrics["moe/dropped_tokens"].value() == dropped


def test_the_row_of_a_step_has_the_worst_update(layout):
    metrics = [
        {name: metric for name, metric in load.items() if name.startswith("moe/")}
        for load in (_update_metrics(layout, 0.01), _update_metrics(layout, 0.01))
    ]
    row = aggregate_metrics(metrics, {}, 10, {"timing_s/step": 1.0})
    assert row["moe/load_max_over_mean"] == max(m["moe/load_max_over_mean"].value() for m in metrics)
    assert row["moe/dropped_tokens"] == 0


def _update_metrics(layout, coefficient):
    model, batch = build(layout, moe_aux_loss_coeff=coefficient), samples()
    weights = {"supervised_weight": [1 / 20] * len(batch)}
    return model.forward_backward(model.pack(batch, weights), sft_objective(), num_tokens=35)
