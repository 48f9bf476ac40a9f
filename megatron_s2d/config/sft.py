"""Configuration of SFT, SeqKD and base training: cross-entropy on given responses. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.stage import LossAggMode, TrainingStageConfig


class SftConfig(TrainingStageConfig):
    """Cross-entropy on given responses: base pre-training, SFT, and teacher-sample SFT / SeqKD (from a cache)."""

    type: Literal["sft"] = "sft"
    data: str | None = Field(None, description="entry of `data` with reference solutions")
    cache: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="teacher_cache stage whose responses are the data, or several"
    )
    global_batch_size: int = Field(64, ge=1, description="responses of one update")
    loss_agg_mode: LossAggMode = "token_mean"

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> SftConfig:
        if (self.data is None) == (self.cache is None):
            raise ValueError("give exactly one of `data` and `cache`")
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
