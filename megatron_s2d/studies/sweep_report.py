"""Writes the report of a sweep: results.csv, results.md, results.html and plots/. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from megatron_s2d.artifacts.files import atomic_write_text
from megatron_s2d.formatting import format_bytes, format_seconds, percent, points
from megatron_s2d.report.plots import BLUE, GREEN, GREY, INK, ORANGE, as_png, tidy
from megatron_s2d.report.sheets import Sheet, write_sheets
from megatron_s2d.studies.scaling import PowerLaw, scaling_kind
from megatron_s2d.studies.sweep_results import ArmRow, FitRow, SweepResults

_COLORS = (BLUE, ORANGE, GREEN, GREY, INK)


def write_sweep(results: SweepResults, out: Path, console: Console) -> Path:
    """Write the files, print the tables and return the path of the page."""
    sheets = [_main(results), _contrasts(results), _fits(results), *_efficiency(results), _failures(results)]
    shown = [sheet for sheet in sheets if sheet.rows or sheet.notes]
    atomic_write_text(out / "results.csv", _csv(results))
    page = write_sheets(out, "results", results.sweep.name, results.sweep.description, shown, _plots(results))
    for sheet in shown:
        sheet.print(console)
    return page


def _main(results: SweepResults) -> Sheet:
    axes = list(results.sweep.grid)
    columns = [*axes, "seed", "arm", "avg@k, %", "k", "problems", "parameters", "ranks", "tokens/s", "MFU"]
    rows = []
    for row in results.rows:
        peak = "n/a" if row.peak_memory is None else format_bytes(row.peak_memory)
        rows.append([
            *(row.point.choice[axis] for axis in axes), str(row.point.seed), row.arm,
            percent(row.accuracy.mean, row.accuracy.std_err), str(row.k), str(row.accuracy.num_problems),
            f"{row.parameters:,}", str(row.ranks), f"{row.tokens_per_second:,.0f}", _mfu(row), peak,
            format_seconds(row.wall_seconds),
        ])  # fmt: skip
    notes = [
        "avg@k with one standard error over problems. tokens/s, MFU and wall time: all stages that lead to the arm, "
        "including sampling. Peak: resident memory of a rank on a CPU, allocated memory on a GPU."
    ]
    return Sheet("Results", [*columns, "peak of a rank", "wall time"], rows, notes)


def _mfu(row: ArmRow) -> str:
    return "n/a" if row.mfu is None else f"{100 * row.mfu:.2f} %"


def _csv(results: SweepResults) -> str:
    """Return the main table as CSV with unrounded numbers."""
    axes = list(results.sweep.grid)
    columns = [*axes, "seed", "arm", "accuracy", "std_err", "k", "problems", "parameters", "ranks"]
    columns += ["tokens_per_second", "mfu", "peak_bytes", "wall_seconds", "final_loss"]
    rows = []
    for row in results.rows:
        loss = repr(float(row.losses.mean())) if len(row.losses) else ""
        rows.append([
            *(row.point.choice[axis] for axis in axes), str(row.point.seed), row.arm, repr(row.accuracy.mean),
            "" if row.accuracy.std_err is None else repr(row.accuracy.std_err), str(row.k),
            str(row.accuracy.num_problems), str(row.parameters), str(row.ranks), repr(row.tokens_per_second),
            "" if row.mfu is None else repr(row.mfu), "" if row.peak_memory is None else str(row.peak_memory),
            repr(row.wall_seconds), loss,
        ])  # fmt: skip
    return Sheet("", columns, rows).as_csv()


def _describe(choice: Mapping[str, object]) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in choice.items()) or "-"


def _contrasts(results: SweepResults) -> Sheet:
    rows = []
    for item in results.contrasts:
        comparison = item.comparison
        low, high = comparison.interval
        rows.append([
            item.contrast.arm, f"{_describe(item.contrast.a)} − {_describe(item.contrast.b)}", _describe(item.others),
            ", ".join(map(str, item.seeds)), points(comparison.difference, comparison.std_err),
            f"{points(low)} to {points(high)}", f"{comparison.p_value:.3f}", str(comparison.num_problems),
        ])  # fmt: skip
    columns = ["arm", "contrast", "fixed", "seeds", "points", "95 % interval", "p", "problems"]
    notes = ["Paired by problem, with the samples of all seeds pooled; intervals are over problems."] if rows else []
    return Sheet("Matched contrasts", columns, rows, notes)


def _fits(results: SweepResults) -> Sheet:
    rows = []
    for item in results.fits:
        head = [item.fit.arm, f"{item.fit.y} against {item.fit.x}", _describe(item.others)]
        if item.law is None:
            rows.append([*head, "-", "-", "-", "-", item.reason])
            continue
        law = item.law
        interval = "n/a" if law.interval is None else f"{law.interval[0]:+.3f} to {law.interval[1]:+.3f}"
        note = f"{law.dropped} resamples had no positive value" if law.dropped else ""
        rows.append([
            *head, f"{law.scale:.4g}", f"{law.exponent:+.3f}", interval, f"{law.r_squared:.3f}", note,
        ])  # fmt: skip
    columns = ["arm", "law", "fixed", "scale", "exponent", "95 % interval", "R² of logarithms", "note"]
    return Sheet("Power laws: y = scale · x^exponent", columns, rows)


def _efficiency(results: SweepResults) -> list[Sheet]:
    sheets = []
    for stage, others, rows in results.efficiencies:
        cells = [
            [row.label, str(row.ranks), f"{row.tokens_per_step:,.0f}", f"{row.tokens_per_second:,.0f}",
             f"{100 * row.efficiency:.0f} %"] for row in rows
        ]  # fmt: skip
        kind = scaling_kind(rows)
        note = {
            "strong": "Every layout has the same tokens per step: strong scaling.",
            "weak": "The tokens per step grow with the ranks: weak scaling.",
            "mixed": "Neither tokens per step nor tokens per rank are equal: the efficiencies are hard to compare.",
        }[kind]
        title = f"Efficiency of {stage}" + (f", {_describe(others)}" if others else "")
        columns = ["layout", "ranks", "tokens per step", "tokens/s", "efficiency per rank"]
        sheets.append(Sheet(title, columns, cells, [note]))
    return sheets


def _failures(results: SweepResults) -> Sheet:
    return Sheet("Failed points", ["point", "reason"], [list(item) for item in results.failed])


def _plots(results: SweepResults) -> dict[str, bytes]:
    plots = {}
    if results.rows:
        plots["accuracy"] = _plot_accuracy(results)
    for number, item in enumerate(results.fits):
        if item.law is not None:
            plots[f"fit_{number}_{item.fit.arm}"] = _plot_fit(item, item.law)
    for number, (stage, _, rows) in enumerate(results.efficiencies):
        plots[f"efficiency_{number}_{stage}"] = _plot_efficiency(stage, rows)
    return plots


def _plot_accuracy(results: SweepResults) -> bytes:
    """Plot avg@k of every arm at every point, with one mark for each seed."""
    choices = list(dict.fromkeys(_describe(row.point.choice) for row in results.rows))
    arms = list(dict.fromkeys(row.arm for row in results.rows))
    figure = Figure(figsize=(8.4, 1.2 + 0.3 * len(choices) * max(1, len(arms) / 2)), layout="constrained")
    axes = figure.add_subplot()
    for number, arm in enumerate(arms):
        arm_rows = [row for row in results.rows if row.arm == arm]
        offset = 0.6 * ((number + 0.5) / len(arms) - 0.5)
        positions = [choices.index(_describe(row.point.choice)) + offset for row in arm_rows]
        error = [row.accuracy.std_err or 0.0 for row in arm_rows]
        axes.errorbar(
            [100 * row.accuracy.mean for row in arm_rows], positions, xerr=[100 * value for value in error], fmt="o",
            color=_COLORS[number % len(_COLORS)], markersize=4, linewidth=1, label=arm,
        )  # fmt: skip
    axes.set_yticks(range(len(choices)), choices, fontsize=8, parse_math=False)
    axes.set_ylim(len(choices) - 0.5, -0.5)
    axes.set_xlabel("avg@k, %, with one standard error over problems; one mark per seed")
    axes.legend(fontsize=8, frameon=False, loc="best")
    tidy(axes, "x")
    return as_png(figure)


def _plot_fit(item: FitRow, law: PowerLaw) -> bytes:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    x, y = (np.array(values) for values in zip(*law.points, strict=True))
    line = np.geomspace(x.min(), x.max(), 50)
    axes.plot(line, [law(value) for value in line], color=GREY, linewidth=1.2)
    axes.plot(x, y, "o", color=BLUE)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(item.fit.x, parse_math=False)
    axes.set_ylabel(f"{item.fit.y} of {item.fit.arm}", parse_math=False)
    axes.set_title(f"exponent {law.exponent:+.3f}, {_describe(item.others)}", fontsize=9, loc="left", parse_math=False)
    tidy(axes, "both")
    return as_png(figure)


def _plot_efficiency(stage: str, rows) -> bytes:
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    ranks = [row.ranks for row in rows]
    axes.plot(ranks, [100 * row.efficiency for row in rows], "o-", color=BLUE)
    axes.axhline(100, color=GREY, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.set_ylim(0, max(110, 5 + max(math.ceil(100 * row.efficiency) for row in rows)))
    axes.set_xlabel("ranks")
    axes.set_ylabel(f"efficiency of {stage}, %", parse_math=False)
    tidy(axes, "both")
    return as_png(figure)
