"""Starts the processes of a job (one per rank) and reports how each one ended. No torch in the runner's process."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import multiprocessing
import multiprocessing.resource_tracker
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.parallel.cuda_variables import set_device_variables
from megatron_s2d.parallel.watchdog import has_stack_dump
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.status import RESUME_HINT, STOP_SIGNALS, JobOutcome, RankAddress

_SCRATCH_PREFIX = "megatron_s2d_"

_NO_STATUS = 255  # exit code that multiprocessing reports if the process that it forks from has ended


def num_gpus() -> int:
    """Return the number of GPUs that the CUDA driver lists; 0 without a driver. Loads no torch and takes no memory."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


class ProcessServer:
    """Starts rank processes: forks of one process that has imported the libraries, or new ones where there are GPUs.

    A fork starts in milliseconds, but can use CUDA only if no library asked for a device when it was imported, as some
    do (flashinfer; torch.utils.cpp_extension). New processes import for themselves, which takes seconds.
    """

    def __init__(self) -> None:
        self._forks = num_gpus() == 0
        self._context = multiprocessing.get_context("forkserver" if self._forks else "spawn")
        if self._forks:
            self._context.set_forkserver_preload(["megatron_s2d.workflow.preload"])

    def warm_up(self) -> None:
        """Start the process to fork from, which begins to import the libraries."""
        if self._forks:
            with stop_signals_blocked():
                multiprocessing.forkserver.ensure_running()

    def start(self, config: WorkflowConfig, job: Job, run_dir: Path) -> list[RankProcess]:
        """Start one process for each rank of the job."""
        world_size = config.parallel.world_size
        scratch = Scratch(world_size)
        processes = []
        for rank in range(world_size):
            receiver, sender = self._context.Pipe(duplex=False)
            arguments = (config, job, run_dir, RankAddress(rank, world_size, scratch.rendezvous), sender)
            process = self._context.Process(target=_run_worker, args=arguments, daemon=True)
            with stop_signals_blocked():
                process.start()
            sender.close()
            processes.append(RankProcess(process, receiver, job.heartbeat_path, scratch))
        return processes


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block the signals that stop a run while a process is started, which keeps them blocked.

    Schedulers and terminals signal the whole process group. The process that ranks are forked from must outlive its
    ranks, and a rank takes signals only when it can answer with a checkpoint (``run_rank``).
    """
    multiprocessing.resource_tracker.ensure_running()  # would unblock SIGINT and SIGTERM when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_worker(config: WorkflowConfig, job: Job, run_dir: Path, address: RankAddress, pipe: Connection) -> None:
    set_device_variables(config)  # before the imports: some libraries start CUDA when they are imported
    # Imported in the rank's process: the runner itself starts in a second because it does not load torch.
    import megatron_s2d.workflow.preload  # noqa: F401
    from megatron_s2d.workflow.worker import run_rank

    run_rank(config, job, run_dir, address, pipe)


class Scratch:
    """The directory in which the ranks of a job meet, on a local disk; removed when the last one has ended.

    A runner that is killed leaves it; the next one on this machine removes it.
    """

    def __init__(self, num_users: int):
        remove_abandoned()
        self._directory = tempfile.mkdtemp(prefix=_SCRATCH_PREFIX)
        self._num_users = num_users
        self._lock = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.rendezvous = Path(self._directory) / "rendezvous"

    def release(self) -> None:
        """Called once by each user."""
        self._num_users -= 1
        if self._num_users == 0:
            shutil.rmtree(self._directory, ignore_errors=True)
            os.close(self._lock)


def remove_abandoned() -> None:
    """Remove the directories of this user's killed runners: those that nobody has locked, of an hour ago or more."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, gone meanwhile, or locked
            if path.is_symlink() or path.stat().st_uid != os.getuid() or time.time() - path.stat().st_mtime < 3600:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)


class RankProcess:
    """A started rank."""

    def __init__(self, process: BaseProcess, pipe: Connection, heartbeat: Path, scratch: Scratch):
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
        if exit_code == 1 and has_stack_dump(self._heartbeat):
            return f"made no progress for watchdog_timeout_seconds; its stacks are in {self._heartbeat}"
        if exit_code == _NO_STATUS:
            return "ended with the process that it was forked from, which was killed (out of memory?)"
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
