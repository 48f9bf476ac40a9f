"""Whether the servers that a run starts can start here and fit beside the trainer; asked first. No torch here."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable

from megatron_s2d.config.hardware import AssumptionsConfig
from megatron_s2d.config.stage import validation_of
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.server_memory import served_models, server_memory, sets_fraction
from megatron_s2d.estimate.stage_memory import stage_memory
from megatron_s2d.parallel.cuda_variables import installed_gpus
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.preflight import Preflight


def check_servers(preflight: Preflight, jobs: Iterable[Job]) -> None:
    """Raise ``UserError`` if servers that pending ``jobs`` start cannot start on this machine.

    That is where neither SGLang nor ``rollout.sglang.python`` is installed, and where a GPU of this machine has no room
    for them beside the trainer. The machines that run a stage check that again when it starts.
    """
    pending = [job for job in jobs if job.is_pending]
    if any(_starts_servers(preflight.config, job) for job in pending):
        _check_installed(preflight.config)
    _check_room(preflight, [job.stage for job in pending if job.is_stage])


def _starts_servers(config: WorkflowConfig, job: Job) -> bool:
    if job.is_stage and served_models(config, job.stage):
        return True
    samples = not job.is_stage or validation_of(config.stages[job.stage]) is not None
    served = config.rollout.engine == "sglang" and config.model_of(job.stage) not in config.rollout.sglang.urls
    return samples and served


def _check_installed(config: WorkflowConfig) -> None:
    python = config.rollout.sglang.python
    if python is not None and shutil.which(python) is None:
        raise UserError(f"rollout.sglang.python: {python}: no such program")
    if python is None and importlib.util.find_spec("sglang") is None:
        raise UserError(
            "the workflow needs SGLang servers, but sglang is not installed: install megatron-s2d[sglang], set "
            "rollout.sglang.python to an interpreter that has it, or set rollout.sglang.urls to running servers"
        )


def _check_room(preflight: Preflight, stages: Iterable[str]) -> None:
    """Without a GPU here nothing is checked."""
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
