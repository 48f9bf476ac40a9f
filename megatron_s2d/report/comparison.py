"""Compares runs in one page: their arms in a table, and the curves of stages with the same name in the same panels.

Reads files only, of finished runs and of others. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_s2d.artifacts.files import atomic_write_bytes, read_json_object
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.errors import UserError
from megatron_s2d.formatting import percent
from megatron_s2d.report.html_page import page_template, scripted
from megatron_s2d.report.page_data import MAX_STAGES, spell_out, validation_rows
from megatron_s2d.report.panels import Panel, stage_panels


def write_comparison(run_dirs: Sequence[Path], page: Path) -> Path:
    """Write the page that compares ``run_dirs``, in their order, to ``page``."""
    for path in run_dirs:
        if not (path / "stages").is_dir():
            raise UserError(f"{path}: not a run directory (no stages)")
    labels = run_labels(run_dirs)
    names = dict.fromkeys(
        path.name
        for run in run_dirs
        for path in sorted((run / "stages").iterdir())
        if path.is_dir() and not path.name.startswith(".")
    )
    stages = [_stage(name, dict(zip(labels, run_dirs, strict=True))) for name in list(names)[:MAX_STAGES]]
    data = {"live": False, "stages": stages, "samples": [], "samples_total": 0}
    text = page_template("comparison.html").render(labels=labels, arms=_arms(labels, run_dirs), **scripted(data))
    atomic_write_bytes(page, text.encode("utf-8", "backslashreplace"))
    return page


def run_labels(run_dirs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ from each other; equal paths raise ``UserError``."""
    paths = [path.resolve() for path in run_dirs]
    if len(set(paths)) < len(paths):
        raise UserError(f"{run_dirs[0]}: named twice; name different run directories")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [spell_out("/".join(path.parts[-depth:])) for path in paths]


def merged_panels(panels: Mapping[str, Sequence[Panel]]) -> list[Panel]:
    """Return one panel for each title, with the first line of every run under the run's label."""
    merged: dict[str, Panel] = {}
    for label, own in panels.items():
        for panel in own:
            if "x_labels" in panel:  # places and bins may differ
                continue
            title = panel["title"].partition(",")[0]
            target = merged.setdefault(title, {**panel, "title": title, "lines": []})
            target.pop("mark", None)
            target["lines"].append({**panel["lines"][0], "label": label})
    return list(merged.values())


def _stage(name: str, runs: Mapping[str, Path]) -> dict[str, Any]:
    facts, panels, states = [], {}, []
    for label, run in runs.items():
        directory = StageDirectory(run / "stages" / name)
        rows = directory.metrics()
        panels[label] = stage_panels(rows, validation_rows(directory))
        states.append("done" if directory.is_finished() else "running" if directory.path.is_dir() else "waiting")
        facts.append((label, f"{states[-1]}, {len(rows)} steps" if directory.path.is_dir() else "no such stage"))
    state = states[0] if len(set(states)) == 1 else "running"
    merged = merged_panels(panels)
    return {"name": spell_out(name), "state": state, "facts": facts, "warnings": [], "panels": merged, "latest": {}}


def _arms(labels: Sequence[str], run_dirs: Sequence[Path]) -> dict[str, list[str]]:
    """Return arm -> avg@k of each run in per cent, a dash where a run has no such arm or no results yet."""
    results = [
        read_json_object(run / "results.json").get("arms", {}) if (run / "results.json").exists() else {}
        for run in run_dirs
    ]
    names = dict.fromkeys(name for arms in results for name in arms)
    return {
        name: [percent(arms[name]["avg_at_k"], arms[name]["std_err"]) if name in arms else "–" for arms in results]
        for name in names
    }
