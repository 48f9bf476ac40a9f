"""Runs a workflow on this machine: checks and plan first, then the jobs in order, then results and report.

The runner locks the run directory and starts jobs whose inputs are finished, at most ``max_parallel_stages`` at a time,
each as ``parallel.world_size`` processes forked from one server that has imported the libraries. Ranks of a job
communicate with each other only; each sends one ``JobOutcome`` to the runner when it ends, and the runner reads
progress from the jobs' metrics files. A rank kills itself when the runner has ended. ``torchrun_runner.py`` does the
same on ranks that a launcher started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import wait
from pathlib import Path

from rich.console import Console

from megatron_s2d.artifacts.files import atomic_write_json, atomic_write_text, read_json_object
from megatron_s2d.artifacts.lock import directory_lock
from megatron_s2d.artifacts.shapes import Results, checked
from megatron_s2d.artifacts.versions import library_versions
from megatron_s2d.config.base import dump, parse
from megatron_s2d.config.stage import TrainingStageConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.formatting import format_seconds, printable
from megatron_s2d.report.report import print_report, write_report
from megatron_s2d.workflow.collect_results import collect_results
from megatron_s2d.workflow.live_report import LiveReport
from megatron_s2d.workflow.plan import Job, make_plan, needed_stages
from megatron_s2d.workflow.plan_table import print_warnings
from megatron_s2d.workflow.preflight import Preflight, check_workflow
from megatron_s2d.workflow.process_pool import ProcessServer, RankProcess
from megatron_s2d.workflow.progress import Progress
from megatron_s2d.workflow.server_room import check_servers
from megatron_s2d.workflow.status import RESUME_HINT, STOP_SIGNALS, Interrupted, JobCrashed

_POLL_SECONDS = 0.25
_LOCK_WAIT_SECONDS = 30.0
_STOP_SECONDS = 2.0  # for a round that ends by itself


def run_workflow(config: WorkflowConfig, run_dir: Path, console: Console, stage: str | None = None) -> None:
    """Run the jobs that are not finished and write the report; after an interruption the same call resumes.

    With ``stage`` only that stage runs, with its evaluation and pass-rate checks, and no report is written. Raises
    ``UserError``, ``Interrupted`` or ``JobCrashed``; the run directory can be resumed after each of them.
    """
    started = time.perf_counter()
    server = ProcessServer()
    server.warm_up()
    with prepare_run(config, run_dir, console, stage) as (jobs, preflight):
        if any(job.is_pending for job in jobs):
            live = functools.partial(LiveReport, run_dir, jobs, preflight) if stage is None else None
            _Runner(config, run_dir, jobs, preflight.totals, server, console, live).run()
        if stage is None:
            write_results(config, run_dir, jobs, preflight, time.perf_counter() - started, console)


@contextlib.contextmanager
def prepare_run(
    config: WorkflowConfig, run_dir: Path, console: Console, stage: str | None
) -> Iterator[tuple[list[Job], Preflight]]:
    """Check the workflow and yield its jobs and the checks' result, with the run directory locked inside the block.

    A run of all stages locks the directory exclusively. Runs of single stages share it, one run per stage; their list
    has that stage's jobs and the finished ones.
    """
    waiting = {"wait_seconds": _LOCK_WAIT_SECONDS, "announce": console.print}
    if stage is None:
        with directory_lock(run_dir, **waiting):
            preflight = check_workflow(config, run_dir / "tokenizer")
            print_warnings(preflight, console)
            jobs = make_plan(config, run_dir)
            check_servers(preflight, jobs)
            yield _archive_changed(jobs, config, run_dir, console), preflight
        return
    if stage not in needed_stages(config):  # before it names a folder
        raise UserError(
            f"--stage {stage}: no arm needs a stage of this name (stages that run: {', '.join(needed_stages(config))})"
        )
    running = run_dir / ".running"
    with directory_lock(run_dir, shared=True, **waiting), directory_lock(running / stage, **waiting):
        with directory_lock(running, **waiting):
            preflight = check_workflow(config, run_dir / "tokenizer")
            print_warnings(preflight, console)
            jobs = _jobs_for(stage, make_plan(config, run_dir))
            check_servers(preflight, jobs)
            jobs = _archive_changed(jobs, config, run_dir, console)
        yield jobs, preflight


def _jobs_for(stage: str, jobs: list[Job]) -> list[Job]:
    """Return the jobs of ``stage``, whose inputs must be finished, and all finished ones."""
    selected = [job for job in jobs if job.stage == stage]
    done = [job for job in jobs if job.stage != stage and not job.is_pending]
    available = {job.id for job in [*selected, *done]}
    missing = [name for job in selected for name in job.inputs if name not in available]
    if missing:
        raise UserError(f"--stage {stage}: its input {missing[0]} is not finished; run that one first")
    return [*done, *selected]


def _archive_changed(jobs: list[Job], config: WorkflowConfig, run_dir: Path, console: Console) -> list[Job]:
    """Move the directories of jobs whose configuration or inputs changed to the archive; return ``jobs``."""
    for job in jobs:
        if job.action == "rerun":
            line = printable(f"{job.id}: will run again: {job.reason}")
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            job.directory.archive(job.reason)
    reused = sum(not job.is_pending for job in jobs)
    if reused:
        console.print(f"{reused} of {len(jobs)} stages and evaluations are finished and reused", highlight=False)
    atomic_write_json(run_dir / "config.json", dump(config))
    return jobs


def write_results(
    config: WorkflowConfig, run_dir: Path, jobs: list[Job], preflight: Preflight, seconds: float, console: Console
) -> None:
    """Write the results, the report and the label ledger of a finished run, and print the table of arms."""
    environment = library_versions() | {"command": " ".join(["s2d", *sys.argv[1:]])}
    results = collect_results(config, jobs, preflight, seconds, environment)
    page = write_report(run_dir, results)
    atomic_write_text(run_dir / "label_ledger.json", preflight.ledger.to_json(preflight.stages))
    print_report(results, console)
    console.print(f"report: {page}   ({format_seconds(seconds)})", markup=False, highlight=False, soft_wrap=True)


@dataclasses.dataclass
class _Running:
    """A job that runs, with its rank processes."""

    job: Job
    ranks: list[RankProcess]
    started: float


class _Runner:
    """Starts jobs whose inputs are finished, and stops all of them when one fails or the user interrupts the run."""

    def __init__(
        self,
        config: WorkflowConfig,
        run_dir: Path,
        jobs: list[Job],
        totals: Mapping[str, int],
        server: ProcessServer,
        console: Console,
        live: Callable[[Callable[[str], None]], LiveReport] | None = None,
    ):
        self._config, self._run_dir, self._totals, self._server = config, run_dir, totals, server
        self._pending = [job for job in jobs if job.is_pending]
        self._done = {job.id for job in jobs if not job.is_pending}
        self._running: list[_Running] = []
        self._progress = Progress(console)
        self._live = live(self._progress.say) if live is not None else None
        self._failure: Exception | None = None
        self._cut: set[str] = set()  # jobs that were killed or stopped before their end
        self._stopping_since = math.inf  # time.monotonic() of the request to stop

    def run(self) -> None:
        """Run all pending jobs; raise the first failure after the other jobs have stopped."""
        with _stop_signals() as stop_requested, self._progress:
            while self._running or (self._pending and self._failure is None):
                if (number := stop_requested()) is not None and self._failure is None:
                    self._stop_all(Interrupted(f"stopped by {signal.Signals(number).name}; {RESUME_HINT}"))
                    self._announce_stop()
                self._end_resumable_rounds()
                if self._failure is None:
                    self._start_ready()
                wait([rank.sentinel for item in self._running for rank in item.ranks], timeout=_POLL_SECONDS)
                for item in list(self._running):
                    self._check(item)
                self._progress.refresh()
                if self._live is not None:
                    self._live.poll()
        is_complete = isinstance(self._failure, Interrupted) and not self._pending and not self._cut
        if self._failure is not None and not is_complete:
            raise self._failure

    def _announce_stop(self) -> None:
        """Say what is waited for, and for what it is not."""
        training = [item.job.id for item in self._running if self._saves_checkpoints(item.job)]
        if training:
            self._progress.say(
                f"stopping: {', '.join(training)} ends its step and saves a checkpoint; Ctrl-C again stops at "
                "once, and the steps since the last checkpoint are repeated"
            )

    def _saves_checkpoints(self, job: Job) -> bool:
        return job.is_stage and isinstance(self._config.stages[job.stage], TrainingStageConfig)

    def _end_resumable_rounds(self) -> None:
        """Kill evaluations and caches shortly after the request to stop: their finished rounds are on disk."""
        if time.monotonic() - self._stopping_since < _STOP_SECONDS:
            return
        for item in self._running:
            if not self._saves_checkpoints(item.job) and item.job.id not in self._cut:
                self._cut.add(item.job.id)
                for rank in item.ranks:
                    rank.kill()

    def _start_ready(self) -> None:
        for job in list(self._pending):
            if len(self._running) >= self._config.max_parallel_stages:
                return
            if all(name in self._done for name in job.inputs):
                self._pending.remove(job)
                self._progress.add(job.id, self._totals.get(job.id, job.total), job.directory)
                ranks = self._server.start(self._config, job, self._run_dir)
                self._running.append(_Running(job, ranks, time.monotonic()))

    def _check(self, item: _Running) -> None:
        """Record the result of a job whose ranks have all ended; when one rank failed, kill the others."""
        outcomes = [rank.outcome() for rank in item.ranks]
        failures = (outcome for outcome in outcomes if outcome is not None and outcome.status in ("error", "crash"))
        failure = next(failures, None)
        if failure is None and None in outcomes:
            return
        if item.job.id in self._cut:
            failure = None
        for rank in item.ranks:
            if failure is not None:
                rank.kill()
            rank.join()
        self._running.remove(item)
        self._progress.refresh()
        if failure is not None:
            self._progress.finish(item.job.id, "failed")
            message = f"{item.job.id}: {failure.message}"
            is_error = failure.status == "error"
            self._stop_all(UserError(message) if is_error else JobCrashed(message, failure.traceback))
        elif all(outcome is not None and outcome.status == "finished" for outcome in outcomes):
            self._done.add(item.job.id)
            self._progress.finish(item.job.id, f"done in {format_seconds(time.monotonic() - item.started)}")
        else:
            self._cut.add(item.job.id)
            is_stopped = outcomes[0] is not None and outcomes[0].status == "stopped"
            self._progress.finish(item.job.id, outcomes[0].message if is_stopped else "stopped; its rounds are kept")

    def _stop_all(self, failure: Exception) -> None:
        """Remember the first failure and ask every job to save a checkpoint and end."""
        if self._failure is None:
            self._failure = failure
            if isinstance(failure, Interrupted):
                self._stopping_since = time.monotonic()
            for item in self._running:
                for rank in item.ranks:
                    rank.request_stop()


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the first of STOP_SIGNALS that came, or None; a second SIGINT raises at once."""
    received: list[int] = []

    def record(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, record) for number in STOP_SIGNALS}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rewrite_report(run_dir: Path, console: Console) -> None:
    """Write the report of a finished run again."""
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir}: not a run directory (no config.json)")
    config = parse(WorkflowConfig, read_json_object(path), str(path))
    jobs = make_plan(config, run_dir)
    missing = [job.id for job in jobs if job.is_pending]
    if missing:
        raise UserError(
            f"{run_dir}: {len(missing)} jobs are not finished ({missing[0]} is the first); run the workflow first"
        )
    results = run_dir / "results.json"
    # Stages that ran one by one (as jobs of a cluster) record only their own times.
    seconds = sum(job.directory.finished()["seconds"] for job in jobs)
    if results.exists():
        seconds = checked(read_json_object(results), Results, str(results))["wall_seconds"]
    with directory_lock(run_dir, wait_seconds=_LOCK_WAIT_SECONDS, announce=console.print):
        write_results(config, run_dir, jobs, check_workflow(config, run_dir / "tokenizer"), seconds, console)
