"""The live view of a run directory in a terminal: stages with their state, curves, speed and remaining time.

Reads files only, of a run that works, has ended, was killed or is only half there, and takes no lock. Everything that
a model or a user's file may have written is made printable: escape sequences never reach the terminal. No torch here.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.errors import UserError
from megatron_s2d.formatting import format_seconds, printable

CURVES = {"reward": ("reward",), "KL": ("kl", "reverse_kl", "forward_kl"), "loss": ("loss",)}
_BLOCKS = "▁▂▃▄▅▆▇█"
_FOLDERS = ("stages", "evaluations", "pass_rate_checks")
_FRESH_SECONDS = 120.0  # a stage whose files have not changed for longer does not run
_RECENT_ROWS = 20  # from which speed and remaining time come
_STYLES = {"done": "green", "running": "bold cyan", "stopped": "yellow", "waiting": "dim"}


class MetricsReader:
    """Rows of a ``metrics.jsonl`` that another process may write, replace or truncate; reads what is new."""

    def __init__(self, path: Path):
        self._path = path
        self._identity: tuple[int, int] = (0, 0)
        self._offset = 0
        self.rows: list[Mapping[str, Any]] = []

    def refresh(self) -> None:
        """Read the complete lines since the last call; lines that are no rows are skipped."""
        try:
            with open(self._path, "rb") as file:
                status = self._path.stat()
                identity = (status.st_dev, status.st_ino)
                if identity != self._identity or status.st_size < self._offset:  # a resume has replaced it
                    self._identity, self._offset, self.rows = identity, 0, []
                file.seek(self._offset)
                content = file.read()
        except OSError:
            self._offset, self.rows = 0, []
            return
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            row = _object(line)
            if isinstance(row.get("step"), int):
                self.rows.append(row)


@dataclasses.dataclass
class JobView:
    """What the view shows of a stage, an evaluation or a pass-rate check."""

    id: str
    directory: StageDirectory
    kind: str
    total: int  # steps; 0 if not known
    reader: MetricsReader

    def state(self, now: float) -> str:
        """``done``, ``running``, ``stopped`` (begun, and nothing has changed for a while) or ``waiting``."""
        if self.directory.finished_path.exists():
            return "done"
        if not self.directory.path.is_dir():
            return "waiting"
        changed = [_modified(path) for path in (self.directory.metrics_path, self.directory.note_path)]
        changed += [_modified(path) for path in self.directory.path.glob("*-heartbeat.txt")]
        changed.append(_modified(self.directory.config_path))
        return "running" if now - max(changed) < _FRESH_SECONDS else "stopped"

    @property
    def step(self) -> int:
        """The last step of the metrics."""
        return int(self.reader.rows[-1]["step"]) if self.reader.rows else 0

    def seconds_per_step(self) -> float | None:
        """Return the mean of the last steps; None before the first."""
        times = finite(row.get("timing_s/step") for row in self.reader.rows[-_RECENT_ROWS:])
        return sum(times) / len(times) if times else None

    def remaining(self) -> str:
        """Return the time to the end at the present speed; empty if it is not known."""
        seconds = self.seconds_per_step()
        left = self.total - self.step
        return format_seconds(seconds * left) if seconds is not None and left > 0 else ""

    def elapsed(self) -> str:
        """Return how long the stage took, or has taken in its steps so far."""
        finished = _read_object(self.directory.finished_path).get("seconds")
        if isinstance(finished, (int, float)):
            return format_seconds(finished)
        times = finite(row.get("timing_s/step") for row in self.reader.rows)
        return format_seconds(sum(times)) if times else ""


class RunView:
    """A run directory as a table; ``render`` reads what has changed."""

    def __init__(self, run_dir: Path):
        if not run_dir.is_dir():
            raise UserError(f"{run_dir}: no such directory; name the run directory (--out of `s2d run`)")
        self._run_dir = run_dir
        self._jobs: dict[str, JobView] = {}
        self._refresh()
        if not self._jobs and not (run_dir / "config.json").exists():
            raise UserError(f"{run_dir}: not a run directory (no config.json and no stages)")

    def is_finished(self) -> bool:
        """Return whether all stages and evaluations are done and the report is there."""
        return (self._run_dir / "results.json").exists() and all(
            job.directory.finished_path.exists() for job in self._jobs.values()
        )

    def render(self, width: int, now: float | None = None) -> RenderableType:
        """Return the table for ``width`` columns, and a line about what runs."""
        self._refresh()
        now = time.time() if now is None else now
        shown = [name for name in CURVES if any(series(job.reader.rows, name) for job in self._jobs.values())]
        spark_width = max(4, min(24, (width - 62) // max(1, len(shown)) - 10))
        name = clean(str(_read_object(self._run_dir / "config.json").get("name", self._run_dir.name)))
        states = [job.state(now) for job in self._jobs.values()]
        title = Text(f"{name}: {states.count('done')} of {len(states)} done, {self._run_dir}")
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("stage", "state", "step"):
            table.add_column(column, no_wrap=True, justify="right" if column == "step" else "left")
        for column in shown:
            table.add_column(column, no_wrap=True)
        for column in ("tokens/s", "time", "left"):
            table.add_column(column, no_wrap=True, justify="right")
        for job, state in zip(self._jobs.values(), states, strict=True):
            table.add_row(*self._cells(job, state, shown, spark_width))
        return Group(title, Text(""), table, *self._lines(states))

    def _cells(self, job: JobView, state: str, shown: Sequence[str], spark_width: int) -> list[Text]:
        rows = job.reader.rows
        steps = f"{job.step}/{job.total}" if job.total else str(job.step or "")
        curves = [curve_text(series(rows, name), spark_width) for name in shown]
        speeds = finite(row.get("response_tokens_per_second") for row in rows[-_RECENT_ROWS:])
        speed = f"{sum(speeds) / len(speeds):,.0f}" if speeds else ""
        label = job.id.removeprefix("stages/")
        left = job.remaining() if state in ("running", "stopped") else ""
        return [
            Text(clean(label)), Text(state, style=_STYLES[state]), Text(steps),
            *map(Text, curves), Text(speed), Text(job.elapsed()), Text(left),
        ]  # fmt: skip

    def _lines(self, states: Sequence[str]) -> list[Text]:
        """Return notes of running stages, warnings, and the last response of the stage that runs or ran last."""
        lines = []
        for job, state in zip(self._jobs.values(), states, strict=True):
            note = _read_text(job.directory.note_path) if state == "running" else ""
            if note:
                lines.append(Text(f"{clean(job.id)}: {clean(note)}"))
            warnings = _read_text(job.directory.warnings_path).splitlines()
            lines += [Text(f"{clean(job.id)}: warning: {clean(line)}", style="yellow") for line in warnings[-3:]]
        begun = [job for job, state in zip(self._jobs.values(), states, strict=True) if state != "waiting"]
        for job in reversed(begun):
            example = _last_object(job.directory.path / "rollouts.jsonl")
            if example:
                verdict = clean(str(example.get("verifier_label") or "not graded"))
                prompt, response = (clean(str(example.get(key, "")))[-160:] for key in ("prompt", "response"))
                lines += [Text(""), Text(f"last sample of {clean(job.id)} (step {example.get('step')}, {verdict}):")]
                lines += [Text(f"  {prompt}", style="dim", overflow="ellipsis"), Text(f"  {response}")]
                break
        return lines

    def _refresh(self) -> None:
        config = _read_object(self._run_dir / "config.json")
        for id_, kind, total in [*_jobs_of(config), *_jobs_on_disk(self._run_dir)]:
            if id_ not in self._jobs:
                directory = StageDirectory(self._run_dir / id_)
                self._jobs[id_] = JobView(id_, directory, kind, total, MetricsReader(directory.metrics_path))
        for job in self._jobs.values():
            job.reader.refresh()


def _jobs_of(config: Mapping[str, Any]) -> Iterable[tuple[str, str, int]]:
    """Yield id, type and steps of the jobs that the resolved workflow names, in the order of its plan."""
    from megatron_s2d.config.base import parse
    from megatron_s2d.config.needed_stages import evaluated_stages, needed_stages
    from megatron_s2d.config.workflow import WorkflowConfig

    try:
        workflow = parse(WorkflowConfig, dict(config), "config.json")
    except UserError:  # half-written, or of another version: what lies on disk is shown
        return
    for name in needed_stages(workflow):
        stage = workflow.stages[name]
        yield f"stages/{name}", stage.type, int(getattr(stage, "steps", 0) or 0)
    for number, check in enumerate(workflow.pass_rate_checks):
        yield f"pass_rate_checks/{number}-{check.stage}", "pass-rate check", 0
    for name in evaluated_stages(workflow):
        yield f"evaluations/{name}", "evaluation", 0


def _jobs_on_disk(run_dir: Path) -> Iterable[tuple[str, str, int]]:
    for folder in _FOLDERS:
        for path in sorted((run_dir / folder).glob("*")) if (run_dir / folder).is_dir() else []:
            if path.is_dir() and not path.name.startswith("."):
                yield f"{folder}/{path.name}", folder, 0


def watch(run_dir: Path, console: Console, *, once: bool, interval: float) -> None:
    """Show the run until it is finished or the user presses Ctrl-C; with ``once``, one time.

    On a terminal the table is drawn in place; elsewhere it is printed as plain text whenever it has changed.
    """
    view = RunView(run_dir)
    try:
        if console.is_terminal and not once:
            with Live(view.render(console.width), console=console, auto_refresh=False) as live:
                while not view.is_finished():
                    time.sleep(interval)
                    live.update(view.render(console.width), refresh=True)
            return
        shown = ""
        while True:
            text = plain(view.render(console.width), console.width)
            if text != shown:
                console.print(Text(text), end="", soft_wrap=True)
                shown = text
            if once or view.is_finished():
                return
            time.sleep(interval)
    except KeyboardInterrupt:  # stops watching, not the run
        return


def plain(content: RenderableType, width: int) -> str:
    """Return ``content`` as text without colors."""
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(content)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def series(rows: Sequence[Mapping[str, Any]], curve: str) -> list[float]:
    """Return the finite values of a curve, of the first of its metrics that the rows have."""
    for key in CURVES[curve]:
        values = finite(row.get(key) for row in rows)
        if values:
            return values
    return []


def finite(values: Iterable[Any]) -> list[float]:
    """Return the finite numbers among ``values``."""
    return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]


def curve_text(values: Sequence[float], width: int) -> str:
    """Return a sparkline and the last value; empty without values."""
    return f"{sparkline(values, width)} {values[-1]:.3g}" if values else ""


def sparkline(values: Sequence[float], width: int) -> str:
    """Return at most ``width`` block characters, each the mean of its part of ``values``, from lowest to highest."""
    count = min(width, len(values))
    edges = [len(values) * index // count for index in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # rounding is no curve
        return _BLOCKS[0] * count
    return "".join(_BLOCKS[min(7, int(8 * (value - low) / (high - low)))] for value in means)


def clean(text: str) -> str:
    """Return ``text`` on one line with control and direction characters written out."""
    return printable(" ".join(text.split()))


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return -math.inf


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _object(line: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_object(path: Path) -> dict[str, Any]:
    return _object(_read_text(path))


def _last_object(path: Path, tail_bytes: int = 1 << 18) -> dict[str, Any]:
    """Return the last complete object of a JSON-lines file; empty without one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - tail_bytes))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    return next((value for line in reversed(lines) if (value := _object(line))), {})
