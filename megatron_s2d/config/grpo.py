"""Configuration of GRPO: stages 1 and 3, and the direct baseline. No torch here."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.stage import LOSS_AGG, TRUNCATED, LossAggMode, TrainingStageConfig, Truncated
from megatron_s2d.config.training import SamplingConfig


class RolloutCorrectionConfig(Config):
    """Importance weights that correct the mismatch between the engine that sampled and the trainer (methods M1)."""

    mode: Literal["off", "tis", "mask"] = Field(
        "off", description="tis: truncate importance weights at `cap`; mask: drop tokens whose weight exceeds it"
    )
    cap: float = Field(5.0, gt=0, description="largest importance weight")


class OverlongBufferConfig(Config):
    """Length penalty of responses close to max_response_length (DAPO's soft overlong punishment)."""

    len: int = Field(ge=1, description="tokens before the limit over which the penalty grows linearly")
    penalty_factor: float = Field(1.0, ge=0, description="penalty at the limit, subtracted from the reward")


class FilterGroupsConfig(Config):
    """Dynamic sampling (DAPO): replace groups whose rewards are all equal by newly sampled ones."""

    max_num_gen_batches: int = Field(
        ge=2,
        description="largest number of batches sampled for one step, including the first; then the step trains on "
        "fewer prompts",
    )


class GrpoConfig(TrainingStageConfig):
    """Group-relative policy optimization with verified rewards (stages 1 and 3, direct baseline; methods M1)."""

    type: Literal["grpo"] = "grpo"
    prompts: str = Field(description="labelled prompts: an entry of `data`, or `entry/half`")
    label_reuse: Literal["refuse", "allow"] = Field(
        "refuse",
        description="refuse: an error if an earlier stage of the arm used the label of one of `prompts`",
    )
    train_batch_size: int = Field(64, ge=1, description="prompts per step")
    num_generations: int = Field(8, ge=2, description="responses per prompt, which form a group")
    num_mini_batches: int = Field(1, ge=1, description="optimizer steps per sampled batch")
    sampling: SamplingConfig = SamplingConfig()
    clip_ratio_low: float = Field(0.2, gt=0, lt=1, description="ratios below 1 - clip_ratio_low are clipped")
    clip_ratio_high: float = Field(
        0.2, gt=0, description="ratios above 1 + clip_ratio_high are clipped; 0.28 is DAPO's clip-higher"
    )
    clip_ratio_c: float | None = Field(
        None, gt=1, description="largest ratio of tokens with negative advantages (dual clip); null: no limit"
    )
    kl_loss_coef: float = Field(5e-4, ge=0, description="beta of the k3 penalty to the reference; 0: no reference")
    reference: str | None = Field(
        None, description="stage whose weights are the reference; by default the start of this stage"
    )
    norm_adv_by_std: bool = Field(
        True, description="divide advantages by the group's standard deviation; false: Dr. GRPO"
    )
    loss_agg_mode: LossAggMode = Field("token_mean", description=LOSS_AGG)
    truncated_responses: Truncated = Field("keep", description=TRUNCATED)
    filter_groups: FilterGroupsConfig | None = Field(None, description="DAPO's dynamic sampling; null: off")
    overlong_buffer: OverlongBufferConfig | None = None
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()

    @pydantic.model_validator(mode="after")
    def _check_divisible(self) -> GrpoConfig:
        if self.train_batch_size % self.num_mini_batches:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} must be a multiple of num_mini_batches "
                f"{self.num_mini_batches}: a mini-batch has complete groups"
            )
        return self

    def inputs(self) -> dict[str, str]:
        return super().inputs() | ({"reference": self.reference} if self.reference else {})

    @property
    def entries(self) -> list[str]:
        return [self.prompts]

    @property
    def uses_labels(self) -> bool:
        return True
