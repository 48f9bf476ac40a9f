"""Routing replay on one rank: what the engine records is what the trainer computes with, and the rest is unchanged."""

import dataclasses

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.errors import UserError
from megatron_s2d.models.replayed_dispatch import ReplayedDispatcher
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Prompt, Sample, sample_from_json, sample_to_json
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.rollout.served.routes import route_problem
from megatron_s2d.train.loop import check_replayed_agreement
from megatron_s2d.train.megatron_model import MegatronModel

VOCAB, EXPERTS, TOP_K, LAYERS = 27, 16, 4, 2


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


def build(layout, preset="tiny-moe", *, precision="float32", replay=True, packed=False, **options) -> MegatronModel:
    moe = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K} if preset == "tiny-moe" else {}
    # Wide initial weights, so that experts and distributions are far from uniform.
    config = ModelConfig(**{"preset": preset, "vocab_size": VOCAB, "initializer_range": 0.25, **moe, **options})
    return MegatronModel(
        config.resolve(), layout, precision=precision, max_tokens=64, seed=1, options=config, packed=packed,
        routing_replay=replay,
    )  # fmt: skip


def generate(model, layout, prompts=8, groups=3, version=0) -> list[Sample]:
    generator, params, requests = np.random.default_rng(0), SamplingParams(12, (5,)), []
    for number in range(prompts):
        prompt = Prompt(f"p{number}", generator.integers(0, VOCAB, 3 + number % 5), "", "math", None, None)
        for group in range(groups):
            seed = sample_seed(1, 0, prompt.id, group)
            requests.append(Request(f"p{number}#{group}@0", prompt, f"p{number}@0.0", seed, params))
    engine = MegatronEngine(model.chunks, VOCAB, layout, max_batch_size=7, routing_replay=model.routing_replay)
    engine.update_weights(model.chunks, version)
    return engine.generate(requests)


def without_routes(samples) -> list[Sample]:
    return [dataclasses.replace(sample, routed_experts=None) for sample in samples]


def with_random_routes(samples, seed=0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        dataclasses.replace(
            sample,
            routed_experts=np.argsort(rng.random((len(sample.token_ids) - 1, LAYERS, EXPERTS)), axis=2)[
                :, :, :TOP_K
            ].astype(np.uint8),
        )
        for sample in samples
    ]


def gaps(model, samples) -> np.ndarray:
    """Differences of the engine's log-probabilities from the trainer's, in nats, of all response tokens."""
    pairs = zip(samples, model.score(samples), strict=True)
    return np.concatenate([np.abs(s.rollout_log_probs - score)[s.response_mask] for s, score in pairs])


def gradients(model, samples) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of a policy gradient with advantages of both signs, on policy."""
    if model.trainable is None:
        model.prepare_training(OptimizerConfig(), 10)
    rng = np.random.default_rng(2)
    batch = [
        dataclasses.replace(sample, advantages=np.where(sample.response_mask, rng.normal(), 0).astype(np.float32))
        for sample in samples
    ]
    num_tokens = sum(len(sample.token_ids) for sample in batch)
    batches = model.pack(batch, {"policy_weight": [1 / num_tokens] * len(batch)})
    assert len(batches) > 2
    metrics = model.forward_backward(
        batches, grpo_objective(Surrogate(on_policy=True), kl_loss_coef=0.0), num_tokens=num_tokens
    )
    names = model.trainable.chunks[0].named_parameters()
    return {name: metric.value() for name, metric in metrics.items()}, {n: p.main_grad.clone() for n, p in names}


def test_in_bfloat16_engine_and_trainer_are_as_close_as_for_a_dense_model(layout):
    dense = build(layout, "tiny-teacher", precision="bfloat16", replay=False)
    of_dense = gaps(dense, generate(dense, layout, prompts=48))
    model = build(layout, precision="bfloat16")
    samples = generate(model, layout, prompts=48)
    replayed, chosen_anew = gaps(model, samples), gaps(model, without_routes(samples))
    assert replayed.mean() < 1.3 * of_dense.mean()
    # Few tokens change their experts, and those by much: 0.43 against 0.10 nats.
    assert chosen_anew.mean() > 1.15 * replayed.mean() and chosen_anew.max() > 2 * replayed.max()
    shuffled = [
        dataclasses.replace(s, routed_experts=np.random.default_rng(0).permutation(s.routed_experts)) for s in samples
    ]
    assert gaps(model, shuffled).mean() > 10 * replayed.mean()


def test_routes_are_of_the_tokens_of_prompt_and_response(layout):
    model = build(layout)
    samples = generate(model, layout)
    for sample in samples:
        assert sample.routed_experts.dtype == np.uint8
        assert sample.routed_experts.shape == (len(sample.token_ids) - 1, LAYERS, TOP_K)
        assert route_problem(sample.routed_experts, model.spec) == ""
    # The routers of a full forward pass choose the same in float32: no row, layer or sample is exchanged.
    metrics, _ = gradients(model, samples)
    assert metrics["moe/replayed_agreement"] == metrics["moe/replayed_agreement_min"] == 1.0
    assert not RouterReplay.global_router_replay_instances  # models do not replay each other's routes


def test_own_choices_give_the_gradients_of_no_replay_and_the_router_learns(layout):
    model, plain = build(layout), build(layout, replay=False)
    samples = generate(model, layout)
    (metrics, replayed), (expected_metrics, expected) = gradients(model, samples), gradients(plain, samples)
    assert metrics["loss"] == expected_metrics["loss"]
    for name, gradient in expected.items():
        torch.testing.assert_close(replayed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    routers = [gradient for name, gradient in replayed.items() if name.endswith("router.weight")]
    assert len(routers) == LAYERS and all(gradient.abs().max() > 1e-3 for gradient in routers)
    # After training, scores without routes and generation are those of the routers again.
    for own, other in zip(model.score(without_routes(samples)), plain.score(samples), strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("options", [{"recompute": "full"}, {"recompute": "selective"}, {"packed": True}])
def test_recomputation_and_packing_replay_the_same_experts(layout, options):
    """With experts that no router would choose, a recomputation that chose for itself would give other gradients."""
    samples = with_random_routes(generate(build(layout), layout))
    metrics, expected = gradients(build(layout), samples)
    other_metrics, other = gradients(build(layout, **options), samples)
    assert metrics["moe/replayed_agreement"] < 0.4  # chance: 4 of 16
    assert other_metrics["moe/replayed_agreement"] == metrics["moe/replayed_agreement"]
    for name, gradient in expected.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_router_weighs_the_replayed_experts_itself(layout):
    """Probabilities are the softmax over the replayed experts' logits, in float64 within 1e-6."""
    model = build(layout)
    samples = with_random_routes(generate(model, layout))
    worst, seen = 0.0, []

    def compare(router, inputs, output):
        nonlocal worst
        chosen = output[1].bool()
        logits = inputs[0].flatten(0, 1).double() @ router.weight.double().T
        expected = torch.softmax(logits.masked_fill(~chosen, -torch.inf), dim=1)
        worst = max(worst, float((expected - output[0]).abs().max()))
        seen.append((router.layer_number, chosen, inputs[1].reshape(-1)))

    routers = [module for module in model.chunks[0].modules() if isinstance(module, TopKRouter)]
    handles = [router.register_forward_hook(compare) for router in routers]
    model.score(samples)
    for handle in handles:
        handle.remove()
    assert worst < 1e-6
    for layer in range(1, LAYERS + 1):  # every token except the last of a sequence went to its own experts
        counts = sum(chosen[~padding].sum(0) for number, chosen, padding in seen if number == layer)
        replayed = np.bincount(
            np.concatenate([s.routed_experts[:, layer - 1].reshape(-1) for s in samples]), minlength=EXPERTS
        )
        rest = counts.numpy() - replayed
        assert rest.min() >= 0 and rest.sum() == len(samples) * TOP_K


def test_the_load_balancing_loss_is_of_the_routers_own_choice(layout):
    """Replay would otherwise push a router that is balanced away from experts that an older one chose."""

    samples = generate(build(layout), layout)
    # The first layer's own choice and four experts for everybody in the second: the inputs of both stay the same.
    changed = []
    for sample in samples:
        routes = sample.routed_experts.copy()
        routes[:, 1] = np.arange(TOP_K)
        changed.append(dataclasses.replace(sample, routed_experts=routes))
    plain = gradients(build(layout, moe_aux_loss_coeff=0.1, replay=False), samples)[0]
    replayed = gradients(build(layout, moe_aux_loss_coeff=0.1), changed)[0]
    assert replayed["moe/aux_loss"] == pytest.approx(plain["moe/aux_loss"], rel=1e-6)
    # The load is that of the replayed choices: a quarter of the experts have nearly all tokens.
    assert plain["moe/load_max_over_mean"] < 3 < replayed["moe/load_max_over_mean"] < EXPERTS / TOP_K


@pytest.mark.parametrize(
    "change", ["of other layers", "of other samples", pytest.param("of other tokens", marks=pytest.mark.slow)]
)
def test_routes_that_do_not_fit_stop_the_run_before_the_update(layout, change):
    model = build(layout)
    samples = generate(model, layout)
    rng = np.random.default_rng(0)
    if change == "of other tokens":
        routes = [rng.permutation(sample.routed_experts) for sample in samples]
    elif change == "of other layers":
        routes = [sample.routed_experts[:, ::-1].copy() for sample in samples]
    else:
        rows = np.concatenate([sample.routed_experts for sample in samples])
        cuts = np.cumsum([len(sample.routed_experts) for sample in samples])[:-1]
        routes = np.split(np.roll(rows, 17, axis=0), cuts)
    wrong = [dataclasses.replace(s, routed_experts=experts) for s, experts in zip(samples, routes, strict=True)]
    model.prepare_training(OptimizerConfig(), 10)
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    objective = grpo_objective(Surrogate(on_policy=True), kl_loss_coef=0.0)
    for batch, fits in ((samples, True), (wrong, False)):
        batch = [dataclasses.replace(s, advantages=s.response_mask.astype(np.float32)) for s in batch]
        batches = model.pack(batch, {"policy_weight": [1 / num_tokens] * len(batch)})
        metrics = model.forward_backward(batches, objective, num_tokens=num_tokens)
        check_replayed_agreement(metrics, None, model, 7)  # not limited
        if fits:
            check_replayed_agreement(metrics, 0.5, model, 7)
        else:
            with pytest.raises(UserError, match=r"step 7: .* \(chance: 0.250\): the routes do not fit the tokens"):
                check_replayed_agreement(metrics, 0.5, model, 7)


def test_routes_survive_files_and_records_without_them_can_be_read(layout):
    sample = generate(build(layout), layout, prompts=1, groups=1)[0]
    line = sample_to_json(sample)
    read = sample_from_json(line)
    np.testing.assert_array_equal(read.routed_experts, sample.routed_experts)
    assert read.routed_experts.dtype == np.uint8
    plain = sample_to_json(dataclasses.replace(sample, routed_experts=None))
    assert "routed_experts" not in plain and sample_from_json(plain).routed_experts is None


def test_dense_models_are_refused_and_many_experts_take_two_bytes(layout):
    with pytest.raises(UserError, match="routing replay needs a mixture of experts"):
        build(layout, "tiny-student")
    spec = build(layout).spec
    sizes = {count: dataclasses.replace(spec, num_experts=count).expert_index_dtype for count in (256, 257)}
    assert sizes == {256: "uint8", 257: "int16"}


@pytest.mark.parametrize("options", [{}, {"recompute": "full"}, {"packed": True}])
def test_numbers_of_tokens_come_from_the_routes_and_not_from_the_device(layout, monkeypatch, options):
    """Where all tokens have routes; they are the numbers that the dispatcher counts in the routing map."""
    model = build(layout, **options)
    samples = generate(model, layout)
    known = []

    def preprocess(self, routing_map):
        tokens = preprocess_known(self, routing_map)
        known.append(self._is_known)
        assert torch.equal(tokens, routing_map.sum(0))
        return tokens

    preprocess_known = ReplayedDispatcher.preprocess
    monkeypatch.setattr(ReplayedDispatcher, "preprocess", preprocess)
    replayed, _ = gradients(model, samples)
    assert all(known) and len(known) > 2 * LAYERS
    # One sample without a record: the router chooses for its tokens, in its micro-batch only.
    known.clear()
    others, _ = gradients(model, [*samples[:-1], dataclasses.replace(samples[-1], routed_experts=None)])
    assert set(known) == {False, True}
    assert others["loss"] == pytest.approx(replayed["loss"], rel=1e-5)
    known.clear()
    model.score(samples)
    assert all(known)
