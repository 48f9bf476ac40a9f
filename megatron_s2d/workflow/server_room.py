"""Whether servers fit beside the trainer on the GPUs of this machine, asked before anything runs. No torch here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from megatron_s2d.config.hardware import AssumptionsConfig
from megatron_s2d.estimate.server_memory import served_models, server_memory, sets_fraction
from megatron_s2d.estimate.stage_memory import stage_memory
from megatron_s2d.parallel.cuda_variables import installed_gpus
from megatron_s2d.workflow.preflight import Preflight


def check_server_room(preflight: Preflight, stages: Iterable[str]) -> None:
    """Raise ``UserError`` for the first of the ``stages`` whose servers have no room beside its trainer.

    Without a GPU here nothing is checked: the machines that run the stage check it when it starts.
    """
    config, gpus = preflight.config, installed_gpus()
    if sets_fraction(config) or gpus is None:
        return
    engine = importlib.util.find_spec("transformer_engine") is not None
    for name in (name for name in stages if served_models(config, name)):
        sizes = (config, name, preflight.specs, preflight.shapes[name])
        server_memory(
            *sizes,
            stage_memory(*sizes, on_gpu=True, transformer_engine=engine),
            device_memory=gpus.memory,
            reserved=AssumptionsConfig().reserved_memory,
            gpus_per_node=gpus.count,
        )
