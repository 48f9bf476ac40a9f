"""Configuration of experiment trackers, which show the metrics of training stages beside ``metrics.jsonl``.

A tracker is a name (``wandb``) or a mapping with its settings (``{type: wandb, project: mine}``). No torch here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config

DEFAULT_PROJECT = "megatron-s2d"


class TensorBoardTracker(Config):
    """Event files in the folder ``tensorboard`` of every training stage: ``tensorboard --logdir RUN/stages``."""

    type: Literal["tensorboard"] = "tensorboard"


class WandbTracker(Config):
    """A Weights & Biases run for every training stage; offline runs lie in its folder ``tracking``."""

    type: Literal["wandb"] = "wandb"
    project: str = Field(DEFAULT_PROJECT, min_length=1)
    entity: str | None = Field(None, description="user or team; null: that of the login")
    mode: Literal["online", "offline"] | None = Field(
        None, description="`offline` writes files for `wandb sync`; null: what WANDB_MODE says, otherwise online"
    )


class MlflowTracker(Config):
    """An MLflow run for every training stage."""

    type: Literal["mlflow"] = "mlflow"
    experiment: str = Field(DEFAULT_PROJECT, min_length=1)
    tracking_uri: str | None = Field(
        None,
        min_length=1,
        description="address of a server, or a database such as `sqlite:////data/mlflow.db`, which works offline; "
        "null: what MLFLOW_TRACKING_URI says, otherwise MLflow's local default",
    )


class TrackioTracker(Config):
    """A Trackio run for every training stage: a local database, shown by ``trackio show``."""

    type: Literal["trackio"] = "trackio"
    project: str = Field(DEFAULT_PROJECT, min_length=1)
    space_id: str | None = Field(None, description="Hugging Face Space that shows the run; null: this machine only")


Tracker = Annotated[TensorBoardTracker | WandbTracker | MlflowTracker | TrackioTracker, Field(discriminator="type")]


def _from_text(value: Any) -> Any:
    """Return the settings that the name of a tracker stands for."""
    return {"type": value} if isinstance(value, str) else value


def _distinct(trackers: list[Tracker]) -> list[Tracker]:
    types = [tracker.type for tracker in trackers]
    for name in types:
        if types.count(name) > 1:
            raise ValueError(f"{name} is listed twice: remove one")
    return trackers


Tracking = Annotated[list[Annotated[Tracker, pydantic.BeforeValidator(_from_text)]], pydantic.AfterValidator(_distinct)]
