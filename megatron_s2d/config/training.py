"""Settings of a training stage that do not depend on its method. No torch here."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config


LEAST_TEMPERATURE = 1e-4  # below, float32 logits divided by it would lose their meaning


class OptimizerConfig(Config):
    """AdamW with Megatron's distributed optimizer."""

    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of a decay")
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="updates of linear warm-up")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 turns clipping off")


class CheckpointConfig(Config):
    """When a stage saves its training state, so that it can be resumed inside."""

    interval_steps: int = Field(50, ge=1, description="updates between two checkpoints")
    keep: int = Field(2, ge=1, description="resumable checkpoints kept while the stage runs")
    in_background: bool = Field(False, description="write while training goes on, from a copy in host memory")


class SamplingConfig(Config):
    """How responses are sampled."""

    temperature: float = Field(1.0, ge=0, description="0 is greedy decoding")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, description="-1 keeps every token")
    max_response_tokens: int = Field(16384, ge=1)
    stop_strings: list[str] = Field(default_factory=list, description="texts that end a response, beside its end token")

    @pydantic.field_validator("temperature")
    @classmethod
    def _temperature(cls, value: float) -> float:
        if 0 < value < LEAST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE}")
        return value

    @pydantic.field_validator("top_k")
    @classmethod
    def _top_k(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError("top_k must be -1 (every token) or at least 1")
        return value


class MicroBatchConfig(Config):
    """How samples are cut into micro-batches; never changes a gradient beyond rounding."""

    max_tokens: int = Field(16384, ge=1, description="padded tokens of one micro-batch (a longer sample gets its own)")


class RolloutConfig(Config):
    """The engine that samples responses."""

    engine: Literal["megatron"] = Field("megatron", description="megatron: the trained model itself, in this process")
    max_batch_size: int = Field(1024, ge=1, description="responses that are generated together")
    max_batch_tokens: int = Field(
        262_144, ge=1, description="bound of responses x (prompt + response) tokens in a batch: keys and values held"
    )
