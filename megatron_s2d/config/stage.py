"""Fields that every stage has, whatever its method. No torch.

A stage names what it consumes: ``init`` (the stage whose weights it starts from; ``model`` instead, to start from
scratch or from a checkpoint), ``teacher``, ``cache`` and ``reference`` are names of other stages.
"""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config, Name
from megatron_s2d.config.training import CheckpointConfig, MicroBatchConfig, OptimizerConfig

LossAggMode = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"]
Truncated = Literal["keep", "mask"]
TRUNCATED = (
    "mask: a response that ran into max_response_length gives no gradient (its reward still counts in its group)"
)


class StageConfig(Config):
    """Fields of every stage."""

    role: Name = Field(description="what the stage is in its arm; arms are compared role by role")
    seed: int = Field(0, ge=0, description="added to the run's seed; arms that should share noise share it")
    micro_batch: MicroBatchConfig = MicroBatchConfig()

    def inputs(self) -> dict[str, str]:
        """Name of the relation -> stage that must be finished first."""
        return {}

    @property
    def entries(self) -> list[str]:
        """Entries of ``data`` (or ``entry/half``) that the stage reads."""
        return []

    @property
    def uses_labels(self) -> bool:
        """Whether the labels (answers or solutions) of ``entries`` are used."""
        return False


class ModelStageConfig(StageConfig):
    """A stage that leaves a model."""


class TrainingStageConfig(ModelStageConfig):
    """Fields of every stage that updates a model: it starts from ``model`` (fresh weights) or ``init`` (a stage)."""

    model: str | None = Field(None, description="entry of `models`, started from its own weights")
    init: str | None = Field(None, description="stage whose final weights are the start")
    steps: int = Field(ge=1, description="number of sampling rounds (or of batches of data)")
    optimizer: OptimizerConfig = OptimizerConfig()
    offload_optimizer: bool = Field(
        False, description="the optimizer's state waits in host memory, and gradients are given up, between updates"
    )
    checkpoint: CheckpointConfig = CheckpointConfig()

    @pydantic.model_validator(mode="after")
    def _one_start(self) -> TrainingStageConfig:
        if (self.model is None) == (self.init is None):
            raise ValueError("give exactly one of `model` (fresh weights) and `init` (a stage to start from)")
        return self

    def inputs(self) -> dict[str, str]:
        return {"init": self.init} if self.init else {}
