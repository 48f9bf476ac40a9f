"""Stages that produce weights without training: an unchanged published checkpoint, which is not copied, and ExPO."""

from __future__ import annotations

import torch

from megatron_s2d.config.weights import ExpoConfig
from megatron_s2d.stages.context import StageContext


def run_load_checkpoint(context: StageContext) -> None:
    """Refer to the weights under the model's ``path``, so that they can be a teacher, a reference or an arm."""
    context.refer_to_source()


def run_expo(context: StageContext) -> None:
    """Save theta_1 + alpha (theta_1 - theta_0) (ExPO, the baseline of G-OPD table 2).

    theta_1 is the mean of the tuned stages' weights, theta_0 those of the base; the arithmetic is float32.
    """
    stage: ExpoConfig = context.stage
    model = context.models.frozen(stage.base)
    means = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in model.parameters()]
    for name in stage.tuned:
        tuned = context.models.frozen(name)
        for mean, parameter in zip(means, tuned.parameters(), strict=True):
            mean += parameter.float() / len(stage.tuned)
    for parameter, mean in zip(model.parameters(), means, strict=True):
        parameter.data.copy_(mean + stage.alpha * (mean - parameter.float()))
    context.save_model(model)
