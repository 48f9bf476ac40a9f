"""Progress of running stages: bars with speed and remaining time on a terminal, plain lines elsewhere.

Progress is read from the stages' ``metrics.jsonl``, so that one process can show stages that run in other processes. No
torch here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.formatting import format_seconds, percent, printable

_TAIL_BYTES = 1 << 16


@dataclasses.dataclass
class _Task:
    total: int
    stage: StageDirectory | None
    started: float  # time.monotonic() when it was added
    completed_at_start: int  # steps of earlier runs of a resumed stage
    completed: int
    note: str
    bar: Any = None  # rich's task id, on a terminal
    last_printed: float = -math.inf  # time.monotonic() of its last plain line
    num_validations: int = 0  # rows that were printed, or written before this run
    note_changed: int = 0  # modification time of the shown note, in nanoseconds
    num_warnings: int = 0  # of its stage that were shown, in this run or an earlier one


class Progress:
    """Bars with speed and remaining time on a terminal; elsewhere one plain line per task every ``interval`` seconds.

    A task is either updated by the caller (``update``) or read from the metrics file of its stage (``refresh``). Use as
    a context manager.
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
        """Show ``name``, which ends at ``total``; with ``stage``, another process works on it."""
        row = last_row(stage.metrics_path) if stage is not None else None
        completed = int(row["step"]) if row else 0
        num_warnings = len(_lines(stage.warnings_path)) if stage is not None else 0
        self._tasks[name] = task = _Task(
            total, stage, time.monotonic(), completed, completed, "", num_warnings=num_warnings
        )
        task.num_validations = len(stage.validations()) if stage is not None else 0
        if self._bars is not None:
            task.bar = self._bars.add_task(name, total=total, completed=completed, note="")

    def update(self, name: str, completed: int, values: Mapping[str, float | None]) -> None:
        """Show that ``name`` has completed ``completed``, with speed, reward and loss from the metrics ``values``."""
        task = self._tasks[name]
        task.completed = completed
        task.note = ", ".join([*_notes(values), *_remaining(task, time.monotonic())])
        self._show(name, task, force=completed >= task.total)

    def refresh(self) -> None:
        """Read the last row of every stage that another process works on."""
        for name, task in self._tasks.items():
            row = last_row(task.stage.metrics_path) if task.stage is not None else None
            if row is not None and int(row["step"]) != task.completed:
                self.update(name, int(row["step"]), row)
            elif task.stage is not None:
                self._show_note(name, task, task.stage.note_path)
            if task.stage is not None:
                new = _lines(task.stage.warnings_path)[task.num_warnings :]
                task.num_warnings += len(new)
                for line in new:
                    self.say(f"{name}: warning: {printable(line)}")
            self._say_validations(name, task)

    def _say_validations(self, name: str, task: _Task) -> None:
        """Print a line for each validation that the stage has finished since the last call."""
        if task.stage is None or not task.stage.validation_path.exists():
            return
        rows = task.stage.validations()
        task.num_validations = min(task.num_validations, len(rows))  # a resumed stage drops those it repeats
        for row in rows[task.num_validations :]:
            self.say(f"{name}: {validation_line(row)}")
        task.num_validations = len(rows)

    def _show_note(self, name: str, task: _Task, path: Path) -> None:
        """Show what the stage notes inside a round, once for each change of the file."""
        try:
            changed, text = path.stat().st_mtime_ns, path.read_text(encoding="utf-8")
        except OSError:  # none yet, or replaced in this moment
            return
        if changed != task.note_changed:
            task.note_changed, task.note = changed, text
            self._show(name, task, force=False)

    def finish(self, name: str, note: str) -> None:
        """Remove ``name`` and print a line about it."""
        self._say_validations(name, self._tasks[name])
        task = self._tasks.pop(name)
        if self._bars is not None:
            self._bars.remove_task(task.bar)
        self._console.print(f"{name}: {note}", markup=False, highlight=False)

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, name: str, task: _Task, *, force: bool) -> None:
        if self._bars is not None:
            self._bars.update(task.bar, completed=task.completed, note=task.note)
            return
        now = time.monotonic()
        if force or now - task.last_printed >= self._interval:
            task.last_printed = now
            line = f"{name}: {task.completed}/{task.total}" + (f", {task.note}" if task.note else "")
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _lines(path: Path) -> list[str]:
    """Return the complete lines of a file that another process may be writing; none without the file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return []


def last_row(path: Path) -> dict[str, Any] | None:
    """Return the last complete row of a metrics file that another process may be writing; None without one."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    # The text after the last newline is still being written, and the first line of a long file starts in the middle.
    complete = lines[1:-1] if size > _TAIL_BYTES else lines[:-1]
    return json.loads(complete[-1]) if complete else None


def validation_line(row: Mapping[str, Any]) -> str:
    """Return a row of ``validation.jsonl`` as a line: pass rates with standard errors, and what was decided."""
    rates = [
        f"{curve} {percent(data['pass_rate'], data['pass_rate_std_err'])} %" for curve, data in row["data"].items()
    ]
    notes = ["the best so far"] if row["best"] else []
    notes += [f"ends the stage ({row['ended']})"] if row["ended"] else []
    return f"validation after step {row['step']}: {', '.join([*rates, *notes])}"


def _notes(values: Mapping[str, float | None]) -> list[str]:
    notes = []
    speed = values.get("response_tokens_per_second")
    if speed is not None:
        notes.append(f"{speed:,.0f} response tokens/s")
    elif values.get("tokens_per_second") is not None:  # of a stage from before that figure
        notes.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    notes += [f"{name} {values[name]:.3g}" for name in ("reward", "loss") if values.get(name) is not None]
    return notes


def _remaining(task: _Task, now: float) -> list[str]:
    """Return the remaining time at the pace since the task was added; empty before the first step and at the end."""
    num_done = task.completed - task.completed_at_start
    if num_done <= 0 or task.completed >= task.total:
        return []
    return [f"{format_seconds((now - task.started) / num_done * (task.total - task.completed))} left"]
