"""Writes ``report.html`` while a run is active. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_s2d.artifacts.files import atomic_write_bytes
from megatron_s2d.artifacts.versions import library_versions
from megatron_s2d.report.html_page import page_bytes
from megatron_s2d.workflow.collect_results import collect_results
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.preflight import Preflight

_SECONDS = 30.0  # between two pages
_SHARE = 0.02  # of the time that writing pages may take


class LiveReport:
    """The page of a run that has not ended; a page that cannot be written prints one line and stops nothing."""

    def __init__(self, run_dir: Path, jobs: Sequence[Job], preflight: Preflight, say: Callable[[str], None]):
        self._run_dir, self._jobs, self._preflight, self._say = run_dir, jobs, preflight, say
        self._started = time.monotonic()
        self._next = self._started + _SECONDS
        self._failed = False

    def poll(self) -> None:
        """Write the page if it is time to."""
        started = time.monotonic()
        if started < self._next or self._failed:
            return
        try:
            self.write()
        except Exception as error:  # the files of a stage may be half there, the disk full: the run continues
            self._failed = True
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"warning: report.html is written at the end only ({text})")
        ended = time.monotonic()
        self._next = ended + max(_SECONDS, (ended - started) / _SHARE)

    def write(self) -> None:
        """Write the page of what there is now; tables of contrasts come at the end."""
        seconds = time.monotonic() - self._started
        preflight = self._preflight
        results = collect_results(preflight.config, self._jobs, preflight, seconds, library_versions(), live=True)
        atomic_write_bytes(self._run_dir / "report.html", page_bytes(results, {}))
