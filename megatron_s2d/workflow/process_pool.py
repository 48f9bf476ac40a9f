"""Starts the processes of a job (one per rank) and reports how each one ended. No torch in the runner's process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.parallel.watchdog import has_stack_dump
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.status import RESUME_HINT, JobOutcome, RankAddress


class ProcessServer:
    """Forks rank processes from one server process that has imported the libraries (seconds, so start it early)."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["megatron_s2d.workflow.preload"])

    def warm_up(self) -> None:
        """Start the server process, which begins to import the libraries."""
        multiprocessing.forkserver.ensure_running()

    def start(self, config: WorkflowConfig, job: Job, run_dir: Path) -> list[RankProcess]:
        """Start one process for each rank of the job."""
        world_size = config.parallel.world_size
        scratch = _Scratch(world_size)
        processes = []
        for rank in range(world_size):
            receiver, sender = self._context.Pipe(duplex=False)
            arguments = (config, job, run_dir, RankAddress(rank, world_size, scratch.rendezvous), sender)
            process = self._context.Process(target=_run_worker, args=arguments, daemon=True)
            process.start()
            sender.close()
            processes.append(RankProcess(process, receiver, job.heartbeat_path(rank), scratch))
        return processes


def _run_worker(config: WorkflowConfig, job: Job, run_dir: Path, address: RankAddress, pipe: Connection) -> None:
    # Imported in the forked process: the runner itself starts in a second because it does not load torch.
    from megatron_s2d.workflow.worker import run_rank

    run_rank(config, job, run_dir, address, pipe)


class _Scratch:
    """The directory in which the ranks of a job meet, on a local disk; removed when the last one has ended."""

    def __init__(self, num_users: int):
        self._directory = tempfile.mkdtemp(prefix="megatron_s2d_")
        self._num_users = num_users
        self.rendezvous = Path(self._directory) / "rendezvous"

    def release(self) -> None:
        """Called once by each user."""
        self._num_users -= 1
        if self._num_users == 0:
            shutil.rmtree(self._directory, ignore_errors=True)


class RankProcess:
    """A started rank."""

    def __init__(self, process: BaseProcess, pipe: Connection, heartbeat: Path, scratch: _Scratch):
        self._process, self._pipe, self._heartbeat, self._scratch = process, pipe, heartbeat, scratch
        self._outcome: JobOutcome | None = None

    @property
    def sentinel(self) -> int:
        """Handle for ``multiprocessing.connection.wait`` that is ready when the process has ended."""
        return self._process.sentinel

    def outcome(self) -> JobOutcome | None:
        """Return how the rank ended, or None while it works. A process that ended without an outcome has crashed."""
        code = self._process.exitcode  # read before the pipe: an outcome is sent before the process ends
        if self._outcome is None and self._pipe.poll():
            with contextlib.suppress(EOFError):
                self._outcome = self._pipe.recv()
        if self._outcome is None and code is not None:
            self._outcome = JobOutcome("crash", f"a rank process {self._cause_of_death(code)}; {RESUME_HINT}")
        return self._outcome

    def _cause_of_death(self, exit_code: int) -> str:
        if has_stack_dump(self._heartbeat):
            return f"made no progress for watchdog_timeout_seconds; its stacks are in {self._heartbeat}"
        if exit_code >= 0:
            return f"exited with code {exit_code}"
        return f"was killed by signal {-exit_code}" + (" (out of memory?)" if exit_code == -signal.SIGKILL else "")

    def request_stop(self) -> None:
        """Ask the rank to save a checkpoint and end."""
        if self._process.exitcode is None:
            os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def join(self) -> None:
        """Wait until the process has ended; called once."""
        self._process.join()
        self._scratch.release()
