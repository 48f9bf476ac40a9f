"""Shared by the benchmarks of a whole step: device, random samples, timing, FLOPs, a JSON file of result rows.

The benchmarks are for a GPU. On a CPU they run with tiny models and without meaningful numbers, to test the scripts
(``tests/unit/test_benchmarks.py``). Weights are random and drawn on the device, because no result depends on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_s2d.config.hardware import GPUS, Gpu
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import Fp8Config
from megatron_s2d.estimate.layers import ModelShard
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout, build_layout, initialize_distributed
from megatron_s2d.records import Sample
from megatron_s2d.train.megatron_model import MegatronModel

ON_GPU = device.capabilities().cuda


@dataclasses.dataclass(frozen=True)
class Setup:
    """The layout and the options of a benchmark, and its result rows."""

    layout: Layout
    repeats: int
    json: Path | None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, **row: Any) -> None:
        """Print a result row and write all rows to the file, so that a killed script leaves its finished rows."""
        self.rows.append({"device": device.capabilities().device_name} | row)
        print(json.dumps(self.rows[-1]), flush=True)
        if self.json is not None:
            self.json.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def begin(description: str, arguments: list[str] | None, *, repeats: int) -> Setup:
    """Parse the common options and initialize a process group of one rank."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--repeats", type=int, default=repeats if ON_GPU else 1, help="measured steps of a case")
    options = parser.parse_args(arguments)
    initialize_distributed()
    return Setup(build_layout(ParallelConfig()), options.repeats, options.json)


def current_gpu() -> Gpu | None:
    """Return the data sheet of this process's GPU; None on a CPU and for a GPU that is not in the table."""
    words = set(device.capabilities().device_name.lower().replace("-", " ").split())
    return next((gpu for name, gpu in GPUS.items() if name.partition("-")[0] in words), None)


def random_policy(spec: ModelSpec, layout: Layout, *, fp8: Fp8Config | None = None, **options: Any) -> MegatronModel:
    """Build a model with random weights and sequence packing: bfloat16 on a GPU, float32 on a CPU."""
    policy = MegatronModel(
        spec, layout, precision="bfloat16" if ON_GPU else "float32", packed=True, fp8=fp8, max_tokens=10**9, **options
    )
    draw_weights(policy)
    return policy


def draw_weights(policy: MegatronModel) -> None:
    """Fill norms with one and other weights with normal values, on their device."""
    generator = torch.Generator(device=device.device()).manual_seed(1)
    for chunk in policy.chunks:
        for name, parameter in chunk.named_parameters():
            with torch.no_grad():
                if "norm" in name:
                    parameter.fill_(1.0)
                else:
                    values = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                    parameter.copy_(values.mul_(0.02))


def spec_of(preset: str, **changes: Any) -> ModelSpec:
    """Return the spec of a preset with changed fields."""
    return ModelConfig(preset=preset, **changes).resolve(None if ON_GPU else 64)


def random_samples(spec: ModelSpec, count: int, length: int, *, prompt: int = 1) -> list[Sample]:
    """Return ``count`` sequences of ``length`` tokens, the first ``prompt`` of which are the prompt."""
    rng = np.random.default_rng(0)
    mask = np.arange(length) >= prompt
    return [
        Sample(
            id=str(index), prompt_id=str(index), group_id=str(index), domain="d", seed=index,
            token_ids=rng.integers(0, spec.vocab_size, length), response_mask=mask.copy(), temperature=1.0,
            finish_reason="stop",
        )
        for index in range(count)
    ]  # fmt: skip


def seconds_of(step: Callable[[], object], repeats: int, *, warm_up: int = 2) -> float:
    """Return the median wall time of ``step`` with device synchronization, after ``warm_up`` calls."""
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def forward_flops(shard: ModelShard, samples: list[Sample]) -> float:
    """Return the FLOPs of one forward pass, with half of the sequence as context and the output layer at responses."""
    flops = 0.0
    for sample in samples:
        length = len(sample.token_ids)
        flops += shard.num_layers * shard.layer_flops(length, length / 2)
        flops += shard.output_flops(int(sample.response_mask[1:].sum()))
    return flops


def mfu(flops: float, seconds: float) -> float | None:
    """Return the fraction of the dense bfloat16 peak of the data sheet; None without a data sheet."""
    gpu = current_gpu()
    return None if gpu is None else flops / seconds / gpu.bf16_flops


def release() -> None:
    """Free the device memory of models that went out of scope."""
    gc.collect()
    torch.cuda.empty_cache()
