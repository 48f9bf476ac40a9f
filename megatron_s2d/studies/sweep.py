"""``s2d sweep``: the points of a grid as ordinary runs below one directory, one after the other.

Every point is a workflow of its own under OUT/POINT: it resumes and is reused like any run, and can be looked at with
``s2d eval``. A point that fails is listed and the rest goes on. How a point is run is a function that is handed in, so
that a launcher can submit it instead. No torch here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_s2d.artifacts.files import atomic_write_json, read_json
from megatron_s2d.config.base import dump
from megatron_s2d.config.sweep import SweepConfig
from megatron_s2d.config.workflow import WorkflowConfig, load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.formatting import format_bytes
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.preflight import check_workflow
from megatron_s2d.workflow.status import JobCrashed

FAILURE_NAME = "failure.txt"


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of the sweep."""

    choice: Mapping[str, str]  # axis -> label
    seed: int
    config: WorkflowConfig

    @property
    def name(self) -> str:
        """Its directory below the sweep's."""
        return "_".join([*(f"{axis}-{label}" for axis, label in self.choice.items()), f"seed-{self.seed}"])


RunPoint = Callable[[Point, Path, Console], None]
"""Brings a point's run to its end in the directory given (or sees to it that another machine will), or raises
``UserError`` or ``JobCrashed``."""


def run_here(point: Point, run_dir: Path, console: Console) -> None:
    """The point as ``s2d run`` would run it, on this machine."""
    from megatron_s2d.workflow.runner import run_workflow

    run_workflow(point.config, run_dir, console)


def expand_points(sweep: SweepConfig) -> list[Point]:
    """Every point, seeds innermost; a mistake in workflow or grid is a ``UserError`` that names the point."""
    found = []
    for choice in sweep.choices():
        settings = dict(sweep.set)
        for axis, label in choice.items():
            settings |= sweep.grid[axis].settings(label)
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        for seed in sweep.seeds:
            where = ", ".join(f"{axis} {label}" for axis, label in choice.items())
            try:
                config = load_workflow(sweep.workflow, [*overrides, f"seed={seed}"])
            except UserError as error:
                raise UserError(f"point {where or 'base'}: {error}") from None
            found.append(Point(choice, seed, config))
    _check_names(sweep, found)
    return found


def _check_names(sweep: SweepConfig, points: list[Point]) -> None:
    wanted = [("contrasts", item.arm) for item in sweep.contrasts] + [("fits", item.arm) for item in sweep.fits]
    for point in points:
        for where, arm in wanted:
            if arm not in point.config.arms:
                raise UserError(f"{where}: the workflow has no arm '{arm}' (arms: {', '.join(point.config.arms)})")
        for item in sweep.efficiency:
            if item.stage not in point.config.stages:
                raise UserError(f"efficiency: the workflow has no stage '{item.stage}'")


def run_sweep(sweep: SweepConfig, out: Path, console: Console, run_point: RunPoint = run_here) -> list[Point]:
    """Run what is not finished; returns all points. An interruption ends it."""
    points = expand_points(sweep)
    atomic_write_json(out / "sweep.json", dump(sweep))
    for number, point in enumerate(points, 1):
        run_dir = out / point.name
        head = f"[{number}/{len(points)}] {point.name}"
        if is_finished(point, run_dir):
            console.print(f"{head}: finished", markup=False, highlight=False)
            continue
        console.print(f"{head}: runs", markup=False, highlight=False)
        marker = run_dir / FAILURE_NAME
        marker.unlink(missing_ok=True)
        try:
            run_point(point, run_dir, console)
        except (UserError, JobCrashed) as error:
            run_dir.mkdir(parents=True, exist_ok=True)
            marker.write_text(f"{error}\n", encoding="utf-8")
            console.print(f"{head}: FAILED: {error}", markup=False, highlight=False, soft_wrap=True)
    return points


def unfinished_points(points: list[Point], out: Path) -> dict[str, str]:
    """Points that have no result, with the reason."""
    found = {}
    for point in points:
        marker = out / point.name / FAILURE_NAME
        if not is_finished(point, out / point.name):
            found[point.name] = marker.read_text(encoding="utf-8").strip() if marker.exists() else "not finished"
    return found


def is_finished(point: Point, run_dir: Path) -> bool:
    """Whether the run in ``run_dir`` has this point's configuration and its results."""
    if not (run_dir / "results.json").exists() or read_json(run_dir / "config.json") != dump(point.config):
        return False
    return not any(job.is_pending for job in make_plan(point.config, run_dir))


def print_points(sweep: SweepConfig, out: Path, console: Console) -> None:
    """What would run, each with its checks and the estimated peak of a rank; nothing is written."""
    import tempfile

    table = Table("point", "ranks", "stages", "peak of a CPU rank", "labels", "state", title=f"{sweep.name}: points")
    with tempfile.TemporaryDirectory() as scratch:
        for point in expand_points(sweep):
            table.add_row(point.name, *_checked_cells(point, out / point.name, Path(scratch)))
    console.print(table)


def _checked_cells(point: Point, run_dir: Path, scratch: Path) -> list[str]:
    ranks = str(point.config.parallel.world_size)
    try:
        checked = check_workflow(point.config, scratch)
    except UserError as error:
        return [ranks, "-", "-", "-", f"cannot run: {error}"]
    memory = checked.memory(on_gpu=False)
    peak = max(found.total for found in memory.values())
    entries: list[Any] = [entry for entry in checked.ledger.entries(checked.stages) if entry.labels_used]
    labels = {key for entry in entries for key in checked.ledger.keys(entry.prompts)}
    state = "finished" if is_finished(point, run_dir) else "unfinished" if run_dir.exists() else "new"
    return [ranks, str(len(checked.stages)), format_bytes(peak), str(len(labels)), state]
