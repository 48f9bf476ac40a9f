"""Generates at several layouts in one launch of four ranks; rank 0 writes the results as JSON.

Started by test_rollout_layouts.py through torchrun. Data-parallel ranks take unequal shares of the same requests.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from open_layout import open_layout

from megatron_s2d import buffer_sizes
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.models import batched_experts
from megatron_s2d.models.build import build_model
from megatron_s2d.models.routing_replay import RoutingReplay
from megatron_s2d.parallel import layout as layouts
from megatron_s2d.parallel.trainable_model import forward_only
from megatron_s2d.records import Prompt
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.megatron.engine import MegatronEngine

from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # isort: skip

VOCAB_SIZE = 27
CASES = {
    "tiny-llama": {
        "one": {},
        "tp2": {"tensor_model_parallel_size": 2},
        "pp2": {"pipeline_model_parallel_size": 2},
        "tp2pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        "tp4": {"tensor_model_parallel_size": 4},
        "tp2pp2sp": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    },
    "tiny-moe": {
        "one": {},
        "pp2": {"pipeline_model_parallel_size": 2},
        "tp2sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "ep4": {"expert_model_parallel_size": 4},
        "ep2pp2": {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        "ep4tp2sp": {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    },
}


class Letters:
    """A tokenizer of one character per token."""

    @staticmethod
    def decode(token_ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


def requests() -> list[Request]:
    """Mixed prompt lengths, limits and parameters; most work at the end, so that ranks finish at different times."""
    generator = np.random.default_rng(0)
    batch = []
    for number in range(12):
        length = 1 + (5 * number) % 9
        prompt = Prompt(f"p{number}", generator.integers(0, VOCAB_SIZE, length), "", "math", None, None)
        params = SamplingParams(
            max_new_tokens=4 + number,
            stop_token_ids=(5,),
            temperature=(0.0, 1.0, 0.7)[number % 3],
            top_p=(1.0, 0.9)[number % 2],
            stop_strings=("ab", "q") if number % 4 == 0 else (),
        )
        for index in range(2):
            seed = sample_seed(1, 0, prompt.id, index)
            batch.append(Request(f"p{number}#{index}@0", prompt, f"p{number}@0.0", seed, params))
    return batch


def conversation(number: int):
    """An episode of one to three turns, whose second turns come while other rows are decoded."""

    async def episode(client) -> list[int]:
        tokens = requests()[number].prompt.token_ids
        for turn in range(1 + number % 3):
            params = SamplingParams(2 + number % 5, (5,))
            seed = sample_seed(1, turn, "turn", number)
            completion = await client.sample(tokens, params, seed=seed, request_id=f"c{number}.{turn}")
            tokens = np.concatenate([tokens, completion.token_ids, [1]])
        return tokens.tolist()

    return episode


def forward_step(model, sequence: tuple[torch.Tensor, float]):
    tokens, temperature = sequence
    # A sharded sequence has to divide by the tensor ranks; what follows a token does not change it.
    padded = torch.nn.functional.pad(tokens, (0, -len(tokens) % 4))[None]
    output = model(padded, None, None)

    def result(logits, non_loss_data=True):
        logits = gather_from_tensor_model_parallel_region(logits)[0, : len(tokens) - 1, :VOCAB_SIZE]
        log_probs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        return log_probs.gather(1, tokens[1:, None]).squeeze(1)

    return output, result


def run(preset: str, parallel: ParallelConfig) -> dict:
    with open_layout(parallel) as layout:
        return run_at(layout, preset)


def run_at(layout: layouts.Layout, preset: str) -> dict:
    """Samples of all data ranks, and how far their log-probabilities are from a full forward at this layout."""
    parallel = layout.config
    # As on a GPU: ranks then decode behind the ends of responses.
    buffer_sizes.POSITIONS_PER_CHECK["cpu"] = 1 if parallel.world_size == parallel.data_parallel_size else 5
    spec = dataclasses.replace(ModelConfig(preset=preset).resolve(VOCAB_SIZE), initializer_range=0.25)
    chunks = build_model(spec, layout, seed=3)
    chunks[0].train()
    cuts = {1: [], 2: [6], 4: [2, 7, 14]}[layout.dp_size]
    shares = np.split(np.arange(len(requests())), cuts)
    mine = [requests()[index] for index in shares[layout.dp_rank]]
    replay = RoutingReplay(chunks, spec, layout) if spec.num_experts else None
    engine = MegatronEngine(chunks, VOCAB_SIZE, layout, tokenizer=Letters, max_batch_size=9, routing_replay=replay)
    engine.update_weights(chunks, 2)
    # As on a GPU; passes with more rows send every token to its experts.
    engine._passes.batches_experts = layout.config.expert_model_parallel_size > 1
    batched_experts.MOST_ROWS = 16
    samples = engine.generate(mine)
    assert chunks[0].training and chunks[0].config.sequence_parallel == parallel.sequence_parallel

    # Every replica runs all episodes; ranks that do not produce pass none.
    episodes = [conversation(number) for number in range(12)]
    conversations = engine.run(episodes if layout.is_replica_root else [])
    assert layout.is_replica_root or conversations == []

    worst = 0.0
    if layout.config.expert_model_parallel_size <= layout.tp_size:  # otherwise unequal shares would have to meet
        sequences = [(torch.from_numpy(sample.token_ids), sample.temperature) for sample in samples]
        expected = forward_only(chunks, layout, forward_step, sequences)
        for sample, log_probs in zip(samples, expected, strict=False):
            difference = torch.from_numpy(sample.rollout_log_probs)[1:] - log_probs
            worst = max(worst, float(difference[sample.response_mask[1:]].abs().max()))
    by_id = {
        sample.id: {
            "tokens": sample.token_ids.tolist(),
            "log_probs": sample.rollout_log_probs.tolist(),
            "reason": sample.finish_reason,
            "routes": None if replay is None else np.sort(sample.routed_experts, axis=2).tolist(),
        }
        for sample in samples
    }
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (by_id, worst, conversations))
    # Ranks of one replica must have returned the same; the union over replicas is everything.
    merged: dict = {}
    same = True
    for part, *_ in everyone:
        for name, sample in part.items():
            same = same and merged.setdefault(name, sample) == sample
    return {
        "samples": merged,
        "same": same,
        "worst": max(difference for _, difference, _ in everyone),
        "conversations": [part for *_, part in everyone if part],
    }


def different_requests() -> str:
    """Error message that ranks of one replica raise when their requests differ."""
    with open_layout(ParallelConfig(tensor_model_parallel_size=4)) as layout:
        return error_of_different_requests(layout)


def error_of_different_requests(layout: layouts.Layout) -> str:
    spec = ModelConfig(preset="tiny-llama").resolve(VOCAB_SIZE)
    engine = MegatronEngine(build_model(spec, layout, seed=3), VOCAB_SIZE, layout)
    plain = [request for request in requests() if not request.params.stop_strings]
    mine = [dataclasses.replace(request, seed=dist.get_rank()) for request in plain]
    try:
        engine.generate(mine)
    except RuntimeError as error:
        message = str(error)
    else:
        message = ""
    messages: list = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages[-1]


def main() -> None:
    torch.set_num_threads(1)
    layouts.initialize_distributed()
    results = {}
    for preset, cases in CASES.items():
        for name in [name for name in cases if f"{preset}/{name}" in sys.argv[2:]]:
            fields = cases[name]
            taken = fields.get("tensor_model_parallel_size", 1) * fields.get("pipeline_model_parallel_size", 1)
            results[f"{preset}/{name}"] = run(preset, ParallelConfig(**fields, data_parallel_size=4 // taken))
    results["different_requests"] = different_requests()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results), encoding="utf-8")
    layouts.shutdown_distributed()


if __name__ == "__main__":
    main()
