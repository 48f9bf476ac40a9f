"""Configuration fields that all stages share. No torch here.

``init`` (the stage whose weights are the start), ``teacher``, ``cache`` and ``reference`` are names of other stages.
``model`` names an entry of `models`, to start from fresh weights or from a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config, Name
from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.config.training import CheckpointConfig, MicroBatchConfig, OptimizerConfig
from megatron_s2d.config.validation import ValidationConfig

LossAggMode = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"]
Truncated = Literal["keep", "mask"]
PromptOrder = Literal["restart", "continue"]
NORM_LENGTH = (
    "divisor of loss_agg_mode seq_mean_token_sum_norm, the same for every batch; null: the longest response of the data"
)
LOSS_AGG = (
    "token_mean: mean over tokens; seq_mean_token_mean: mean over responses of their means; seq_mean_token_sum_norm: "
    "sums divided by max_response_length (Dr. GRPO)"
)
MINI_BATCHES = "mini-batches of complete groups that one pass over a sampled batch makes; an optimizer step each"
PPO_EPOCHS = (
    "passes over a sampled batch (num_iterations of TRL); old log-probabilities stay those from before "
    "the first pass, and every further pass shuffles the groups into other mini-batches"
)
MAX_PROMPT_LENGTH = (
    "leave out prompts of more tokens, after the split into halves; null: all that lengths.max_prompt_length keeps"
)
PROMPT_ORDER = (
    "restart: from the beginning of the shuffled prompts; continue: after the prompts of the stage `init`, as if that "
    "had more steps"
)
PROMPT_FILTER = "leave out prompts that a model, such as the teacher, solves too often or too seldom; null: none"
TRUNCATED = "mask: a response truncated at max_response_length gives no gradient (its reward still counts in its group)"


class PromptFilterConfig(Config):
    """Prompts by the share of correct responses that a model gave in an earlier evaluation of them."""

    evaluation: Path = Field(
        description="its evaluation.jsonl, such as that of a pass-rate check of these prompts; each needs a row there"
    )
    min_pass_rate: float = Field(0.0, ge=0, le=1, description="leave out prompts with a smaller share")
    max_pass_rate: float = Field(1.0, ge=0, le=1, description="leave out prompts with a larger share")

    @pydantic.model_validator(mode="after")
    def _check_range(self) -> PromptFilterConfig:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError("min_pass_rate is above max_pass_rate: no prompt would be left")
        return self


class StageConfig(Config):
    """Fields of every stage."""

    role: Name = Field(description="role of the stage in its arm, by default its name; arms are compared role by role")
    seed: int = Field(
        0, ge=0, description="added to the run's seed; use the same value in arms that should share random numbers"
    )
    micro_batch: MicroBatchConfig = MicroBatchConfig()

    def inputs(self) -> dict[str, str]:
        """Return relation (init, teacher, ...) -> the stage that must finish first."""
        return {}

    @property
    def entries(self) -> list[str]:
        """Entries of ``data`` (or ``entry/half``) that the stage reads."""
        return []

    @property
    def grades(self) -> bool:
        """Whether the stage grades responses with the labels of ``entries``."""
        return False

    @property
    def uses_labels(self) -> bool:
        """Whether the labels (answers or solutions) of ``entries`` are used."""
        return self.grades


class ModelStageConfig(StageConfig):
    """A stage whose result is a model."""


class TrainingStageConfig(ModelStageConfig):
    """Fields of every stage that trains a model, from ``model`` (fresh or published weights) or ``init`` (a stage)."""

    model: str | None = Field(None, description="entry of `models` to start from")
    init: str | None = Field(None, description="stage whose final weights are the start")
    steps: int = Field(ge=1, description="training steps: sampled batches (or batches of data)")
    optimizer: OptimizerConfig = OptimizerConfig()
    offload_optimizer: bool = Field(
        False,
        description="offload the optimizer's state to host memory, and free gradients, between optimizer steps",
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig | None = Field(
        None, description="samples of the weights every so many steps, best checkpoint, end of the stage; null: none"
    )
    lora: LoraConfig | None = Field(
        None, description="train a LoRA adapter beside frozen weights (docs/lora.md); null: all weights"
    )

    @pydantic.model_validator(mode="after")
    def _check_one_start(self) -> TrainingStageConfig:
        if (self.model is None) == (self.init is None):
            raise ValueError("set exactly one of `model` (fresh weights) and `init` (a stage to start from)")
        return self

    def inputs(self) -> dict[str, str]:
        return {"init": self.init} if self.init else {}


def validation_of(stage: StageConfig) -> ValidationConfig | None:
    """Return the validation of a stage of any type."""
    return stage.validation if isinstance(stage, TrainingStageConfig) else None


def validated_entries(stage: StageConfig) -> list[str]:
    """Return the entries of ``data`` (or ``entry/half``) whose labels the validation of a stage reads."""
    validation = validation_of(stage)
    return [] if validation is None else validation.entries


def changes_weights(stage: StageConfig) -> bool:
    """Return whether the validation of a stage decides about the weights that it leaves."""
    validation = validation_of(stage)
    return validation is not None and validation.changes_weights
