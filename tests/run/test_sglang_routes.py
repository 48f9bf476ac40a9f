"""Routes from a real SGLang server (routing replay of a mixture of experts); skipped if sglang is not installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import time

import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed (extra `sglang`)"),
]

torch = pytest.importorskip("torch")

from sglang_model import EOS, VOCAB_SIZE, change, make_requests, rollout_settings

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.sampling_client import single_turn
from megatron_s2d.rollout.served.backend import ServerRequirements
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.sglang.backend import sglang_server_group
from megatron_s2d.train.megatron_model import MegatronModel

SPEC = dataclasses.replace(
    ModelConfig(preset="tiny-moe").resolve(VOCAB_SIZE), initializer_range=0.25, num_experts=16, num_experts_per_tok=4
)
# SGLang 0.5.17's experts on a CPU fail in a pass without tokens, which its warm-up and cached prompts make.
ON_A_CPU = ["--disable-radix-cache", "--skip-server-warmup"]


@pytest.fixture(scope="module")
def policy() -> MegatronModel:
    initialize_distributed()
    layout = build_layout(ParallelConfig())
    return MegatronModel(SPEC, layout, precision="float32", max_tokens=2048, seed=3, routing_replay=True)


@pytest.fixture(scope="module")
def engine(policy, tmp_path_factory):
    extra = [] if torch.cuda.is_available() else ON_A_CPU
    engine = ServedEngine(
        sglang_server_group(
            policy.chunks, SPEC, policy.layout, policy.score,
            rollout_settings(extra_args=extra, async_mode="partial_rollout"), tmp_path_factory.mktemp("server"),
            requirements=ServerRequirements(500, params=SamplingParams(10, (EOS,)), routed_experts=True),
        )
    )  # fmt: skip
    yield engine
    engine.close()


def gap(policy, samples, version: int) -> float:
    """Largest difference of log-probabilities over the tokens that ``version`` sampled."""
    differences = [0.0]
    for sample, score in zip(samples, policy.score_replicated(samples), strict=True):
        for span in sample.weight_versions:
            if span.version == version:
                tokens = slice(span.start, span.stop)
                differences.append(float(np.abs(sample.rollout_log_probs - score)[tokens].max()))
    return max(differences)


def test_routes_of_the_server_fit_the_trainer_and_those_of_each_part_its_weights(policy, engine):
    samples = engine.generate(make_requests(8, 4, max_new_tokens=24))
    for sample in samples:
        assert sample.routed_experts.shape == (len(sample.token_ids) - 1, SPEC.num_layers, SPEC.num_experts_per_tok)
    assert gap(policy, samples, 0) < 1e-4
    shifted = [dataclasses.replace(s, routed_experts=np.roll(s.routed_experts, 1, axis=0)) for s in samples]
    assert gap(policy, shifted, 0) > 1

    requests = make_requests(4, 2, max_new_tokens=400, stop_token_ids=())
    engine.start({request.id: single_turn(request) for request in requests})
    time.sleep(3)
    before = {name: weight.clone() for name, weight in policy.chunks[0].state_dict().items() if weight is not None}
    change(policy, 0.1)
    engine.pause(interrupt=True)
    engine.update_weights(policy.chunks, 1)
    samples = list(engine.wait(lambda ended: len(ended) == len(requests)).values())
    versions = {tuple(span.version for span in sample.weight_versions) for sample in samples}
    assert (0, 1) in versions
    # Later tokens attend to earlier ones, which the server has computed again with the new weights, so only the first
    # part can be compared exactly.
    policy.chunks[0].load_state_dict(before)
    assert gap(policy, samples, 0) < 1e-4
