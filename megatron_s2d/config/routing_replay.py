"""Which stages replay the experts of their responses (routing replay, R3). No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.stages import Stage
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError


def replays_routes(config: WorkflowConfig, stage: Stage, spec: ModelSpec) -> bool:
    """Return whether ``stage`` replays the experts of its responses. spec: of the model that it trains."""
    samples = isinstance(stage, GrpoConfig | OpdConfig)
    return samples and spec.num_experts > 0 and config.rollout.routing_replay is not False


def check_routing_replay(config: WorkflowConfig, stages: Sequence[str], specs: Mapping[str, ModelSpec]) -> None:
    """Refuse routing replay for a workflow of dense models: its user expects something else of it.

    specs: by entry of ``models``.
    """
    replayed = any(replays_routes(config, config.stages[name], specs[config.model_of(name)]) for name in stages)
    if config.rollout.routing_replay and not replayed:
        raise UserError(
            "rollout.routing_replay is true, but no grpo or opd stage trains a mixture-of-experts model: leave it out"
        )
