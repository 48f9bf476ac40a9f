"""Records that the runner and its rank processes share: the address of a rank and how a job ends. No torch here."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Literal

RESUME_HINT = "run the same command again to resume"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: of schedulers, before a time limit


@dataclasses.dataclass(frozen=True)
class RankAddress:
    """Rank of a process in its job, and the file for the rendezvous of the job's ranks (it must not exist yet)."""

    rank: int
    world_size: int
    rendezvous: Path


@dataclasses.dataclass(frozen=True)
class JobOutcome:
    """How a job ended on one rank: ``error`` is a mistake that the user can correct, ``crash`` is any other failure."""

    status: Literal["finished", "stopped", "error", "crash"]
    message: str = ""  # one line
    traceback: str = ""  # for --debug


class Interrupted(Exception):
    """The user (or a scheduler) stopped the run; finished work and checkpoints are on disk."""


class JobCrashed(Exception):
    """A process of a job died or raised an unexpected exception, of which ``traceback`` is the text."""

    def __init__(self, message: str, traceback: str):
        super().__init__(message)
        self.traceback = traceback
