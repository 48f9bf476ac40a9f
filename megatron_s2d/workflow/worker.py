"""One job on one rank: set up the process, run the stage or evaluation, mark it finished.

``execute`` is what all ways of running share: ranks started here (``run.py``), or by torchrun and srun.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from megatron_s2d.artifacts.files import file_digest, tree_digest
from megatron_s2d.artifacts.lock import directory_lock
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device
from megatron_s2d.parallel.collectives import max_over_ranks
from megatron_s2d.parallel.layout import (
    Layout,
    build_layout,
    initialize_distributed,
    seed_everything,
    shutdown_distributed,
)
from megatron_s2d.parallel.watchdog import watchdog
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.evaluate import ROWS_NAME, run_evaluation
from megatron_s2d.stages.registry import STAGES
from megatron_s2d.train.loop import Stopped
from megatron_s2d.workflow.job_outcome import JobOutcome
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.process_pool import Rank, heartbeat_path

LOG_NAME = "log.txt"
_LOCK_WAIT_SECONDS = 60.0


def run_in_own_process(config: WorkflowConfig, job: Job, run_dir: Path, place: Rank, report: Connection) -> None:
    """Body of a process that runs one rank of one job; its ``Outcome`` goes to ``report``."""
    _end_with(report)
    _print_to(job.directory.path / LOG_NAME if place.rank == 0 else job.directory.path / f"rank{place.rank}-{LOG_NAME}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the runner, which asks us to stop in order
    asked = StopOnSignal()
    report.send(outcome_of(lambda: _run_rank(config, job, run_dir, place, asked)))


def _run_rank(config: WorkflowConfig, job: Job, run_dir: Path, place: Rank, asked: Callable[[], bool]) -> None:
    torch.set_num_threads(config.threads_per_rank)
    with contextlib.ExitStack() as stack:
        if place.rank == 0:
            # A killed runner's processes end with it, but not at once: never two writers in one directory.
            stack.enter_context(directory_lock(job.directory.path, wait_seconds=_LOCK_WAIT_SECONDS))
        initialize_distributed(rank=place.rank, world_size=place.world_size, rendezvous=place.rendezvous)
        execute(config, job, run_dir, build_layout(config.parallel), asked)
        shutdown_distributed()


def execute(config: WorkflowConfig, job: Job, run_dir: Path, layout: Layout, stop: Callable[[], bool]) -> None:
    """Run ``job`` on this rank; collective over the layout's ranks. The directory is marked finished at the end."""
    with watchdog(heartbeat_path(job, torch.distributed.get_rank()), config.watchdog_timeout_seconds):
        _execute(config, job, run_dir, layout, stop)


def _execute(config: WorkflowConfig, job: Job, run_dir: Path, layout: Layout, stop: Callable[[], bool]) -> None:
    started = time.perf_counter()
    directory = job.directory
    inputs = {id_.removeprefix("stages/"): StageDirectory(run_dir / id_) for id_ in job.inputs}
    context = StageContext(config, job.stage, directory, inputs, layout, run_dir / "tokenizer", stop)
    if context.is_rank_zero:
        directory.begin(job.resolved, job.inputs, {"seed": context.seed})
    torch.distributed.barrier()
    seed_everything(context.seed)
    with contextlib.closing(context):
        if job.is_stage:
            STAGES[context.stage.type](context)
        else:
            _evaluate(context, job)
    peak = max_over_ranks(device.peak_memory())
    if context.is_rank_zero:
        seconds = time.perf_counter() - started
        summary = {"key": job.key, "seconds": seconds, "outputs": _outputs(directory), "peak_memory": peak}
        directory.finish(summary)
        shutil.rmtree(directory.checkpoints_path, ignore_errors=True)


def _evaluate(context: StageContext, job: Job) -> None:
    evaluation = context.config.evaluation
    if job.pass_rate_check is not None:
        gate = context.config.pass_rate_checks[job.pass_rate_check]
        parts = [(context.prompts(gate.prompts)[: gate.num_prompts], gate.samples_per_prompt)]
    else:
        parts = [(part, evaluation.samples_of(part[0].domain)) for part in map(context.prompts, evaluation.entries)]
    run_evaluation(
        context,
        parts,
        sampling=evaluation.sampling,
        seed=context.config.seed * 1_000_003 + evaluation.seed,
        eval_batch_size=evaluation.eval_batch_size,
    )


def _outputs(directory: StageDirectory) -> dict[str, str]:
    """Digests of what later stages read."""
    found = {}
    for path in (directory.model_path, directory.cache_path):
        if path.exists():
            found[path.name] = tree_digest(path)
    rows = directory.path / ROWS_NAME
    if rows.exists():
        found[rows.name] = file_digest(rows)
    return found


def outcome_of(action: Callable[[], None]) -> JobOutcome:
    """Run ``action`` and say how it ended."""
    try:
        action()
    except Stopped as stopped:
        return JobOutcome("stopped", str(stopped))
    except UserError as error:
        return JobOutcome("error", str(error), traceback.format_exc())
    except Exception as error:  # the boundary of the process: everything is reported, nothing swallowed
        return JobOutcome("crash", f"{type(error).__name__}: {error}", traceback.format_exc())
    return JobOutcome("finished")


class StopOnSignal:
    """True once this process was asked to stop (SIGTERM, or SIGUSR1 as schedulers send before a time limit)."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self._asked = True

    def __call__(self) -> bool:
        return self._asked


def _print_to(path: Path) -> None:
    """Append what this process prints, libraries' warnings above all, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _end_with(report: Connection) -> None:
    """Kill this process as soon as nobody can read ``report`` any more: the runner has ended, however that came about.

    A parent-death signal would not do: the parent is the process server, which lives as long as its children.
    """
    watch = select.poll()
    watch.register(report.fileno(), 0)  # only POLLERR, which comes when the reading end is gone

    def wait() -> None:
        watch.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="runner watch", daemon=True).start()
