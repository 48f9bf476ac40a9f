"""The papers' figures in configs/papers are those of the papers' texts; tables' row by row and in the papers' order."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
PAPERS = ROOT.parent / "shared" / "papers"
TEXTS = {"s2d": "sparse_to_dense_2605.12483.txt", "g-opd": "g_opd_2602.12125.txt", "sg-opd": "sg_opd.txt"}
TABLES = sorted((ROOT / "configs" / "papers").rglob("table*.yaml"))
OTHERS = sorted(
    path
    for path in (ROOT / "configs" / "papers").rglob("*.yaml")
    if not path.stem.startswith("table") and "table" in yaml.safe_load(path.read_text())
)

pytestmark = pytest.mark.skipif(not PAPERS.is_dir(), reason="no papers in shared/papers beside the repository")


def rows_of_text(paper):
    """Return the figures of every line of a paper's text, in order; a line without figures is empty."""
    lines = (PAPERS / TEXTS[paper]).read_text().splitlines()
    if paper == "s2d":  # 79.3±0.7\mathbf{79.3\pm 0.7}
        return [[float(figure) for figure in re.findall(r"(\d+\.\d+)\s*±", line)] for line in lines]
    separator = "\t" if paper == "g-opd" else "|"
    rows = []
    for line in lines:
        cells = [re.sub(r"\s*_\{.*?\}", "", cell).strip() for cell in line.split(separator)]
        rows.append([float(cell) for cell in cells if re.fullmatch(r"\d+\.\d+", cell)])
    return rows


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_figures_are_those_of_the_paper(path):
    remaining = iter(rows_of_text(path.parent.name))
    for row in yaml.safe_load(path.read_text())["table"]["rows"]:
        figures = [figure for figure in row["paper"] if figure is not None]
        if figures:
            found = any(line[-len(figures) :] == figures for line in remaining)
            assert found, f"{row['label']}: the paper has no row {figures} at this place"


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_figures_of_other_rows_are_in_a_table_of_the_paper(path):
    """Plots and appendices have no figures in the text: theirs are rows, or parts of rows, of the tables."""
    lines = rows_of_text(path.parent.name)
    for row in yaml.safe_load(path.read_text())["table"]["rows"]:
        figures = [figure for figure in row["paper"] if figure is not None]
        assert any(line[start : start + len(figures)] == figures for line in lines for start in range(len(line) + 1)), (
            f"{row['label']}: no table of the paper has {figures}"
        )
