"""How a job, and a run, can end. No torch here."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class JobOutcome:
    """How a job ended on one rank; ``error`` is the user's to mend, ``crash`` ours."""

    status: Literal["finished", "stopped", "error", "crash"]
    text: str = ""  # one line
    trace: str = ""  # for --debug


class Interrupted(Exception):
    """The user (or a scheduler) stopped the run; everything that was finished is kept."""


class JobCrashed(Exception):
    """A job's process ended without an outcome or with an unexpected exception; ``trace`` is its traceback."""

    def __init__(self, text: str, trace: str):
        super().__init__(text)
        self.trace = trace
