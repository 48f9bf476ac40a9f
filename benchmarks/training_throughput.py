"""Throughput and MFU of a complete update (forward, backward, clipping, Adam) with random weights, bf16 and FP8.

    python benchmarks/training_throughput.py [--json OUT]

One sequence of 4,096 or of 16,384 tokens per micro-batch, four or two micro-batches per update, supervised loss at
every position. Shapes are those of Qwen3-1.7B (all layers) and Qwen3-8B, with as many layers as fit together with
Adam's state (``s2d plan``'s estimate, 85 % of the memory). Targets on one H200: MFU of at least 45 % in bf16, FP8 at
least 1.3 times bf16 at the 8B shape. MFU counts 3 x the FLOPs of the forward pass, without recomputation, against the
bf16 peak.
"""

from __future__ import annotations

import dataclasses

import torch
from device_common import (
    ON_GPU,
    Setup,
    begin,
    forward_flops,
    mfu,
    random_policy,
    random_samples,
    release,
    seconds_of,
    spec_of,
)

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import Fp8Config
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.estimate.layers import Build, MicroBatchShape, ModelShard
from megatron_s2d.estimate.memory import Workload, train_phase, trained_memory
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.parallel import device


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's shape and the length of its sequences."""

    preset: str
    tokens: int
    fp8: str | None = None  # recipe

    @property
    def micro_batches(self) -> int:
        return 2 if self.tokens > 4096 else 4


GPU_CASES = (
    Case("qwen3-1.7b", 4096),
    Case("qwen3-8b", 4096),
    Case("qwen3-8b", 4096, "tensorwise"),
    Case("qwen3-8b", 16384),
    Case("qwen3-8b", 16384, "tensorwise"),
    Case("qwen3-1.7b", 16384),
    Case("qwen3-1.7b", 4096, "tensorwise"),
    Case("qwen3-1.7b", 16384, "tensorwise"),
    Case("qwen3-8b", 4096, "blockwise"),
    Case("qwen3-8b", 4096, "delayed"),
)
CPU_CASES = (Case("tiny-student", 48), Case("tiny-student", 48, "tensorwise"))


def fitting(spec: ModelSpec, case: Case, fused: bool) -> ModelSpec:
    """Return the model with the largest even number of layers estimated to fit into 85 % of the device memory."""
    memory = 0.85 * torch.cuda.get_device_properties(0).total_memory
    for layers in range(spec.num_layers, 0, -2):
        candidate = dataclasses.replace(spec, num_layers=layers)
        shard, build = ModelShard(candidate, ParallelConfig(), 0), Build(2, fused=fused, fp8=True)
        work = Workload(MicroBatchShape(case.tokens, case.tokens, case.tokens), case.micro_batches)
        if trained_memory(shard, build).total + sum(train_phase(shard, build, work, on_gpu=True).values()) <= memory:
            return candidate
    return dataclasses.replace(spec, num_layers=1)


def measure(case: Case, setup: Setup) -> None:
    """Add one row, also for an FP8 case that this machine does not support."""
    capabilities = device.capabilities()
    row = {"preset": case.preset, "tokens": case.tokens, "precision": case.fp8 or ("bfloat16" if ON_GPU else "float32")}
    if case.fp8 is not None and not capabilities.transformer_engine:
        setup.add(**row, skipped="no Transformer Engine")
        return
    spec = spec_of(case.preset)
    if ON_GPU:
        spec = fitting(spec, case, capabilities.transformer_engine)
    fp8 = None if case.fp8 is None else Fp8Config(recipe=case.fp8)
    policy = random_policy(spec, setup.layout, fp8=fp8)
    policy.max_tokens = case.tokens
    policy.prepare_training(OptimizerConfig(lr=1e-6), 100)
    samples = random_samples(spec, case.micro_batches, case.tokens)
    count = case.micro_batches * case.tokens
    batches = policy.pack(samples, {"supervised_weight": [1 / count] * len(samples)})
    objective = sft_objective()

    def step() -> None:
        policy.forward_backward(batches, objective, num_tokens=count)
        policy.optim_step()

    seconds = seconds_of(step, setup.repeats)
    flops = 3 * forward_flops(ModelShard(spec, ParallelConfig(), 0), samples)
    setup.add(
        **row,
        layers=spec.num_layers,
        transformer_engine=capabilities.transformer_engine,
        seconds=seconds,
        tokens_per_second=count / seconds,
        tflops_per_second=flops / seconds / 1e12,
        mfu=mfu(flops, seconds),
        peak_bytes=device.peak_memory(),
    )


def main(arguments: list[str] | None = None) -> None:
    setup = begin(__doc__.splitlines()[0], arguments, repeats=3)
    for case in GPU_CASES if ON_GPU else CPU_CASES:
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        measure(case, setup)
        release()


if __name__ == "__main__":
    main()
