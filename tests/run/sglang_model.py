"""The model, requests and comparisons shared by the tests with a real SGLang server."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.training import RolloutConfig, ServerConfig, SglangConfig
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.train.megatron_model import MegatronModel

VOCAB_SIZE = 25  # of the embedded task's tokenizer
EOS = 1
SPEC = dataclasses.replace(ModelConfig(preset="tiny-student").resolve(VOCAB_SIZE), initializer_range=0.25)


def make_policy(layout: Layout) -> MegatronModel:
    """Build a model with wide initial weights (distributions far from uniform), the same at every layout."""
    return MegatronModel(SPEC, layout, precision="float32", max_tokens=2048, seed=3)


def change(policy: MegatronModel, amount: float) -> None:
    """Change every weight, in the same way at every layout."""
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.mul_(1 + amount).add_(amount / 10)


def rollout_settings(weight_sync: str = "disk", **settings) -> RolloutConfig:
    server = {name: settings.pop(name) for name in list(settings) if name in ServerConfig.model_fields}
    rollout = {name: settings.pop(name) for name in list(settings) if name in RolloutConfig.model_fields}
    return RolloutConfig(
        engine="sglang",
        max_batch_tokens=16_384,
        server=ServerConfig(**server),
        sglang=SglangConfig(weight_sync=weight_sync, bucket_bytes=40_000, **settings),
        **rollout,
    )


def make_requests(prompts: int = 4, groups: int = 3, **params) -> list[Request]:
    params = SamplingParams(**{"max_new_tokens": 10, "stop_token_ids": (EOS,), **params})
    generator = np.random.default_rng(2)
    requests = []
    for number in range(prompts):
        # Includes the last token of the vocabulary, whose id SGLang reports wrongly.
        token_ids = np.append(generator.integers(0, VOCAB_SIZE, 3 + number), VOCAB_SIZE - 1)
        prompt = Prompt(f"p{number}", token_ids, "", "math", None, None)
        for group in range(groups):
            seed = sample_seed(1, 0, prompt.id, group)
            requests.append(Request(f"p{number}#{group}@0", prompt, f"p{number}@0.0", seed, params))
    return requests


def rollout_gap(policy: MegatronModel, samples: list[Sample]) -> float:
    """Return the largest difference, in nats, between the engine's and the trainer's log-probabilities."""
    pairs = zip(samples, policy.score(samples), strict=True)
    return max(float(np.abs(sample.rollout_log_probs - score)[sample.response_mask].max()) for sample, score in pairs)
