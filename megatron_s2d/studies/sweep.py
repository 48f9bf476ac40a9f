"""``s2d sweep``: runs the points of a grid as ordinary runs below one directory, one after another.

Every point is a workflow with its own directory OUT/POINT: it resumes and is reused like any run, and ``s2d eval``
reads it. A point that fails is listed and the others run. The function that runs a point is a parameter, so that a
launcher can submit it instead. No torch here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_s2d.artifacts.files import atomic_write_json, read_json
from megatron_s2d.artifacts.lock import directory_lock
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
        """Name of its directory below that of the sweep."""
        return "_".join([*(f"{axis}-{label}" for axis, label in self.choice.items()), f"seed-{self.seed}"])


RunPoint = Callable[[Point, Path, Console], None]
"""Runs a point in a directory (or submits it to another machine); raises ``UserError`` or ``JobCrashed``."""


def run_here(point: Point, run_dir: Path, console: Console) -> None:
    """Run the point on this machine, as ``s2d run`` does."""
    from megatron_s2d.workflow.runner import run_workflow

    run_workflow(point.config, run_dir, console)


def expand_points(sweep: SweepConfig) -> list[Point]:
    """Return every point, seeds innermost; raise a ``UserError`` that names the point for a mistake in it."""
    points = []
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
            points.append(Point(choice, seed, config))
    _check_names(sweep, points)
    return points


def _check_names(sweep: SweepConfig, points: list[Point]) -> None:
    arms = [("contrasts", item.arm) for item in sweep.contrasts] + [("fits", item.arm) for item in sweep.fits]
    for point in points:
        for where, arm in arms:
            if arm not in point.config.arms:
                raise UserError(f"{where}: the workflow has no arm '{arm}' (arms: {', '.join(point.config.arms)})")
        for item in sweep.efficiency:
            if item.stage not in point.config.stages:
                raise UserError(f"efficiency: the workflow has no stage '{item.stage}'")


def run_sweep(sweep: SweepConfig, out: Path, console: Console, run_point: RunPoint = run_here) -> list[Point]:
    """Run the unfinished points and return all points; an interruption ends the sweep."""
    points = expand_points(sweep)
    with directory_lock(out):  # another sweep would record points as failed that are running
        _run_points(sweep, points, out, console, run_point)
    return points


def _run_points(sweep: SweepConfig, points: list[Point], out: Path, console: Console, run_point: RunPoint) -> None:
    atomic_write_json(out / "sweep.json", dump(sweep))
    for number, point in enumerate(points, 1):
        run_dir = out / point.name
        head = f"[{number}/{len(points)}] {point.name}"
        if is_finished(point, run_dir):
            console.print(f"{head}: finished", markup=False, highlight=False)
            continue
        console.print(f"{head}: running", markup=False, highlight=False)
        marker = run_dir / FAILURE_NAME
        marker.unlink(missing_ok=True)
        try:
            run_point(point, run_dir, console)
        except (UserError, JobCrashed) as error:
            run_dir.mkdir(parents=True, exist_ok=True)
            marker.write_text(f"{error}\n", encoding="utf-8")
            console.print(f"{head}: FAILED: {error}", markup=False, highlight=False, soft_wrap=True)


def unfinished_points(points: list[Point], out: Path) -> dict[str, str]:
    """Return point -> reason for the points that have no result."""
    reasons = {}
    for point in points:
        marker = out / point.name / FAILURE_NAME
        if not is_finished(point, out / point.name):
            reasons[point.name] = marker.read_text(encoding="utf-8").strip() if marker.exists() else "not finished"
    return reasons


def is_finished(point: Point, run_dir: Path) -> bool:
    """Return whether the run in ``run_dir`` has this point's configuration and results."""
    if not (run_dir / "results.json").exists() or read_json(run_dir / "config.json") != dump(point.config):
        return False
    return not any(job.is_pending for job in make_plan(point.config, run_dir))


def print_points(sweep: SweepConfig, out: Path, console: Console) -> None:
    """Print the points with their checks and the estimated peak memory of a rank; write nothing."""
    import tempfile

    table = Table("point", "ranks", "stages", "peak of a CPU rank", "labels", "state", title=f"{sweep.name}: points")
    with tempfile.TemporaryDirectory() as scratch:
        for point in expand_points(sweep):
            table.add_row(point.name, *_checked_cells(point, out / point.name, Path(scratch)))
    console.print(table)


def _checked_cells(point: Point, run_dir: Path, scratch: Path) -> list[str]:
    ranks = str(point.config.parallel.world_size)
    try:
        preflight = check_workflow(point.config, scratch)
    except UserError as error:
        return [ranks, "-", "-", "-", f"cannot run: {error}"]
    memory = preflight.memory(on_gpu=False)
    peak = max(stage.total for stage in memory.values())
    labels = preflight.ledger.num_labels_used(preflight.stages)
    state = "finished" if is_finished(point, run_dir) else "unfinished" if run_dir.exists() else "new"
    return [ranks, str(len(preflight.stages)), format_bytes(peak), str(labels), state]
