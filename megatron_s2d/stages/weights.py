"""Stages that produce weights without training: an unchanged published checkpoint, and weight extrapolation (ExPO)."""

from __future__ import annotations

import torch

from megatron_s2d.config.weights import ExpoConfig, LoadCheckpointConfig
from megatron_s2d.stages.context import StageContext


def run_load_checkpoint(context: StageContext) -> None:
    """Save the weights under the model's ``path``, so that they can be a teacher, a reference or an arm."""
    stage: LoadCheckpointConfig = context.stage
    context.save_model(context.models.fresh(stage.model))


def run_expo(context: StageContext) -> None:
    """Save theta_1 + alpha (theta_1 - theta_0) (ExPO, the baseline of G-OPD table 2).

    theta_1 is the mean of the tuned stages' weights, theta_0 those of the base; the arithmetic is float32.
    """
    stage: ExpoConfig = context.stage
    model = context.models.frozen(stage.base)
    means = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in model.chunks[0].parameters()]
    for name in stage.tuned:
        tuned = context.models.frozen(name)
        for mean, parameter in zip(means, tuned.chunks[0].parameters(), strict=True):
            mean += parameter.float() / len(stage.tuned)
    for parameter, mean in zip(model.chunks[0].parameters(), means, strict=True):
        parameter.data.copy_(mean + stage.alpha * (mean - parameter.float()))
    context.save_model(model)
