"""The report of a run: ``results.json``, ``report.md``, ``report.html``, ``plots/*.png`` and a table in the terminal.

Everything is derived from ``RunResults`` and the directories of its stages; nothing is measured here. The report says
in words if a contrast contradicts the paper or shows nothing (``ContrastResult.verdict``). No torch here.
"""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_s2d.artifacts.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from megatron_s2d.formatting import format_seconds, percent, points
from megatron_s2d.report.diagnostics import plot_diagnostics
from megatron_s2d.report.html_page import contrast_summary, interval_note, page_bytes, shown_pass_ks
from megatron_s2d.report.page_data import visible
from megatron_s2d.report.plots import plot_arms, plot_contrasts, plot_stage, plot_validation
from megatron_s2d.report.results import ArmResult, ContrastResult, RunResults, shares_text

# More rows than these are higher than an image can be, and figures of 10,000 stages would take hours.
_DRAWN_ARMS, _DRAWN_STAGES = 200, 100


def write_report(run_dir: Path, results: RunResults) -> Path:
    """Write all files of the report into ``run_dir``, each atomically, and return the path of ``report.html``.

    ``results.json`` is written first: a figure that cannot be drawn does not cost the numbers.
    """
    run_dir = Path(run_dir)
    atomic_write_json(run_dir / "results.json", results.as_json())
    atomic_write_text(run_dir / "report.md", render_markdown(results))
    plots = make_plots(results)
    for name, png in plots.items():
        atomic_write_bytes(run_dir / "plots" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}.png", png)
    page = run_dir / "report.html"
    atomic_write_bytes(page, page_bytes(results, plots))
    return page


def make_plots(results: RunResults) -> dict[str, bytes]:
    """Return PNGs under ``arms``, ``contrasts``, and ``stage``, ``validation`` and ``diagnostics/<name>``, if any.

    Of very many arms, contrasts and stages the first ones are drawn; the tables have all of them.
    """
    plots = {}
    if results.arms:
        others = max(0, _DRAWN_ARMS - len(results.arms))
        plots["arms"] = plot_arms(results.arms[:_DRAWN_ARMS], results.also_evaluated[:others])
    if results.contrasts:
        plots["contrasts"] = plot_contrasts(results.contrasts[:_DRAWN_ARMS])
    for stage in results.stages[:_DRAWN_STAGES]:
        png = plot_stage(stage.directory.metrics())
        if png is not None:
            plots[f"stage/{stage.name}"] = png
        png = plot_validation(stage.directory.validations())
        if png is not None:
            plots[f"validation/{stage.name}"] = png
        png = plot_diagnostics(stage.directory.metrics())
        if png is not None:
            plots[f"diagnostics/{stage.name}"] = png
    return plots


def print_report(results: RunResults, console: Console) -> None:
    """Print the tables of arms and contrasts on a terminal."""
    header, rows = _arm_table(results)
    console.print(_rich_table("Arms", header, rows))
    if results.table is not None:
        console.print(_rich_table(results.table.title, results.table.header, results.table.rows))
        for agreement in results.table.agreements:
            console.print(Text(agreement.sentence))
    if results.contrasts:
        header, rows = _contrast_table(results)
        console.print(_rich_table("Contrasts (percentage points)", header, rows))
        console.print(Text(interval_note(results)))
    for contrast in results.refused:
        console.print(Text(f"refused: {contrast.a} - {contrast.b}: {contrast.reason}", style="yellow"))
    for warning in results.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    console.print(Text(f"{contrast_summary(results)} {format_seconds(results.wall_seconds)} of wall-clock time."))


def render_markdown(results: RunResults) -> str:
    """Return the same tables in Markdown."""
    lines = [f"# {_cell(results.name)}", ""]
    if results.description:
        lines += [_cell(results.description), ""]
    took = format_seconds(results.wall_seconds)
    lines += [f"{contrast_summary(results)} Seed {results.seed}, {took} of wall-clock time.", ""]
    lines += [f"**Warning:** {_cell(warning)}\n" for warning in results.warnings]
    lines += _markdown_table(*_arm_table(results))
    lines += ["", "Mean over problems ± one standard error over problems, in per cent.", ""]
    if results.table is not None:
        lines += [f"## {_cell(results.table.title)}", ""]
        lines += [*_markdown_table(results.table.header, results.table.rows), ""]
        lines += [f"{_cell(agreement.sentence)}\n" for agreement in results.table.agreements]
    if results.contrasts:
        lines += _markdown_table(*_contrast_table(results))
        lines += ["", f"Paired on the same problems. {interval_note(results)}", ""]
    if results.refused:
        rows = [[f"{item.a} − {item.b}", item.factor, item.reason] for item in results.refused]
        lines += [*_markdown_table(["Refused contrast", "Factor", "Why"], rows), ""]
    return "\n".join(lines)


def _arm_table(results: RunResults) -> tuple[list[str], list[list[str]]]:
    pass_ks = shown_pass_ks(results) if results.arms else []

    def row(arm: ArmResult, name: str) -> list[str]:
        passes = [f"{100 * arm.pass_at_k[k].mean:.1f}" for k in pass_ks]
        return [
            name,
            percent(arm.avg.mean, arm.avg.std_err),
            *passes,
            f"{arm.response_length:.1f}",
            f"{arm.avg.num_problems} × {arm.k}",
            *([shares_text(arm.verdicts)] if has_verdicts else []),
        ]

    has_verdicts = any(arm.verdicts for arm in (*results.arms, *results.also_evaluated))
    header = ["Arm", "avg@k, %", *(f"pass@{k}, %" for k in pass_ks), "Tokens", "Problems × k"]
    header += ["Verdicts of the samples"] if has_verdicts else []
    rows = [row(arm, arm.name) for arm in results.arms]
    return header, rows + [row(arm, f"({arm.name})") for arm in results.also_evaluated]


def _contrast_table(results: RunResults) -> tuple[list[str], list[list[str]]]:
    def row(contrast: ContrastResult) -> list[str]:
        comparison = contrast.comparison
        low, high = comparison.interval
        return [
            f"{contrast.a} − {contrast.b}",
            contrast.factor,
            points(comparison.difference, comparison.std_err),
            f"{points(low)} to {points(high)}",
            contrast.verdict,
        ]

    level = f"{100 * results.contrasts[0].comparison.level:.0f} %"
    header = ["a − b", "What differs", "Points", level, "In words"]
    return header, [row(contrast) for contrast in results.contrasts]


def _rich_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in header:
        number = name.endswith(("%", "Points", "k", "Tokens", "(paper)"))
        table.add_column(Text(name), overflow="fold", justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *(_line([_cell(cell) for cell in row]) for row in rows)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Escape text so that it cannot end a cell or become HTML, a link or an image."""
    escaped = re.sub(r"([\\|`*\[\]<>])", r"\\\1", visible(text))
    return escaped.replace("\n", " ")
