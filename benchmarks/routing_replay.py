"""The gap between engine and trainer in bfloat16: a dense model, and a mixture of experts with and without replay.

Both sides are this project's, on a CPU, with random weights wide enough for distributions far from uniform. What
differs is what differs on a GPU too: one token at a time with a KV cache on one side, whole sequences on the other.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.train.megatron_model import MegatronModel

VOCAB_SIZE, PROMPTS, GROUP, RESPONSE = 64, 64, 4, 48
MODELS = {
    "dense": {"preset": "tiny-teacher", "num_layers": 4},
    "32 experts, 4 per token": {
        "preset": "tiny-moe", "num_layers": 4, "num_experts": 32, "num_experts_per_tok": 4,
    },
}  # fmt: skip


def make_requests() -> list[Request]:
    generator, requests = np.random.default_rng(0), []
    for number in range(PROMPTS):
        prompt = Prompt(f"p{number}", generator.integers(0, VOCAB_SIZE, 4 + number % 9), "", "math", None, None)
        for index in range(GROUP):
            seed = sample_seed(1, 0, prompt.id, index)
            params = SamplingParams(RESPONSE, ())
            requests.append(Request(f"p{number}#{index}@0", prompt, f"p{number}@0.0", seed, params))
    return requests


def gap(model: MegatronModel, samples: list[Sample]) -> tuple[float, float, float]:
    """Mean and maximum of the difference, and the k3 estimate of the KL, in nats."""
    pairs = zip(samples, model.score(samples), strict=True)
    ratio = np.concatenate([(score - s.rollout_log_probs)[s.response_mask] for s, score in pairs]).astype(np.float64)
    return float(np.abs(ratio).mean()), float(np.abs(ratio).max()), float((np.exp(ratio) - ratio - 1).mean())


def main() -> None:
    initialize_distributed()
    layout = build_layout(ParallelConfig())
    print("| model | replay | mean difference | maximum | k3 KL |\n|---|---|---|---|---|")
    for name, fields in MODELS.items():
        config = ModelConfig(**{"vocab_size": VOCAB_SIZE, "initializer_range": 0.2, **fields})
        model = MegatronModel(
            config.resolve(), layout, precision="bfloat16", max_tokens=4096, seed=1,
            routing_replay=name != "dense",
        )  # fmt: skip
        engine = MegatronEngine(model.chunks, VOCAB_SIZE, layout, routing_replay=model.routing_replay)
        samples = engine.generate(make_requests())
        cases = {"": samples}
        if model.routing_replay is not None:
            own = [dataclasses.replace(sample, routed_experts=None) for sample in samples]
            cases = {"off": own, "on": samples}
        for replay, batch in cases.items():
            mean, largest, kl = gap(model, batch)
            print(f"| {name} | {replay} | {mean:.4f} | {largest:.2f} | {kl:.1e} |", flush=True)


if __name__ == "__main__":
    main()
