"""Processes of one job as the runner sees them: where a rank stands, how it ended. No torch here."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.parallel.watchdog import has_stack_dump
from megatron_s2d.workflow.job_outcome import JobOutcome
from megatron_s2d.workflow.plan import Job


@dataclasses.dataclass(frozen=True)
class Rank:
    """Place of a process among those that run one job; they meet through ``rendezvous``, a file that does not exist."""

    rank: int
    world_size: int
    rendezvous: Path


def heartbeat_path(job: Job, rank: int) -> Path:
    """File of the signs of life of ``rank`` in ``job``."""
    return job.directory.path / f"rank{rank}-heartbeat.txt"


class ProcessServer:
    """Forks ranks from one process that has the libraries loaded; start it early, for that takes seconds."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["megatron_s2d.workflow.preload"])

    def warm_up(self) -> None:
        """Begin to load the libraries in the server."""
        multiprocessing.forkserver.ensure_running()

    def start(self, config: WorkflowConfig, job: Job, run_dir: Path) -> list[RankProcess]:
        """One process a rank of the job."""
        world_size = config.parallel.world_size
        meeting = Path(tempfile.mkdtemp(prefix="megatron_s2d_")) / "rendezvous"
        started = []
        for rank in range(world_size):
            receiver, sender = self._context.Pipe(duplex=False)
            arguments = (config, job, run_dir, Rank(rank, world_size, meeting), sender)
            process = self._context.Process(target=_body, args=arguments, daemon=True)
            process.start()
            sender.close()
            started.append(RankProcess(process, receiver, heartbeat_path(job, rank)))
        return started


def _body(config: WorkflowConfig, job: Job, run_dir: Path, place: Rank, report: Connection) -> None:
    # Imported in the server, not in the runner, which starts in a second without torch.
    from megatron_s2d.workflow.worker import run_in_own_process

    run_in_own_process(config, job, run_dir, place, report)


class RankProcess:
    """A started rank."""

    def __init__(self, process: BaseProcess, pipe: Connection, heartbeat: Path):
        self._process, self._pipe, self._heartbeat = process, pipe, heartbeat
        self._said: JobOutcome | None = None

    @property
    def sentinel(self) -> int:
        """For ``multiprocessing.connection.wait``: ready when the process has ended."""
        return self._process.sentinel

    def outcome(self) -> JobOutcome | None:
        """How the rank ended; None while it works. A process that ended without a word has crashed."""
        code = self._process.exitcode  # read before the pipe: what was said was said before the end
        if self._said is None and self._pipe.poll():
            try:
                self._said = self._pipe.recv()
            except EOFError:
                pass
        if self._said is None and code is not None:
            why = f"ended with signal {-code}" if code < 0 else f"ended with exit code {code}"
            why += " (out of memory?)" if code == -signal.SIGKILL else ""
            if has_stack_dump(self._heartbeat):
                why = f"made no progress for watchdog_timeout_seconds; where it stood is in {self._heartbeat}"
            self._said = JobOutcome("crash", f"a process {why}; the same command goes on from its checkpoint")
        return self._said

    def ask_to_stop(self) -> None:
        """Have the rank save a checkpoint and end."""
        if self._process.exitcode is None:
            os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def join(self) -> None:
        """Wait for the process to be gone."""
        self._process.join()
