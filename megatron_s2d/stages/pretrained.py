"""A published checkpoint as a stage, so that it can be a teacher, a reference or an arm; nothing is trained."""

from __future__ import annotations

from megatron_s2d.config.weights import LoadCheckpointConfig
from megatron_s2d.stages.context import StageContext


def run_load_checkpoint(context: StageContext) -> None:
    """Save the weights that the model's ``path`` holds."""
    stage: LoadCheckpointConfig = context.stage
    context.save_model(context.fresh_policy(stage.model))
