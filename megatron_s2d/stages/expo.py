"""Weight extrapolation without training (ExPO, the baseline of G-OPD table 2)."""

from __future__ import annotations

import torch

from megatron_s2d.config.weights import ExpoConfig
from megatron_s2d.stages.context import StageContext


def run_expo(context: StageContext) -> None:
    """Save theta_1 + alpha (theta_1 - theta_0), theta_1 the mean of the tuned stages, theta_0 the base; in float32."""
    stage: ExpoConfig = context.stage
    result = context.frozen(stage.base)
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in result.chunks[0].parameters()]
    for name in stage.tuned:
        tuned = context.frozen(name)
        for total, parameter in zip(sums, tuned.chunks[0].parameters(), strict=True):
            total += parameter.float() / len(stage.tuned)
    for parameter, mean in zip(result.chunks[0].parameters(), sums, strict=True):
        parameter.data.copy_(mean + stage.alpha * (mean - parameter.float()))
    context.save_model(result)
