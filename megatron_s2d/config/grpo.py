"""Configuration of GRPO: stages 1 and 3, and the direct baseline. No torch."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.stage import TRUNCATED, LossAggMode, TrainingStageConfig, Truncated
from megatron_s2d.config.training import SamplingConfig


class RolloutCorrectionConfig(Config):
    """Correction of the gap between the engine that sampled and the trainer (methods M1)."""

    mode: Literal["off", "tis", "mask"] = "off"
    cap: float = Field(
        5.0, gt=0, description="largest importance weight; tis truncates at it, mask drops tokens beyond it"
    )


class OverlongBufferConfig(Config):
    """Soft punishment of responses that come near the limit (DAPO)."""

    len: int = Field(ge=1, description="length of the zone before the limit in which the penalty grows")
    penalty_factor: float = Field(1.0, ge=0, description="largest penalty, at the limit")


class FilterGroupsConfig(Config):
    """Dynamic sampling (DAPO): groups without a reward signal are replaced by newly sampled ones."""

    max_num_gen_batches: int = Field(
        ge=2,
        description="batches sampled at most for one step, the first one included; fewer prompts are trained on then",
    )


class GrpoConfig(TrainingStageConfig):
    """Group-relative policy optimisation with a verifier's reward (stages 1 and 3, direct baseline; methods M1)."""

    type: Literal["grpo"] = "grpo"
    prompts: str = Field(description="labelled prompts: an entry of `data`, or `entry/half`")
    label_reuse: Literal["refuse", "allow"] = Field(
        "refuse",
        description="refuse: an error where an earlier stage of the arm has used the label of one of `prompts`",
    )
    train_batch_size: int = Field(64, ge=1)
    num_generations: int = Field(8, ge=2)
    num_mini_batches: int = Field(1, ge=1, description="mini-batches that each sampling round is cut into")
    sampling: SamplingConfig = SamplingConfig()
    clip_ratio_low: float = Field(0.2, gt=0, lt=1)
    clip_ratio_high: float = Field(0.2, gt=0, description="0.28 is DAPO's clip-higher")
    clip_ratio_c: float | None = Field(None, gt=1, description="bound for negative advantages; off by default")
    kl_loss_coef: float = Field(5e-4, ge=0, description="beta of the k3 penalty to the reference; 0: no reference")
    reference: str | None = Field(None, description="stage of the reference; by default the start of this stage")
    norm_adv_by_std: bool = Field(True, description="false: the Dr. GRPO advantage")
    loss_agg_mode: LossAggMode = "token_mean"
    truncated_responses: Truncated = Field("keep", description=TRUNCATED)
    filter_groups: FilterGroupsConfig | None = Field(
        None, description="DAPO's dynamic sampling: replace groups whose rewards are all equal; null: off"
    )
    overlong_buffer: OverlongBufferConfig | None = None
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> GrpoConfig:
        if self.train_batch_size % self.num_mini_batches:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} must be a multiple of num_mini_batches "
                f"{self.num_mini_batches}: whole groups go to each mini-batch"
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
