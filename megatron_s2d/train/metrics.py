"""What a training stage tells about itself: rows of ``metrics.jsonl``, times of sections, and progress for people.

A row is ``{"step", "loss", "reward", "kl", "entropy", "response_length", "grad_norm", "tokens_per_second", "seconds",
"time", ...}``: plain floats that were already reduced over ranks and micro-batches, ``null`` where a value is not
finite, ``step`` counted from 1 and ``time`` in seconds since 1970. Progress is read back from these files, so that one
process can show several stages that run in others. No torch here, but for the optional TensorBoard writer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from megatron_s2d.artifacts.files import append_line, truncate_jsonl_after
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.formatting import format_seconds
from megatron_s2d.parallel.watchdog import heartbeat

_TAIL_BYTES = 1 << 16


class MetricsLog:
    """Writer of a stage's ``metrics.jsonl``, and of TensorBoard events where a directory for them is given.

    ``stage`` is None on the ranks that write nothing. Rows beyond ``step`` (the checkpoint that training goes on from)
    are dropped: they will be written again.
    """

    def __init__(self, stage: StageDirectory | None, step: int = 0, *, tensorboard: Path | None = None):
        self._path = stage.metrics_path if stage is not None else None
        self._step = step
        self._writer = None
        if self._path is not None:
            truncate_jsonl_after(self._path, last=step)
            if tensorboard is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the row of ``step``, which must be beyond the last one; ``step`` and ``time`` are added here."""
        if step <= self._step:
            raise ValueError(f"metrics of step {step} come after those of step {self._step}")
        self._step = step
        if self._path is None:
            return
        floats = {name: float(value) for name, value in values.items()}
        row = {name: value if math.isfinite(value) else None for name, value in floats.items()}
        append_line(self._path, json.dumps({"step": step, **row, "time": round(time.time(), 3)}))
        if self._writer is not None:
            for name, value in floats.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard; the rows are already on disk."""
        if self._writer is not None:
            self._writer.close()


class Timer:
    """Wall-clock seconds of named sections between two laps; the end of each is a sign of life of the rank."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._sections: dict[str, float] = {}

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Add the duration of the block to ``name``; sections may repeat and may contain others."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._sections[name] = self._sections.get(name, 0.0) + time.perf_counter() - start
            heartbeat()

    def collect_and_reset(self) -> dict[str, float]:
        """``seconds`` since the last lap and ``seconds_<section>`` of each section; the next lap starts at zero."""
        now = time.perf_counter()
        result = {"timing_s/step": now - self._start} | {
            f"timing_s/{name}": took for name, took in self._sections.items()
        }
        self._start, self._sections = now, {}
        heartbeat()
        return result


@dataclasses.dataclass
class _Task:
    total: int
    stage: StageDirectory | None
    started: float  # time.monotonic() when it was added
    first: int  # completed when it was added: a resumed stage does not count what it did before
    completed: int
    note: str
    bar: Any = None  # rich's task id, on a terminal
    said: float = -math.inf  # when the last plain line about it was printed


class Progress:
    """Bars with speed and remaining time on a terminal; elsewhere plain lines, one every ``interval`` seconds a task.

    A task is either updated by its own process (``update``) or followed through the metrics file of its stage
    (``refresh``). Use as a context manager.
    """

    def __init__(self, console: Console | None = None, *, interval: float = 5.0):
        self._console = console if console is not None else Console(stderr=True)
        self._interval = interval
        self._tasks: dict[str, _Task] = {}
        self._bars: RichProgress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[note]}", markup=False))
            name = TextColumn("{task.description}", markup=False)
            self._bars = RichProgress(name, *columns, console=self._console)

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def add(self, name: str, total: int, stage: StageDirectory | None = None) -> None:
        """Start to show ``name``, which ends at ``total``; give ``stage`` where another process works on it."""
        row = last_row(stage.metrics_path) if stage is not None else None
        first = int(row["step"]) if row else 0
        self._tasks[name] = task = _Task(total, stage, time.monotonic(), first, first, "")
        if self._bars is not None:
            task.bar = self._bars.add_task(name, total=total, completed=first, note="")

    def update(self, name: str, completed: int, values: Mapping[str, float | None]) -> None:
        """Show that ``name`` has done ``completed``; of the metrics ``values``, speed, reward and loss are shown."""
        task = self._tasks[name]
        task.completed = completed
        task.note = ", ".join([*_facts(values), *_remaining(task, time.monotonic())])
        self._show(name, task, force=completed >= task.total)

    def refresh(self) -> None:
        """Read the last row of every followed stage."""
        for name, task in self._tasks.items():
            row = last_row(task.stage.metrics_path) if task.stage is not None else None
            if row is not None and int(row["step"]) != task.completed:
                self.update(name, int(row["step"]), row)

    def finish(self, name: str, note: str) -> None:
        """Take ``name`` off, leaving one line behind."""
        task = self._tasks.pop(name)
        if self._bars is not None:
            self._bars.remove_task(task.bar)
        self._console.print(f"{name}: {note}", markup=False, highlight=False)

    def _show(self, name: str, task: _Task, *, force: bool) -> None:
        if self._bars is not None:
            self._bars.update(task.bar, completed=task.completed, note=task.note)
            return
        now = time.monotonic()
        if force or now - task.said >= self._interval:
            task.said = now
            line = f"{name}: {task.completed}/{task.total}" + (f", {task.note}" if task.note else "")
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def last_row(path: Path) -> dict[str, Any] | None:
    """The last complete row of a metrics file that another process may be writing; None where there is none yet."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    # What follows the last newline is being written; the first piece may be cut in the middle.
    whole = lines[1:-1] if size > _TAIL_BYTES else lines[:-1]
    return json.loads(whole[-1]) if whole else None


def _facts(values: Mapping[str, float | None]) -> list[str]:
    facts = []
    speed = values.get("tokens_per_second")
    if speed is not None:
        facts.append(f"{speed:,.0f} tokens/s")
    facts += [f"{name} {values[name]:.3g}" for name in ("reward", "loss") if values.get(name) is not None]
    return facts


def _remaining(task: _Task, now: float) -> list[str]:
    """Time left, from the pace since this process began to watch; nothing before the first step or after the last."""
    done = task.completed - task.first
    if done <= 0 or task.completed >= task.total:
        return []
    return [f"{format_seconds((now - task.started) / done * (task.total - task.completed))} left"]
