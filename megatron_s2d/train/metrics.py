"""Metrics and timing of a stage: the writer of ``metrics.jsonl``, which also goes to trackers, and a timer of sections.

A row is ``{"step", "loss", "reward", "kl", "entropy", "response_length", "grad_norm", "tokens_per_second",
"timing_s/step", "time", ...}``: floats reduced over ranks, micro-batches and updates, ``null`` for a value that is not
finite, ``step`` counted from 1 and ``time`` in seconds since 1970. No torch here.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_s2d.artifacts.files import append_line, truncate_jsonl_after
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.tracking import Tracker
from megatron_s2d.parallel.watchdog import heartbeat
from megatron_s2d.train.tracking import BackgroundTracker, open_trackers, validation_results


class MetricsLog:
    """Writer of a stage's ``metrics.jsonl``; each row also goes to the ``trackers`` of ``workflow``.

    ``stage`` is None on ranks that write nothing. Rows beyond ``step``, the checkpoint that training resumes from, are
    dropped: they will be written again.
    """

    def __init__(
        self,
        stage: StageDirectory | None,
        step: int = 0,
        *,
        trackers: Sequence[Tracker] = (),
        workflow: str = "",
    ):
        self._stage = stage
        self._path = stage.metrics_path if stage is not None else None
        self._step = step
        self._trackers: list[BackgroundTracker] = []
        if stage is not None:
            truncate_jsonl_after(stage.metrics_path, last=step)
            self._trackers = open_trackers(trackers, stage, workflow, step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the row of ``step``, which must be greater than the last one; adds ``step`` and ``time``."""
        if step <= self._step:
            raise ValueError(f"metrics of step {step} come after those of step {self._step}")
        self._step = step
        if self._path is None:
            return
        floats = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in floats.items()}
        row: dict[str, Any] = {"step": step, **finite, "time": round(time.time(), 3)}
        append_line(self._path, json.dumps(row))
        for tracker in self._trackers:
            tracker.write(row)

    def write_validations(self) -> None:
        """Send the validations of the stage that trackers do not have yet; they are on disk."""
        if self._trackers and self._stage is not None:
            for row in validation_results(self._stage):
                self._write_result(row)

    def write_result(self, step: int, values: Mapping[str, float]) -> None:
        """Send a result to the trackers, after the metrics of ``step``."""
        self._write_result({"step": step, "time": time.time(), **values})

    def _write_result(self, row: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.write_result(row)

    def close(self) -> None:
        """Let the trackers send what they have; the rows are already on disk."""
        for tracker in self._trackers:
            tracker.close()


_ACTIVE: contextvars.ContextVar[Timer | None] = contextvars.ContextVar("timer", default=None)


def timed(name: str) -> contextlib.AbstractContextManager[None]:
    """Return a section of the timer whose section is open in this thread; without one, nothing is timed."""
    timer = _ACTIVE.get()
    return contextlib.nullcontext() if timer is None else timer.section(name)


class Timer:
    """Wall-clock seconds of named sections; the end of each section is a heartbeat of the rank's watchdog."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._sections: dict[str, float] = {}
        self._inner: list[float] = []  # seconds of finished sections inside each open one

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Add the duration of the block to ``name``, without that of sections inside it; sections may repeat.

        Inside the block ``timed`` adds to this timer.
        """
        start = time.perf_counter()
        self._inner.append(0.0)
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)
            seconds = time.perf_counter() - start
            self._sections[name] = self._sections.get(name, 0.0) + seconds - self._inner.pop()
            if self._inner:
                self._inner[-1] += seconds
            heartbeat()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out of ``timing_s/step``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def collect_and_reset(self) -> dict[str, float]:
        """Return ``timing_s/step`` since the last call and ``timing_s/<section>`` of each section, and start again."""
        now = time.perf_counter()
        times = {"timing_s/step": now - self._start}
        times |= {f"timing_s/{name}": seconds for name, seconds in self._sections.items()}
        self._start, self._sections = now, {}
        heartbeat()
        return times
