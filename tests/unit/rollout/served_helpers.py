"""Toy model and engine of the tests of served engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from fake_sglang import log_prob_table

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.training import RolloutConfig, ServerConfig, SglangConfig
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.sampling_client import single_turn
from megatron_s2d.rollout.served.backend import NO_REQUIREMENTS
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.sglang.backend import sglang_server_group

VOCAB_SIZE = 27
SPEC = dataclasses.replace(ModelConfig(preset="tiny-student").resolve(VOCAB_SIZE), initializer_range=0.1)
SGLANG = SglangConfig(startup_timeout_seconds=60.0)
SERVER = ServerConfig(max_attempts=2, request_timeout_seconds=30.0)


def embedding_of(chunks) -> np.ndarray:
    """The model's token embedding, which is all that the toy servers use."""
    return chunks[0].embedding.word_embeddings.weight.detach()[:VOCAB_SIZE].numpy()


def toy_score(chunks):
    """The trainer's own forward, for the toy model."""

    def score(samples):
        scores = []
        for sample in samples:
            table = log_prob_table(embedding_of(chunks), sample.temperature or 1.0).astype(np.float32)
            values = np.zeros(len(sample.token_ids), np.float32)
            values[1:] = table[sample.token_ids[:-1], sample.token_ids[1:]]
            scores.append(np.where(sample.response_mask, values, 0))
        return scores

    return score


def make_engine(
    chunks,
    layout,
    directory,
    servers=(),
    requirements=NO_REQUIREMENTS,
    tokenizer=None,
    spec=SPEC,
    score=None,
    lora=None,
    **settings,
) -> ServedEngine:
    """An engine attached to ``servers``, or with servers of its own; settings of any section by name."""
    parts = {
        kind: {name: value for name, value in settings.items() if name in kind.model_fields}
        for kind in (SglangConfig, ServerConfig, RolloutConfig)
    }
    rollout = RolloutConfig(
        engine="sglang",
        sglang=SGLANG.model_copy(update=parts[SglangConfig]),
        server=SERVER.model_copy(update=parts[ServerConfig]),
        **parts[RolloutConfig],
    )
    urls = [server.url for server in servers]
    return ServedEngine(
        sglang_server_group(
            chunks,
            spec,
            layout,
            score or toy_score(chunks),
            rollout,
            directory,
            urls=urls,
            requirements=requirements,
            tokenizer=tokenizer,
            lora=lora,
        )
    )


def make_requests(prompts=4, groups=3) -> list[Request]:
    params = SamplingParams(6, (3,))
    generator = np.random.default_rng(1)
    requests = []
    for number in range(prompts):
        prompt = Prompt(f"p{number}", generator.integers(0, VOCAB_SIZE, 2 + number), "", "math", None, None)
        for group in range(groups):
            seed = sample_seed(1, 0, prompt.id, group)
            requests.append(Request(f"p{number}#{group}@0", prompt, f"p{number}@0.0", seed, params))
    return requests


def start(engine, requests: Sequence[Request]) -> None:
    """Let the engine answer ``requests`` beside this thread."""
    engine.start({request.id: single_turn(request) for request in requests})


def finish(engine, requests: Sequence[Request]) -> list[Sample]:
    """Wait for ``requests``, which were started; what else has ended is kept for later calls."""
    samples = engine.__dict__.setdefault("taken_by_tests", {})
    samples |= engine.wait(lambda ended: ended | samples.keys() >= {request.id for request in requests})
    return [samples.pop(request.id) for request in requests]


def change_weights(chunks) -> None:
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.add_(0.05)


def tokens(samples) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in samples]


def max_difference(chunks, samples) -> float:
    """Largest difference of the rollout log-probabilities from the trainer's, in nats."""
    pairs = zip(samples, toy_score(chunks)(samples), strict=True)
    return max(float(np.abs(sample.rollout_log_probs - score).max()) for sample, score in pairs)
