"""Configuration of SFT, SeqKD and base training: cross-entropy on stored responses. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.stage import LOSS_AGG, MAX_PROMPT_LENGTH, NORM_LENGTH, LossAggMode, TrainingStageConfig


class SftConfig(TrainingStageConfig):
    """Cross-entropy on stored responses: base pre-training, SFT, and teacher-sample SFT / SeqKD (from a cache)."""

    type: Literal["sft"] = "sft"
    data: str | None = Field(None, description="entry of `data` with reference solutions")
    max_prompt_length: int | None = Field(None, ge=1, description=MAX_PROMPT_LENGTH)
    cache: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="teacher_cache stage whose responses are the data, or a list of them"
    )
    global_batch_size: int = Field(64, ge=1, description="responses per optimizer step")
    loss_agg_mode: LossAggMode = Field("token_mean", description=LOSS_AGG)
    norm_length: int | None = Field(None, ge=1, description=NORM_LENGTH)

    @pydantic.model_validator(mode="after")
    def _check_one_source(self) -> SftConfig:
        if (self.data is None) == (self.cache is None):
            raise ValueError("set exactly one of `data` and `cache`")
        if self.max_prompt_length is not None and self.cache is not None:
            raise ValueError("max_prompt_length goes with `data`; for a `cache`, set it in the teacher_cache stage")
        return self

    def inputs(self) -> dict[str, str]:
        if isinstance(self.cache, list):
            return super().inputs() | {f"cache.{index}": name for index, name in enumerate(self.cache)}
        return super().inputs() | ({"cache": self.cache} if self.cache else {})

    @property
    def entries(self) -> list[str]:
        return [self.data] if self.data is not None else []

    @property
    def uses_labels(self) -> bool:
        return self.data is not None
