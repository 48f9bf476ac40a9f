"""Runs one job on one rank: sets the process up, runs the stage or evaluation, marks its directory as finished.

``execute`` is common to all ways of starting ranks: the runner's processes (``runner.py``), torchrun and srun.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from megatron_s2d.artifacts.files import disk_errors, file_digest, remaining_disk_errors, tree_digest
from megatron_s2d.artifacts.lock import directory_lock
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.cache import HEADER_NAME
from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device
from megatron_s2d.parallel.collectives import first_error, max_over_ranks
from megatron_s2d.parallel.launcher_env import is_launched, local_rank
from megatron_s2d.parallel.layout import (
    Layout,
    build_layout,
    initialize_distributed,
    seed_everything,
    shutdown_distributed,
)
from megatron_s2d.parallel.watchdog import watchdog
from megatron_s2d.stages.context import StageContext, derive_seed
from megatron_s2d.stages.evaluate import ROWS_NAME, run_evaluation
from megatron_s2d.stages.registry import STAGES
from megatron_s2d.train.loop import Stopped
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.stage_sizes import out_of_gpu_memory, room_for_servers
from megatron_s2d.workflow.status import RESUME_HINT, STOP_SIGNALS, JobOutcome, RankAddress

LOG_NAME = "log.txt"
_LOCK_WAIT_SECONDS = 60.0
_REFUSALS = ("can't allocate memory", "can't start new thread", "Cannot allocate memory", "std::bad_alloc")


def run_rank(config: WorkflowConfig, job: Job, run_dir: Path, address: RankAddress, pipe: Connection) -> None:
    """Run one rank of a job in this process, which the runner forked, and send its ``JobOutcome`` to ``pipe``."""
    exit_with_runner(pipe)
    name = LOG_NAME if address.rank == 0 else f"rank{address.rank}-{LOG_NAME}"
    try:
        _redirect_output(job.directory.path / name)
    except UserError as error:
        pipe.send(JobOutcome("error", str(error)))
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the runner, which asks each rank to stop
    stop = StopOnSignal()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked since the start of this process
    pipe.send(capture_outcome(lambda: _run_job(config, job, run_dir, address, stop)))


def _run_job(config: WorkflowConfig, job: Job, run_dir: Path, address: RankAddress, stop: Callable[[], bool]) -> None:
    torch.set_num_threads(threads_of(config))
    with contextlib.ExitStack() as stack:
        if address.rank == 0:
            # Processes of a killed runner end shortly after it: the lock prevents two writers in one directory.
            stack.enter_context(directory_lock(job.directory.path, wait_seconds=_LOCK_WAIT_SECONDS))
        initialize_distributed(
            rank=address.rank,
            world_size=address.world_size,
            rendezvous=address.rendezvous,
            timeout_minutes=config.distributed_timeout_minutes,
        )
        execute(config, job, run_dir, build_layout(config.parallel), stop)
        shutdown_distributed()


def threads_of(config: WorkflowConfig) -> int:
    """Return the CPU threads of one rank: the configured number, or this rank's share of PyTorch's default."""
    ranks = config.parallel.world_size * config.max_parallel_stages
    return config.threads_per_rank or max(1, torch.get_num_threads() // ranks)


def execute(config: WorkflowConfig, job: Job, run_dir: Path, layout: Layout, stop: Callable[[], bool]) -> None:
    """Run ``job`` on this rank, collectively with the layout's ranks, and mark its directory as finished."""
    rank = torch.distributed.get_rank()
    on_machine = local_rank() if is_launched() else rank
    with watchdog(job.heartbeat_path, config.watchdog_timeout_seconds, rank=rank, local_rank=on_machine):
        _execute(config, job, run_dir, layout, stop)


def _execute(config: WorkflowConfig, job: Job, run_dir: Path, layout: Layout, stop: Callable[[], bool]) -> None:
    started = time.perf_counter()
    directory = job.directory
    inputs = {id_.removeprefix("stages/"): StageDirectory(run_dir / id_) for id_ in job.inputs}
    context = StageContext.create(
        config,
        job.stage,
        directory=directory,
        inputs=inputs,
        layout=layout,
        tokenizer_cache=run_dir / "tokenizer",
        stop=stop,
    )
    if context.is_rank_zero:
        directory.begin(job.resolved, job.inputs, {"seed": context.seed})
    failure = first_error(changed_input(inputs) if context.is_rank_zero else None)
    if failure is not None:
        raise UserError(failure)
    context.rollouts.limit_servers(room_for_servers(config, job.stage, context.inputs))
    seed_everything(context.seed)
    try:
        with context:
            if job.is_stage:
                STAGES[context.stage.type](context)
            else:
                _evaluate(config, context, job)
    except torch.OutOfMemoryError as error:
        line = out_of_gpu_memory(error, config, job.stage, context.inputs, layout)
        raise UserError(f"{line}; {RESUME_HINT}") from error
    peak = max_over_ranks(device.peak_memory())
    if context.is_rank_zero:
        seconds = time.perf_counter() - started
        summary = {"key": job.key, "seconds": seconds, "outputs": _outputs(directory), "peak_memory": peak}
        directory.finish(summary)
        shutil.rmtree(directory.checkpoints_path, ignore_errors=True)


def _evaluate(config: WorkflowConfig, context: StageContext, job: Job) -> None:
    evaluation = config.evaluation
    if job.pass_rate_check is not None:
        check = config.pass_rate_checks[job.pass_rate_check]
        prompt_sets = [(context.inputs.prompts(check.prompts)[: check.num_prompts], check.samples_per_prompt)]
    else:
        prompt_sets = [
            (prompts, evaluation.samples_of(prompts[0].domain))
            for prompts in map(context.inputs.prompts, evaluation.entries)
        ]
    run_evaluation(
        context,
        prompt_sets,
        sampling=evaluation.sampling,
        seed=derive_seed(config, evaluation.seed),
        eval_batch_size=evaluation.eval_batch_size,
    )


def changed_input(inputs: Mapping[str, StageDirectory]) -> str | None:
    """Compare what finished stages left with the digests that they recorded; return the first difference, or None.

    Errors are returned too: one rank reads, and the others wait for what it says.
    """
    for directory in inputs.values():
        try:
            recorded, current = directory.finished().get("outputs", {}), _outputs(directory)
        except (UserError, OSError) as error:
            return str(error)
        for name in sorted(recorded | current):
            if recorded.get(name) != current.get(name):
                return (
                    f"{directory.path / name} has changed since its stage finished: restore it, or remove "
                    f"{directory.path} to run the stage again"
                )
    return None


def _outputs(directory: StageDirectory) -> dict[str, str]:
    """Return file or folder name -> digest of what later stages read.

    Of a teacher cache the header is read, which has the digests of all other files: every sample is compared with its
    own when it is used.
    """
    digests = {}
    if directory.model_path.exists():
        digests[directory.model_path.name] = tree_digest(directory.model_path)
    if directory.cache_path.exists():
        header = directory.cache_path / HEADER_NAME
        digests[directory.cache_path.name] = file_digest(header) if header.exists() else "no header"
    rows = directory.path / ROWS_NAME
    if rows.exists():
        digests[rows.name] = file_digest(rows)
    return digests


def capture_outcome(action: Callable[[], None]) -> JobOutcome:
    """Run ``action`` and return how it ended."""
    try:
        with remaining_disk_errors():
            action()
    except Stopped as stopped:
        return JobOutcome("stopped", str(stopped))
    except UserError as error:
        return JobOutcome("error", str(error), traceback.format_exc())
    except Exception as error:  # outermost handler of the process: the runner reports it
        if (message := out_of_memory(error)) is not None:
            return JobOutcome("error", message, traceback.format_exc())
        return JobOutcome("crash", f"{type(error).__name__}: {error}", traceback.format_exc())
    return JobOutcome("finished")


def out_of_memory(error: BaseException) -> str | None:
    """Return one line if ``error`` says that the system refused memory or a thread; None for other errors."""
    text = str(error).strip().splitlines()
    is_refusal = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _REFUSALS)
    )
    if not is_refusal and not (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return None
    detail = f" ({text[0][:200]})" if text else ""
    return (
        f"out of memory{detail}: give the job more memory, or lower micro_batch.max_tokens_per_gpu or "
        f"rollout.max_batch_tokens (s2d plan estimates both); {RESUME_HINT}"
    )


class StopOnSignal:
    """True once this process got SIGTERM, or SIGUSR1, which schedulers send before a time limit."""

    def __init__(self) -> None:
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._record)

    def _record(self, *_: object) -> None:
        self._requested = True

    def __call__(self) -> bool:
        return self._requested


def _redirect_output(path: Path) -> None:
    """Append what this process and its libraries print to a file."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def exit_with_runner(pipe: Connection) -> None:
    """Kill this process as soon as the runner has ended for any reason and cannot read ``pipe`` any more.

    A parent-death signal does not work: the parent is the fork server, which lives as long as its children.
    """
    watch = select.poll()
    watch.register(pipe.fileno(), 0)  # only POLLERR, which comes when the reading end is closed

    def wait() -> None:
        watch.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="runner watch", daemon=True).start()
