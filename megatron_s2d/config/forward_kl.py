"""Configuration of stage 2a: the teacher cache and the forward-KL warm-up that trains on it. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_s2d.config.stage import (
    LOSS_AGG,
    MAX_PROMPT_LENGTH,
    NORM_LENGTH,
    LossAggMode,
    StageConfig,
    TrainingStageConfig,
)
from megatron_s2d.config.teacher_view import TeacherViewConfig
from megatron_s2d.config.training import SamplingConfig


class TeacherCacheConfig(StageConfig):
    """Teacher rollouts with the teacher's distribution at every response position (methods M2)."""

    type: Literal["teacher_cache"] = "teacher_cache"
    teacher: str = Field(description="stage whose weights sample and score")
    teacher_view: TeacherViewConfig | None = Field(
        None,
        description="the prompt as the teacher reads it (docs/teachers.md); the cache holds the student's prompt with "
        "the response and distributions that the teacher gave behind its own; null: as the student reads it",
    )
    prompts: str = Field(
        description="prompts: an entry of `data`, or `entry/half`; labels are used by `only_correct` and by views with "
        "answers or solutions only"
    )
    max_prompt_length: int | None = Field(None, ge=1, description=MAX_PROMPT_LENGTH)
    num_generations: int = Field(8, ge=1, description="responses per prompt")
    sampling: SamplingConfig = SamplingConfig()
    representation: Literal["sampled_token", "top_k", "hidden_states", "full_vocab"] = Field(
        "hidden_states",
        description="stored per position; hidden_states and full_vocab are exact, top_k stores `top_k` entries",
    )
    top_k: int = Field(256, ge=1, description="entries per position of representation top_k")
    generation_batch_size: int = Field(256, ge=1, description="prompts sampled together, between two progress reports")
    only_correct: bool = Field(False, description="store only responses that the verifier accepts; this uses labels")

    def inputs(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    @property
    def entries(self) -> list[str]:
        return [self.prompts]

    @property
    def grades(self) -> bool:
        return self.only_correct

    @property
    def uses_labels(self) -> bool:
        return self.grades or (self.teacher_view is not None and self.teacher_view.uses_labels)


class ForwardKlConfig(TrainingStageConfig):
    """Stage 2a: forward KL to the cached teacher distributions (methods M2)."""

    type: Literal["forward_kl"] = "forward_kl"
    cache: str = Field(description="teacher_cache stage to train on")
    global_batch_size: int = Field(64, ge=1, description="responses per optimizer step")
    temperature: float = Field(1.0, gt=0, description="tau, of teacher and student")
    tail_mass: Literal["bucket", "renormalise", "truncate"] = Field(
        "bucket", description="treatment of the teacher's probability outside a top_k cache's entries (methods M2)"
    )
    loss_agg_mode: LossAggMode = Field("token_mean", description=LOSS_AGG)
    norm_length: int | None = Field(None, ge=1, description=NORM_LENGTH)

    def inputs(self) -> dict[str, str]:
        return super().inputs() | {"cache": self.cache}
