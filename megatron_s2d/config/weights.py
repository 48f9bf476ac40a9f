"""Configuration of stages that produce a model without training. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_s2d.config.stage import ModelStageConfig


class LoadCheckpointConfig(ModelStageConfig):
    """The unchanged weights of a published checkpoint: a raw teacher, a reference, an arm without training."""

    type: Literal["load_checkpoint"] = "load_checkpoint"
    model: str = Field(description="entry of `models` that has a `path`")


class ExpoConfig(ModelStageConfig):
    """Weight extrapolation without training: theta_1 + alpha (theta_1 - theta_0), theta_1 the mean of ``tuned``."""

    type: Literal["expo"] = "expo"
    tuned: list[str] = Field(min_length=1, description="stages whose weights are averaged")
    base: str = Field(description="stage whose weights are theta_0")
    alpha: float = Field(0.5, description="extrapolation factor; 0 is the plain average")

    def inputs(self) -> dict[str, str]:
        return {f"tuned.{index}": name for index, name in enumerate(self.tuned)} | {"base": self.base}
