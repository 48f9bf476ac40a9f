"""Runs a workflow on ranks that torchrun or srun started: every rank runs all jobs in order, rank 0 makes the plan.

A rank that fails exits with an error and its launcher ends the others; the same command then resumes from checkpoints.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.formatting import format_seconds
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.layout import build_layout, initialize_distributed, shutdown_distributed
from megatron_s2d.train.loop import Stopped
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.preflight import Preflight
from megatron_s2d.workflow.progress import validation_line
from megatron_s2d.workflow.runner import prepare_run, write_results
from megatron_s2d.workflow.status import RESUME_HINT, Interrupted
from megatron_s2d.workflow.worker import StopOnSignal, execute, threads_of


def run_workflow(config: WorkflowConfig, run_dir: Path, console: Console, stage: str | None = None) -> None:
    """Do what ``runner.run_workflow`` does, collectively on the launcher's ranks (as many as the layout has)."""
    started = time.perf_counter()
    torch.set_num_threads(threads_of(config))
    initialize_distributed(timeout_minutes=config.distributed_timeout_minutes)
    layout = build_layout(config.parallel)
    stop = StopOnSignal()
    console.quiet = dist.get_rank() != 0
    with contextlib.ExitStack() as stack:
        jobs, preflight = _broadcast_plan(config, run_dir, console, stage, stack)
        for job in jobs:
            if not job.is_pending:
                continue
            job_started = time.perf_counter()
            try:
                execute(config, job, run_dir, layout, stop)
            except Stopped as stopped:
                raise Interrupted(f"{job.id}: {stopped}; {RESUME_HINT}") from None
            for row in job.directory.validations() if job.is_stage and dist.get_rank() == 0 else ():
                line = f"{job.id}: {validation_line(row)}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            console.print(f"{job.id}: done in {format_seconds(time.perf_counter() - job_started)}", highlight=False)
        if preflight is not None and stage is None:
            write_results(config, run_dir, jobs, preflight, time.perf_counter() - started, console)
        shutdown_distributed()


def _broadcast_plan(
    config: WorkflowConfig, run_dir: Path, console: Console, stage: str | None, stack: contextlib.ExitStack
) -> tuple[list[Job], Preflight | None]:
    """Return rank 0's jobs on every rank and its checks on rank 0; its ``UserError`` is raised on every rank.

    ``stack`` holds the locks of the run directory until the run ends.
    """
    preflight = None

    def plan() -> list[dict[str, Any]]:
        nonlocal preflight
        jobs, preflight = stack.enter_context(prepare_run(config, run_dir, console, stage))
        return [vars(job) | {"directory": str(job.directory.path)} for job in jobs]

    jobs = [Job(**fields | {"directory": StageDirectory(fields["directory"])}) for fields in broadcast_from_rank0(plan)]
    return jobs, preflight
