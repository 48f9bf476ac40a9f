"""What a stage does: one class per method, chosen by ``type``. Defaults are the S2D paper's settings. No torch here.

A stage names what it consumes: ``init`` (stage whose weights it starts from; ``model`` instead where it starts from
scratch or from a checkpoint), ``teacher``, ``cache`` and ``reference`` are names of other stages.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config
from megatron_s2d.config.training import CheckpointConfig, MicroBatchConfig, OptimizerConfig, SamplingConfig

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"]


class StageConfig(Config):
    """Fields of every stage."""

    role: str = Field(description="what the stage is in its arm; arms are compared role by role")
    seed: int = Field(0, ge=0, description="added to the run's seed; arms that should share noise share it")
    micro_batch: MicroBatchConfig = MicroBatchConfig()

    def inputs(self) -> dict[str, str]:
        """Name of the relation -> stage that must be finished first."""
        return {}


class TrainingStageConfig(StageConfig):
    """Fields of every stage that updates a model: it starts from ``model`` (fresh weights) or ``init`` (a stage)."""

    model: str | None = Field(None, description="entry of `models`, started from its own weights")
    init: str | None = Field(None, description="stage whose final weights are the start")
    steps: int = Field(ge=1, description="number of sampling rounds (or of batches of data)")
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @pydantic.model_validator(mode="after")
    def _one_start(self) -> TrainingStageConfig:
        if (self.model is None) == (self.init is None):
            raise ValueError("give exactly one of `model` (fresh weights) and `init` (a stage to start from)")
        return self

    def inputs(self) -> dict[str, str]:
        return {"init": self.init} if self.init else {}


class SupervisedConfig(TrainingStageConfig):
    """Cross-entropy on given responses: base pre-training, SFT, and teacher-sample SFT / SeqKD (from a cache)."""

    type: Literal["supervised"] = "supervised"
    data: str | None = Field(None, description="entry of `data` with reference solutions")
    cache: str | None = Field(None, description="teacher_cache stage whose responses are the data")
    batch_size: int = Field(64, ge=1, description="responses of one update")
    aggregation: Aggregation = "token_mean"

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> SupervisedConfig:
        if (self.data is None) == (self.cache is None):
            raise ValueError("give exactly one of `data` and `cache`")
        return self

    def inputs(self) -> dict[str, str]:
        return super().inputs() | ({"cache": self.cache} if self.cache else {})


class ImportanceConfig(Config):
    """Correction of the gap between the engine that sampled and the trainer (methods M1)."""

    mode: Literal["off", "truncate", "mask"] = "off"
    cap: float = Field(5.0, gt=0, description="largest weight; beyond it the weight is cut (truncate) or zero (mask)")


class OverlongConfig(Config):
    """Soft punishment of responses that come near the limit (DAPO)."""

    buffer_tokens: int = Field(ge=1, description="length of the zone before the limit in which the penalty grows")
    penalty: float = Field(1.0, ge=0, description="largest penalty, at the limit")


class GrpoConfig(TrainingStageConfig):
    """Group-relative policy optimisation with a verifier's reward (stages 1 and 3, direct baseline; methods M1)."""

    type: Literal["grpo"] = "grpo"
    prompts: str = Field(description="labelled prompts: an entry of `data`, or `entry/half`")
    label_reuse: Literal["refuse", "allow"] = Field(
        "refuse", description="refuse: an error where an earlier stage of the arm has used the label of one of `prompts`"
    )
    prompts_per_step: int = Field(64, ge=1)
    responses_per_prompt: int = Field(8, ge=2)
    updates_per_step: int = Field(1, ge=1, description="mini-batches that each sampling round is cut into")
    sampling: SamplingConfig = SamplingConfig()
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0, description="0.28 is DAPO's clip-higher")
    dual_clip: float | None = Field(None, gt=1, description="bound for negative advantages; off by default")
    kl_coefficient: float = Field(5e-4, ge=0, description="beta of the k3 penalty to the reference; 0: no reference")
    reference: str | None = Field(None, description="stage of the reference; by default the start of this stage")
    normalize_by_std: bool = Field(True, description="false: the Dr. GRPO advantage")
    aggregation: Aggregation = "token_mean"
    dynamic_sampling_rounds: int = Field(
        0, ge=0, description="extra rounds that refill groups whose rewards are all equal (DAPO); 0 is off"
    )
    overlong: OverlongConfig | None = None
    importance: ImportanceConfig = ImportanceConfig()

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> GrpoConfig:
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} must be a multiple of updates_per_step "
                f"{self.updates_per_step}: whole groups go to each mini-batch"
            )
        return self

    def inputs(self) -> dict[str, str]:
        return super().inputs() | ({"reference": self.reference} if self.reference else {})


class TeacherCacheConfig(StageConfig):
    """Teacher rollouts with the teacher's distribution at every response position (methods M2)."""

    type: Literal["teacher_cache"] = "teacher_cache"
    teacher: str = Field(description="stage whose weights sample and score")
    prompts: str = Field(description="prompts: an entry of `data`, or `entry/half`; labels are not used")
    responses_per_prompt: int = Field(8, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    kind: Literal["sampled", "topk", "hidden", "full"] = Field(
        "hidden", description="what is stored per position; hidden and full are exact, topk keeps `top_k` entries"
    )
    top_k: int = Field(256, ge=1, description="entries per position of kind topk")
    prompts_per_round: int = Field(256, ge=1, description="prompts generated between two progress reports")

    def inputs(self) -> dict[str, str]:
        return {"teacher": self.teacher}


class ForwardKlConfig(TrainingStageConfig):
    """Stage 2a: forward KL to the cached teacher distributions (methods M2)."""

    type: Literal["forward_kl"] = "forward_kl"
    cache: str = Field(description="teacher_cache stage")
    batch_size: int = Field(64, ge=1, description="responses of one update")
    temperature: float = Field(1.0, gt=0, description="tau of both sides")
    tail: Literal["bucket", "renormalise", "truncate"] = Field(
        "bucket", description="what a topk cache's remaining mass becomes"
    )
    aggregation: Aggregation = "token_mean"

    def inputs(self) -> dict[str, str]:
        return super().inputs() | {"cache": self.cache}


class OpdConfig(TrainingStageConfig):
    """Stage 2b: on-policy distillation to a frozen teacher (methods M3, M4)."""

    type: Literal["opd"] = "opd"
    teacher: str = Field(description="stage whose weights are the frozen teacher")
    prompts: str = Field(description="prompts: an entry of `data`, or `entry/half`; labels are not used")
    prompts_per_step: int = Field(64, ge=1)
    responses_per_prompt: int = Field(8, ge=1)
    updates_per_step: int = Field(1, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    granularity: Literal["full", "sampled"] = Field(
        "full", description="full: exact divergence over the vocabulary; sampled: log-ratio of the sampled token"
    )
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"] = "reverse_kl"
    beta: float | None = Field(None, gt=0, lt=1, description="mixing weight of jsd and the skew divergences")
    reward_scale: float = Field(1.0, gt=0, description="lambda of G-OPD; 1 is OPD, above 1 extrapolates (ExOPD)")
    reference: str | None = Field(None, description="stage of G-OPD's reference: the student's start or the raw teacher")
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    aggregation: Aggregation = "token_mean"
    importance: ImportanceConfig = ImportanceConfig()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> OpdConfig:
        needs_beta = self.divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl")
        if needs_beta != (self.beta is not None):
            raise ValueError(f"beta goes with jsd and skew divergences; divergence is {self.divergence}")
        if self.granularity == "sampled" and self.divergence != "reverse_kl":
            raise ValueError("granularity sampled is defined for reverse_kl; use granularity: full")
        if self.reward_scale != 1.0 and self.reference is None:
            raise ValueError("reward_scale other than 1 needs a `reference` stage (methods M4)")
        if self.reward_scale != 1.0 and self.divergence != "reverse_kl":
            raise ValueError("reward_scale other than 1 is defined for reverse_kl")
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError("prompts_per_step must be a multiple of updates_per_step")
        return self

    def inputs(self) -> dict[str, str]:
        found = super().inputs() | {"teacher": self.teacher}
        return found | ({"reference": self.reference} if self.reference else {})


Stage = Annotated[
    SupervisedConfig | GrpoConfig | TeacherCacheConfig | ForwardKlConfig | OpdConfig, Field(discriminator="type")
]
