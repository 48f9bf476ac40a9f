"""Configuration of stage 2a: the teacher cache and the forward-KL warm-up that trains on it. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_s2d.config.stage import LossAggMode, StageConfig, TrainingStageConfig
from megatron_s2d.config.training import SamplingConfig


class TeacherCacheConfig(StageConfig):
    """Teacher rollouts with the teacher's distribution at every response position (methods M2)."""

    type: Literal["teacher_cache"] = "teacher_cache"
    teacher: str = Field(description="stage whose weights sample and score")
    prompts: str = Field(description="prompts: an entry of `data`, or `entry/half`; labels are not used")
    num_generations: int = Field(8, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    kind: Literal["sampled", "topk", "hidden", "full"] = Field(
        "hidden", description="what is stored per position; hidden and full are exact, topk keeps `top_k` entries"
    )
    top_k: int = Field(256, ge=1, description="entries per position of kind topk")
    generation_batch_size: int = Field(256, ge=1, description="prompts generated between two progress reports")
    only_correct: bool = Field(False, description="keep only responses that the verifier accepts; this uses labels")

    def inputs(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    @property
    def entries(self) -> list[str]:
        return [self.prompts]

    @property
    def uses_labels(self) -> bool:
        return self.only_correct


class ForwardKlConfig(TrainingStageConfig):
    """Stage 2a: forward KL to the cached teacher distributions (methods M2)."""

    type: Literal["forward_kl"] = "forward_kl"
    cache: str = Field(description="teacher_cache stage")
    batch_size: int = Field(64, ge=1, description="responses of one update")
    temperature: float = Field(1.0, gt=0, description="tau of both sides")
    tail: Literal["bucket", "renormalise", "truncate"] = Field(
        "bucket", description="what a topk cache's remaining mass becomes"
    )
    loss_agg_mode: LossAggMode = "token_mean"

    def inputs(self) -> dict[str, str]:
        return super().inputs() | {"cache": self.cache}
