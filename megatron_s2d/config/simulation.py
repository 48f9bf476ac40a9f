"""Configuration of ``s2d simulate``: two models with their layouts, a cluster, and measurements. No torch here."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config, Name
from megatron_s2d.config.hardware import AssumptionsConfig
from megatron_s2d.config.model import ModelConfig


class MatmulTime(Config):
    """A measured bf16 product [m, k] x [k, n] on one GPU."""

    m: int = Field(ge=1)
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    seconds: float = Field(gt=0)


class KlTime(Config):
    """A measured ``linear_divergence`` with gradients on one GPU, as ``benchmarks/kl.py --device cuda`` reports it."""

    tokens: int = Field(ge=1)
    vocab: int = Field(ge=1)
    hidden: int = Field(ge=1)
    teacher_hidden: int = Field(ge=1)
    seconds: float = Field(gt=0)


class MeasuredConfig(Config):
    """Measurements; each replaces a data-sheet number times an assumed efficiency."""

    matmuls: list[MatmulTime] = Field(default_factory=list, description="their total operations over their total time")
    kl: KlTime | None = None
    memory_bandwidth: float | None = Field(None, gt=0, description="bytes per second that decoding reads")
    node_bandwidth: float | None = Field(None, gt=0, description="bytes per second of a GPU within a node, one way")
    network_bandwidth: float | None = Field(None, gt=0, description="bytes per second of a GPU to other nodes, one way")
    latency: float | None = Field(None, ge=0, description="seconds of a collective of minimal size")
    step_seconds: float = Field(
        0.0, ge=0, description="seconds of a step on a rank that do not depend on its tokens: Python, launches"
    )
    micro_batch_seconds: float = Field(0.0, ge=0, description="likewise of every micro-batch")


class ShareConfig(Config):
    """Parallel sizes of one model; data parallelism uses the remaining GPUs."""

    tensor_model_parallel_size: int = Field(8, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    expert_model_parallel_size: int = Field(1, ge=1)


class SimulationConfig(Config):
    """Steps of on-policy distillation of a large teacher into a small student, on increasing numbers of GPUs."""

    name: Name
    description: str = ""
    gpu: str
    num_gpus: list[int] = Field(min_length=1, description="numbers of GPUs to predict for")
    teacher: ModelConfig
    student: ModelConfig
    parallel: ShareConfig = Field(ShareConfig(), description="of the student")
    teacher_parallel: ShareConfig | None = Field(None, description="by default the student's; both share all GPUs")
    engine_tensor_parallel_size: int | None = Field(
        None, ge=1, description="of servers beside the trainer, on the same GPUs; null: the trainer itself samples"
    )
    scaling: Literal["strong", "weak"] = Field("strong", description="weak: train_batch_size grows with the GPUs")
    train_batch_size: int = Field(
        128, ge=1, description="prompts per step; for weak scaling at the smallest number of GPUs"
    )
    num_generations: int = Field(8, ge=1)
    prompt_tokens: int = Field(512, ge=1, description="mean")
    response_tokens: int = Field(8192, ge=1, description="mean")
    longest_response_tokens: int | None = Field(
        None, ge=1, description="length of the longest response, for which the step waits; by default the mean"
    )
    micro_batch_tokens: int = Field(16384, ge=1)
    max_batch_size: int = Field(256, ge=1, description="responses that one engine decodes together")
    checkpoint_interval_steps: int | None = Field(
        None, ge=1, description="steps between checkpoints, whose writing training waits for; null: it never waits"
    )
    node_write_bandwidth: float = Field(2e9, gt=0, description="bytes per second that a node writes to the file system")
    file_system_bandwidth: float = Field(50e9, gt=0, description="bytes per second that all nodes write together")
    assumptions: AssumptionsConfig = AssumptionsConfig()
    measured: MeasuredConfig = MeasuredConfig()

    @pydantic.model_validator(mode="after")
    def _check_sizes_fit(self) -> SimulationConfig:
        for share in (self.parallel, self.teacher_parallel or self.parallel):
            size = share.tensor_model_parallel_size * share.pipeline_model_parallel_size
            for count in self.num_gpus:
                if count % size:
                    raise ValueError(f"num_gpus: {count} is not a multiple of tensor x pipeline = {size}")
        engine = self.engine_tensor_parallel_size
        if engine is not None and any(count % engine for count in self.num_gpus):
            raise ValueError(f"engine_tensor_parallel_size {engine} does not divide every number of GPUs")
        if (self.longest_response_tokens or self.response_tokens) < self.response_tokens:
            raise ValueError("longest_response_tokens is below response_tokens, which is the mean")
        return self
