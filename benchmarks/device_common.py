"""What the benchmarks of a whole step share: the device, random samples, fair timing, operations, one file of rows.

They run on a GPU as they are meant, and on a CPU with tiny models, where their figures mean nothing: that is for trying
the scripts (``tests/unit/test_benchmarks.py``). Weights are drawn on the device, because no figure depends on them.
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
    """What ``begin`` makes of the command line."""

    layout: Layout
    repeats: int
    json: Path | None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, **row: Any) -> None:
        """A row of the results: printed, and kept in the file, which holds what is finished if the script is ended."""
        self.rows.append({"device": device.capabilities().device_name} | row)
        print(json.dumps(self.rows[-1]), flush=True)
        if self.json is not None:
            self.json.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def begin(description: str, arguments: list[str] | None, *, repeats: int) -> Setup:
    """Parse the options that all have, and join a process group of one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--repeats", type=int, default=repeats if ON_GPU else 1, help="measured steps of a case")
    given = parser.parse_args(arguments)
    initialize_distributed()
    return Setup(build_layout(ParallelConfig()), given.repeats, given.json)


def gpu_here() -> Gpu | None:
    """The data sheet of this process's GPU; None on a CPU and for a GPU that is not in the table."""
    words = set(device.capabilities().device_name.lower().replace("-", " ").split())
    return next((gpu for name, gpu in GPUS.items() if name.partition("-")[0] in words), None)


def random_policy(spec: ModelSpec, layout: Layout, *, fp8: Fp8Config | None = None, **options: Any) -> MegatronModel:
    """A model with random weights: bfloat16 on a GPU, float32 on a CPU; sequences end to end."""
    policy = MegatronModel(
        spec, layout, precision="bfloat16" if ON_GPU else "float32", packed=True, fp8=fp8, max_tokens=10**9, **options
    )
    draw_weights(policy)
    return policy


def draw_weights(policy: MegatronModel) -> None:
    """Normal matrices and norms of one, drawn where the weights are."""
    generator = torch.Generator(device=device.device()).manual_seed(1)
    for chunk in policy.chunks:
        for name, parameter in chunk.named_parameters():
            with torch.no_grad():
                if "norm" in name:
                    parameter.fill_(1.0)
                else:
                    drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                    parameter.copy_(drawn.mul_(0.02))


def spec_of(preset: str, **changes: Any) -> ModelSpec:
    """A preset, with fields replaced."""
    return ModelConfig(preset=preset, **changes).resolve(None if ON_GPU else 64)


def random_samples(spec: ModelSpec, count: int, length: int, *, prompt: int = 1) -> list[Sample]:
    """``count`` sequences of ``length`` tokens, of which the first ``prompt`` are no response."""
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
    """Median seconds of ``step``: wall clock around a finished device, after ``warm_up`` calls."""
    for _ in range(warm_up):
        step()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def forward_flops(shard: ModelShard, samples: list[Sample]) -> float:
    """Operations of one forward pass, the output layer at responses only; a token looks at half of its sequence."""
    flops = 0.0
    for sample in samples:
        length = len(sample.token_ids)
        flops += shard.num_layers * shard.layer_flops(length, length / 2)
        flops += shard.output_flops(int(sample.response_mask[1:].sum()))
    return flops


def mfu(flops: float, seconds: float) -> float | None:
    """Share of the data sheet's dense bfloat16 peak; None where there is no data sheet."""
    gpu = gpu_here()
    return None if gpu is None else flops / seconds / gpu.bf16_flops


def release() -> None:
    """Give the memory of models that went out of scope back to the device."""
    gc.collect()
    torch.cuda.empty_cache()
