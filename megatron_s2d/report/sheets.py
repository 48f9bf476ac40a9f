"""Tables and figures of sweeps and simulations, as Markdown, HTML, CSV and on a terminal.

The page opens without a network, runs no script, and everything in it is escaped. No torch here.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from rich.console import Console
from rich.table import Table

from megatron_s2d.artifacts.files import atomic_write_bytes, atomic_write_text
from megatron_s2d.report.html_page import TEMPLATES


@dataclasses.dataclass(frozen=True)
class Sheet:
    """One table; ``notes`` are lines below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def as_markdown(self) -> str:
        """Return the table with its title."""
        lines = [f"## {self.title}", ""]
        if self.rows:
            lines += [_line(self.columns), _line(["---"] * len(self.columns)), *map(_line, self.rows), ""]
        return "\n".join([*lines, *(f"{note}\n" for note in self.notes)])

    def as_csv(self) -> str:
        """Return the rows with one line of column names."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def print(self, console: Console) -> None:
        """On a terminal."""
        if self.rows:
            table = Table(*self.columns, title=self.title)
            for row in self.rows:
                table.add_row(*row)
            console.print(table)
        for note in self.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_sheets(
    out: Path, stem: str, title: str, description: str, sheets: Sequence[Sheet], plots: Mapping[str, bytes]
) -> Path:
    """``stem``.md and .html, and plots/; returns the path of the page. ``plots``: name -> PNG."""
    for name, png in plots.items():
        atomic_write_bytes(out / "plots" / f"{name}.png", png)
    images = "".join(f"![{name}](plots/{name}.png)\n\n" for name in plots)
    text = "\n".join(sheet.as_markdown() for sheet in sheets)
    atomic_write_text(out / f"{stem}.md", f"# {title}\n\n{description}\n\n{text}\n{images}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    pictures = {name: base64.b64encode(png).decode("ascii") for name, png in plots.items()}
    template = environment.get_template("sheets.html")
    page = template.render(title=title, description=description, sheets=sheets, pictures=pictures)
    atomic_write_text(out / f"{stem}.html", page)
    return out / f"{stem}.html"
