"""A workflow on ranks that torchrun or srun started: every rank runs all jobs one after another, rank 0 decides.

A rank that fails ends with an error, and its launcher ends the others; the same command goes on from the checkpoints.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.formatting import format_seconds
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.layout import build_layout, initialize_distributed, shutdown_distributed
from megatron_s2d.train.loop import Stopped
from megatron_s2d.workflow.job_outcome import Interrupted
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.preflight import Preflight
from megatron_s2d.workflow.runner import finish, prepared
from megatron_s2d.workflow.worker import StopOnSignal, execute


def run_workflow(config: WorkflowConfig, run_dir: Path, console: Console, stage: str | None = None) -> None:
    """As ``workflow.run.run_workflow``, collective over the launcher's ranks, which must be as many as the layout's."""
    started = time.perf_counter()
    torch.set_num_threads(config.threads_per_rank)
    initialize_distributed()
    layout = build_layout(config.parallel)
    stop = StopOnSignal()
    console.quiet = dist.get_rank() != 0
    with contextlib.ExitStack() as stack:
        jobs, checked = _decide(config, run_dir, console, stage, stack)
        for job in jobs:
            if not job.is_pending:
                continue
            began = time.perf_counter()
            try:
                execute(config, job, run_dir, layout, stop)
            except Stopped as stopped:
                raise Interrupted(f"{job.id}: {stopped}; the same command goes on from here") from None
            console.print(f"{job.id}: done in {format_seconds(time.perf_counter() - began)}", highlight=False)
        if checked is not None and stage is None:
            finish(config, run_dir, jobs, checked, time.perf_counter() - started, console)
        shutdown_distributed()


def _decide(
    config: WorkflowConfig, run_dir: Path, console: Console, stage: str | None, stack: contextlib.ExitStack
) -> tuple[list[Job], Preflight | None]:
    """The plan of rank 0 on every rank; what it found wrong is raised everywhere. ``stack`` holds the locks."""
    checked = None

    def plan() -> list[Job]:
        nonlocal checked
        jobs, checked = stack.enter_context(prepared(config, run_dir, console, stage))
        return jobs

    return broadcast_from_rank0(plan), checked
