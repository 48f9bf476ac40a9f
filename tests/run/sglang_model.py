"""The model, workflow, requests and comparisons shared by the tests with a real SGLang server."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.training import RolloutConfig, ServerConfig, SglangConfig
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.served.backend import NO_REQUIREMENTS, ServerRequirements
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.sglang.backend import sglang_server_group
from megatron_s2d.train.megatron_model import MegatronModel

WORKFLOW = """
name: served
seed: 1
tokenizer: task:modular_arithmetic
precision: float32
lengths: {max_prompt_length: 16}
models:
  student: {preset: tiny-student}
data:
  corpus: {type: task, split: corpus, num_operations: 2}
  pool: {type: task, split: pool, num_operations: 2, num_prompts: 64}
  problems: {type: task, split: eval, num_operations: 2, num_prompts: 32}
rollout: {engine: sglang, max_mismatch_kl: 1.0e-6}
stages:
  base: {type: sft, model: student, data: corpus, steps: 40, global_batch_size: 64, optimizer: {lr: 5.0e-3}}
  grpo:
    type: grpo
    init: base
    prompts: pool
    steps: 3
    train_batch_size: 8
    num_generations: 4
    sampling: &sampling {temperature: 1.0, max_response_length: 8}
    optimizer: {lr: 1.0e-3}
  opd:
    {type: opd, init: grpo, teacher: base, prompts: pool, steps: 2, train_batch_size: 4, num_generations: 2,
     num_mini_batches: 2, sampling: *sampling, optimizer: {lr: 1.0e-3}}
arms: {opd: opd}
evaluation: {prompts: problems, samples_per_prompt: 2, sampling: *sampling}
"""
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


def make_engine(
    policy: MegatronModel,
    tokenizer: Any,
    directory: Path,
    weight_sync: str = "disk",
    *,
    urls: list[str] | None = None,
    requirements: ServerRequirements | None = None,
    lora: LoraConfig | None = None,
    **settings,
) -> ServedEngine:
    """Return an engine on the servers at ``urls``, or on servers that it starts."""
    return ServedEngine(sglang_server_group(
        policy.chunks, SPEC, policy.layout, policy.score_replicated,
        rollout_settings(weight_sync, **settings), directory,
        urls=urls or (), requirements=requirements or NO_REQUIREMENTS, tokenizer=tokenizer, lora=lora,
    ))  # fmt: skip


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
    pairs = zip(samples, policy.score_replicated(samples), strict=True)
    return max(float(np.abs(sample.rollout_log_probs - score)[sample.response_mask].max()) for sample, score in pairs)
