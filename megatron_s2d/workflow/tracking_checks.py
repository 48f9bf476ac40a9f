"""Checks before a run that the packages of its trackers are installed. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from megatron_s2d.config.tracking import Tracker
from megatron_s2d.errors import UserError

# Tracker -> what `pip install` takes; those of the extras in pyproject.toml.
REQUIREMENTS = {
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb>=0.31,<1"],
    "mlflow": ["mlflow-skinny>=3.17,<4", "sqlalchemy>=2,<3", "alembic"],
    "trackio": ["trackio>=0.43,<1"],
}


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Raise ``UserError`` with the command that installs the first package that is missing."""
    for tracker in trackers:
        if importlib.util.find_spec(tracker.type) is None:
            packages = " ".join(f"'{requirement}'" for requirement in REQUIREMENTS[tracker.type])
            raise UserError(
                f"tracking: {tracker.type} is not installed: pip install {packages}, or remove it from `tracking`"
            )
