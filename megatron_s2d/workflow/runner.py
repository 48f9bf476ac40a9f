"""Executes a workflow: plan, checks, jobs in their order, results, report.

Who waits for whom: the runner holds the run directory and starts ready jobs, at most ``num_workers`` at a time, each as
``parallel.world_size`` processes forked from one server that has the libraries loaded. A job's ranks talk to each other
only; each sends one ``Outcome`` to the runner when it ends, and the runner reads progress from the jobs' metrics files.
A rank kills itself when the runner is gone. Under a launcher, see ``launched.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import wait
from pathlib import Path

from rich.console import Console

from megatron_s2d.artifacts.files import atomic_write_json, atomic_write_text, read_json
from megatron_s2d.artifacts.lock import directory_lock
from megatron_s2d.artifacts.versions import library_versions
from megatron_s2d.config.base import dump, parse
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.formatting import format_seconds
from megatron_s2d.report.report import print_report, write_report
from megatron_s2d.train.metrics import Progress
from megatron_s2d.workflow.collect_results import collect_results
from megatron_s2d.workflow.job_outcome import Interrupted, JobCrashed
from megatron_s2d.workflow.plan import Job, make_plan
from megatron_s2d.workflow.preflight import Preflight, check_workflow
from megatron_s2d.workflow.process_pool import ProcessServer, RankProcess

_POLL_SECONDS = 0.25
_LOCK_WAIT_SECONDS = 30.0


def run_workflow(config: WorkflowConfig, run_dir: Path, console: Console, stage: str | None = None) -> None:
    """Run what is not done yet, and write the report. The same call goes on after any interruption.

    With ``stage`` only that stage runs, with its evaluation and gates, and no report is written. Raises ``UserError``
    (with the run's state intact), ``Interrupted``, or ``JobCrashed``.
    """
    started = time.perf_counter()
    server = ProcessServer()
    server.warm_up()
    with prepared(config, run_dir, console, stage) as (jobs, checked):
        if any(job.is_pending for job in jobs):
            _Runner(config, run_dir, jobs, checked.totals, server, console).run()
        if stage is None:
            finish(config, run_dir, jobs, checked, time.perf_counter() - started, console)


@contextlib.contextmanager
def prepared(
    config: WorkflowConfig, run_dir: Path, console: Console, stage: str | None
) -> Iterator[tuple[list[Job], Preflight]]:
    """The jobs of this run and what preflight found; other runs are kept away until the block ends.

    A whole run has the run directory for itself. Runs of single stages share it, one run a stage; the list then holds
    that stage's jobs, and the finished ones.
    """
    patience = {"wait_seconds": _LOCK_WAIT_SECONDS, "announce": console.print}
    if stage is None:
        with directory_lock(run_dir, **patience):
            checked = check_workflow(config, run_dir / "tokenizer")
            yield _supersede(make_plan(config, run_dir), config, run_dir, console), checked
        return
    running = run_dir / ".running"
    with directory_lock(run_dir, shared=True, **patience), directory_lock(running / stage, **patience):
        with directory_lock(running, **patience):
            checked = check_workflow(config, run_dir / "tokenizer")
            jobs = _supersede(_only(make_plan(config, run_dir), stage), config, run_dir, console)
        yield jobs, checked


def _only(jobs: list[Job], stage: str) -> list[Job]:
    """The jobs of ``stage``, of which the inputs must be finished, and all finished ones."""
    own = [job for job in jobs if job.stage == stage]
    if not own:
        names = ", ".join(job.stage for job in jobs if job.is_stage)
        raise UserError(f"--stage {stage}: no such stage among those that the arms need ({names})")
    done = [job for job in jobs if job.stage != stage and not job.is_pending]
    available = {job.id for job in [*own, *done]}
    missing = [name for job in own for name in job.inputs if name not in available]
    if missing:
        raise UserError(f"--stage {stage}: its input {missing[0]} is not finished; run that stage first")
    return [*done, *own]


def _supersede(jobs: list[Job], config: WorkflowConfig, run_dir: Path, console: Console) -> list[Job]:
    """``jobs``; directories of those that changed are moved aside, with the reason."""
    for job in jobs:
        if job.action == "rerun":
            console.print(f"{job.id}: runs again, {job.reason}", markup=False, highlight=False, soft_wrap=True)
            job.directory.archive(job.reason)
    reused = sum(not job.is_pending for job in jobs)
    if reused:
        console.print(f"{reused} of {len(jobs)} stages and evaluations are finished and reused", highlight=False)
    atomic_write_json(run_dir / "config.json", dump(config))
    return jobs


def finish(
    config: WorkflowConfig, run_dir: Path, jobs: list[Job], checked: Preflight, seconds: float, console: Console
) -> Path:
    """Results, report and table."""
    environment = library_versions() | {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    results = collect_results(config, run_dir, jobs, checked, seconds, environment)
    page = write_report(run_dir, results)
    atomic_write_text(run_dir / "label_ledger.json", checked.ledger_json())
    print_report(results, console)
    console.print(f"report: {page}   ({format_seconds(seconds)})", markup=False, highlight=False, soft_wrap=True)
    return page


@dataclasses.dataclass
class _Running:
    """A job with its processes."""

    job: Job
    ranks: list[RankProcess]
    started: float


class _Runner:
    """Starts jobs whose inputs are finished, watches them, and stops all when one fails or the user asks."""

    def __init__(
        self,
        config: WorkflowConfig,
        run_dir: Path,
        jobs: list[Job],
        totals: Mapping[str, int],
        server: ProcessServer,
        console: Console,
    ):
        self._config, self._run_dir, self._totals, self._server = config, run_dir, totals, server
        self._pending = [job for job in jobs if job.is_pending]
        self._done = {job.id for job in jobs if not job.is_pending}
        self._running: list[_Running] = []
        self._progress = Progress(console)
        self._failure: Exception | None = None

    def run(self) -> None:
        """Until everything is done; raises what went wrong first."""
        with _signals() as asked, self._progress:
            while self._running or (self._pending and self._failure is None):
                if asked() and self._failure is None:
                    self._fail(Interrupted("stopped; the same command goes on from here"))
                if self._failure is None:
                    self._start_ready()
                wait([rank.sentinel for item in self._running for rank in item.ranks], timeout=_POLL_SECONDS)
                for item in list(self._running):
                    self._look_at(item)
                self._progress.refresh()
        if self._failure is not None:
            raise self._failure

    def _start_ready(self) -> None:
        for job in list(self._pending):
            if len(self._running) >= self._config.max_parallel_stages:
                return
            if all(name in self._done for name in job.inputs):
                self._pending.remove(job)
                self._progress.add(job.id, self._totals.get(job.id, job.total), job.directory)
                ranks = self._server.start(self._config, job, self._run_dir)
                self._running.append(_Running(job, ranks, time.monotonic()))

    def _look_at(self, item: _Running) -> None:
        """Settle a job whose ranks have all ended, or of which one failed: then the others cannot go on."""
        outcomes = [rank.outcome() for rank in item.ranks]
        bad = next((found for found in outcomes if found is not None and found.status in ("error", "crash")), None)
        if bad is None and None in outcomes:
            return
        for rank in item.ranks:
            if bad is not None:
                rank.kill()
            rank.join()
        self._running.remove(item)
        self._progress.refresh()
        if bad is not None:
            self._progress.finish(item.job.id, "failed")
            text = f"{item.job.id}: {bad.text}"
            self._fail(UserError(text) if bad.status == "error" else JobCrashed(text, bad.trace))
        elif all(found.status == "finished" for found in outcomes):
            self._done.add(item.job.id)
            self._progress.finish(item.job.id, f"done in {format_seconds(time.monotonic() - item.started)}")
        else:
            self._progress.finish(item.job.id, outcomes[0].text or "stopped")

    def _fail(self, failure: Exception) -> None:
        """Remember the first failure and ask every job to save a checkpoint and end."""
        if self._failure is None:
            self._failure = failure
            for item in self._running:
                for rank in item.ranks:
                    rank.ask_to_stop()


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGINT, SIGTERM or SIGUSR1 came; a second SIGINT ends the process at once."""
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report_again(run_dir: Path, console: Console) -> None:
    """Write the report of a run whose jobs are all finished."""
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir}: not a run directory (no config.json)")
    config = parse(WorkflowConfig, read_json(path), str(path))
    jobs = make_plan(config, run_dir)
    missing = [job.id for job in jobs if job.is_pending]
    if missing:
        raise UserError(f"{run_dir}: {missing[0]} is not finished ({len(missing)} in all); run the workflow first")
    results = run_dir / "results.json"
    # Stages that ran one by one, such as jobs of a cluster, leave no time of the whole but their own.
    seconds = sum(job.directory.finished()["seconds"] for job in jobs)
    if results.exists():
        seconds = read_json(results)["wall_seconds"]
    finish(config, run_dir, jobs, check_workflow(config, run_dir / "tokenizer"), seconds, console)
