"""Configuration of GRPO: stages 1 and 3, and the direct baseline. No torch here."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.policy_loss import (
    CLIP_RATIO_HIGH,
    CLIP_RATIO_LOW,
    ENTROPY_COEFF,
    POLICY_LOSS,
    PolicyLoss,
    TeacherAdvantageConfig,
    check_policy_loss,
    with_policy_loss_defaults,
)
from megatron_s2d.config.stage import (
    LOSS_AGG,
    MAX_PROMPT_LENGTH,
    MINI_BATCHES,
    PPO_EPOCHS,
    PROMPT_FILTER,
    PROMPT_ORDER,
    TRUNCATED,
    LossAggMode,
    PromptFilterConfig,
    PromptOrder,
    TrainingStageConfig,
    Truncated,
)
from megatron_s2d.config.training import SamplingConfig


class RolloutCorrectionConfig(Config):
    """Importance weights that correct the mismatch between the engine that sampled and the trainer (methods M1)."""

    mode: Literal["auto", "off", "tis", "mask"] = Field(
        "auto",
        description="tis: truncate the importance weight of every token at `cap`; mask: drop tokens whose weight "
        "exceeds it; auto: tis with servers, off with the engine in the trainer, which computes the same probabilities",
    )
    cap: float = Field(2.0, gt=0, description="largest importance weight")

    def for_engine(self, in_trainer: bool) -> RolloutCorrectionConfig:
        """Return the settings with ``auto`` replaced by the mode for an engine in the trainer, or for servers."""
        if self.mode != "auto":
            return self
        return self.model_copy(update={"mode": "off" if in_trainer else "tis"})


class OverlongBufferConfig(Config):
    """Length penalty of responses close to max_response_length (DAPO's soft overlong punishment)."""

    len: int = Field(ge=1, description="tokens before the limit over which the penalty grows linearly")
    penalty_factor: float = Field(1.0, ge=0, description="penalty at the limit, subtracted from the reward")


class FilterGroupsConfig(Config):
    """Dynamic sampling (DAPO): replace groups whose rewards are all equal by newly sampled ones."""

    max_num_gen_batches: int = Field(
        ge=2,
        description="largest number of batches sampled for one step, including the first; then the step trains on "
        "groups without a signal",
    )
    min_pass_rate: float = Field(
        0.0, ge=0, le=1, description="also replace groups with a smaller share of correct responses (pass rate)"
    )
    max_pass_rate: float = Field(
        1.0, ge=0, le=1, description="also replace groups with a larger share of correct responses"
    )

    @pydantic.model_validator(mode="after")
    def _check_range(self) -> FilterGroupsConfig:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError("min_pass_rate is above max_pass_rate: no group would be left")
        return self


class GrpoConfig(TrainingStageConfig):
    """Group-relative policy optimization with verified rewards (stages 1 and 3, direct baseline; methods M1)."""

    type: Literal["grpo"] = "grpo"
    prompts: str = Field(description="labelled prompts: an entry of `data`, or `entry/half`")
    max_prompt_length: int | None = Field(None, ge=1, description=MAX_PROMPT_LENGTH)
    prompt_filter: PromptFilterConfig | None = Field(None, description=PROMPT_FILTER)
    prompt_order: PromptOrder = Field("restart", description=PROMPT_ORDER)
    label_reuse: Literal["refuse", "allow"] = Field(
        "refuse",
        description="refuse: an error if an earlier stage of the arm used the label of one of `prompts`",
    )
    train_batch_size: int = Field(64, ge=1, description="prompts per step")
    num_generations: int = Field(8, ge=2, description="responses per prompt, which form a group")
    num_mini_batches: int = Field(1, ge=1, description=MINI_BATCHES)
    ppo_epochs: int = Field(1, ge=1, description=PPO_EPOCHS)
    sampling: SamplingConfig = SamplingConfig()
    policy_loss: PolicyLoss = Field("grpo", description=POLICY_LOSS)
    clip_ratio_low: float = Field(0.2, gt=0, le=1, description=CLIP_RATIO_LOW)
    clip_ratio_high: float = Field(0.2, gt=0, description=CLIP_RATIO_HIGH)
    clip_ratio_c: float | None = Field(
        None, gt=1, description="largest ratio of tokens with negative advantages (dual clip, grpo); null: no limit"
    )
    entropy_coeff: float = Field(0.0, description=ENTROPY_COEFF)
    kl_loss_coef: float = Field(5e-4, ge=0, description="beta of the k3 penalty to the reference; 0: no reference")
    reference: str | None = Field(
        None, description="stage whose weights are the reference; by default the start of this stage"
    )
    norm_adv_by_std: bool = Field(
        True, description="divide advantages by the group's standard deviation; false: Dr. GRPO"
    )
    teacher_advantage: TeacherAdvantageConfig | None = Field(
        None, description="add a teacher's term to the advantages (methods M3); null: rewards alone"
    )
    loss_agg_mode: LossAggMode = Field("token_mean", description=f"{LOSS_AGG}; gspo: always seq_mean_token_mean")
    truncated_responses: Truncated = Field("keep", description=TRUNCATED)
    filter_groups: FilterGroupsConfig | None = Field(None, description="DAPO's dynamic sampling; null: off")
    overlong_buffer: OverlongBufferConfig | None = None
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_in_defaults_of_policy_loss(cls, document: Any) -> Any:
        return with_policy_loss_defaults(document)

    @pydantic.model_validator(mode="after")
    def _check_policy_loss(self) -> GrpoConfig:
        check_policy_loss(self.policy_loss, self.loss_agg_mode, self.clip_ratio_low)
        if self.policy_loss != "grpo" and self.clip_ratio_c is not None:
            raise ValueError(f"clip_ratio_c is of policy_loss grpo, not {self.policy_loss}: remove it")
        return self

    @pydantic.model_validator(mode="after")
    def _check_divisible(self) -> GrpoConfig:
        if self.train_batch_size % self.num_mini_batches:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} must be a multiple of num_mini_batches "
                f"{self.num_mini_batches}: a mini-batch has complete groups"
            )
        return self

    def inputs(self) -> dict[str, str]:
        teachers = self.teacher_advantage.inputs() if self.teacher_advantage is not None else {}
        return super().inputs() | ({"reference": self.reference} if self.reference else {}) | teachers

    @property
    def num_updates(self) -> int:
        """Optimizer steps on one sampled batch."""
        return self.num_mini_batches * self.ppo_epochs

    @property
    def entries(self) -> list[str]:
        return [self.prompts]

    @property
    def grades(self) -> bool:
        return True
