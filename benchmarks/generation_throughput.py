"""Throughput of the in-process engine: random prompts, sampled responses of full length.

    python benchmarks/generation_throughput.py [--json OUT]

The engine launches kernels one by one for every token (no CUDA graphs): small batches are bound by launches and large
ones by memory bandwidth. ``roofline`` is the minimum time to read weights, keys and values at the bandwidth of the data
sheet, divided by the measured time.
"""

from __future__ import annotations

import numpy as np
from device_common import ON_GPU, begin, current_gpu, random_policy, seconds_of, spec_of

from megatron_s2d.config.hardware import AssumptionsConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.estimate.layers import Build
from megatron_s2d.estimate.roofline import Machine, ModelOnMachine
from megatron_s2d.parallel import device
from megatron_s2d.records import Prompt
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.megatron.engine import MegatronEngine

GPU_CASES = (("qwen3-1.7b", 32, 8, 512, 128), ("qwen3-1.7b", 1, 1, 512, 128), ("qwen3-8b", 32, 8, 512, 128))
CPU_CASES = (("tiny-student", 2, 3, 6, 5),)


def make_requests(vocab_size: int, prompts: int, group: int, prompt_tokens: int, tokens: int) -> list[Request]:
    """Return requests for ``group`` responses of ``tokens`` tokens to each of ``prompts`` random prompts."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_new_tokens=tokens, stop_token_ids=(), temperature=1.0)
    requests = []
    for number in range(prompts):
        prompt = Prompt(f"p{number}", rng.integers(0, vocab_size, prompt_tokens), "", "math", None, None)
        for index in range(group):
            seed = sample_seed(1, 0, prompt.id, index)
            requests.append(Request(f"p{number}#{index}@0", prompt, f"p{number}@0.0", seed, params))
    return requests


def roofline(spec, rows: int, prompt: int, response: int) -> float | None:
    """Return the decode seconds at the memory bandwidth of the data sheet; None without a data sheet."""
    gpu = current_gpu()
    if gpu is None:
        return None
    machine = Machine(gpu, AssumptionsConfig(memory_efficiency=1.0, matmul_efficiency=1.0))
    return ModelOnMachine(spec, ParallelConfig(), Build(2, fused=True), machine).decode_seconds(rows, prompt, response)


def main(arguments: list[str] | None = None) -> None:
    setup = begin(__doc__.splitlines()[0], arguments, repeats=2)
    policies = {}
    for preset, prompts, group, prompt_tokens, tokens in GPU_CASES if ON_GPU else CPU_CASES:
        if preset not in policies:
            policies = {preset: random_policy(spec_of(preset), setup.layout)}
        spec = policies[preset].spec
        engine = MegatronEngine(policies[preset].chunks, spec.vocab_size, setup.layout)
        batch = make_requests(spec.vocab_size, prompts, group, prompt_tokens, tokens)
        seconds = seconds_of(lambda engine=engine, batch=batch: engine.generate(batch), setup.repeats, warm_up=1)
        min_seconds = roofline(spec, prompts * group, prompt_tokens, tokens)
        setup.add(
            preset=preset,
            prompts=prompts,
            group=group,
            prompt_tokens=prompt_tokens,
            response_tokens=tokens,
            transformer_engine=device.capabilities().transformer_engine,
            seconds=seconds,
            tokens_per_second=len(batch) * tokens / seconds,
            roofline=None if min_seconds is None else min_seconds / seconds,
        )


if __name__ == "__main__":
    main()
