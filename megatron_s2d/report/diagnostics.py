"""Diagnostics of a training stage as one figure: KL by position, mismatch to the engine, ratios, gate, top-k overlap.

Only recorded metrics are drawn. No torch, no display.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.report.plots import BLUE, GREEN, GREY, INK, ORANGE, as_png, tidy

Rows = Sequence[Mapping[str, Any]]
# metrics by position in the response: prefix -> title
_POSITIONS = {
    "kl_by_position/": "KL by token of the response",
    "gate/consensus_by_position/": "consensus by token of the response",
    "gate/conflict_by_position/": "conflict by token of the response",
}
_GAPS = "mismatch/hist/"  # shares of tokens by |log pi_trainer - log pi_engine|, named by the least of each bin
_LEAST_GAP = 3e-8  # left end of the logarithmic axis, where smaller values are shown
Lines = Mapping[str, tuple[str, str]]  # metric -> its color and label
_LINES: dict[str, Lines] = {
    "KL of first and end tokens": {"kl/end_token": (ORANGE, "end"), "kl/first_token": (BLUE, "first")},
    "gap between trainer and engine, nats": {
        "mismatch/log_prob_abs_diff_max": (ORANGE, "max"),
        "mismatch/log_prob_abs_diff_mean": (BLUE, "mean"),
        "mismatch/k3_kl": (GREEN, "KL"),
    },
    "importance ratio, trainer / engine": {
        "importance_ratio_max": (ORANGE, "max"),
        "importance_ratio_mean": (BLUE, "mean"),
    },
    "update ratio, new / old": {
        "ratio_max": (ORANGE, "max"),
        "ratio_mean": (BLUE, "mean"),
        "ratio_min": (GREEN, "min"),
    },
    "clipped tokens": {"clip_fraction_high": (ORANGE, "above"), "clip_fraction_low": (BLUE, "below")},
    "gate, share of tokens": {
        "gate/consensus_fraction": (GREEN, "consensus"),
        "gate/conflict_fraction": (ORANGE, "conflict"),
        "gate/neutral_fraction": (GREY, "neutral"),
    },
    "top-k of student and teacher": {"topk/overlap": (BLUE, "overlap"), "topk/teacher_mass": (GREEN, "teacher's mass")},
    "teacher anchors": {"anchor/alpha": (BLUE, "weight"), "anchor/kept_fraction": (GREEN, "kept")},
    "responses": {
        "truncated_fraction": (ORANGE, "cut off"),
        "zero_variance_fraction": (BLUE, "groups without a signal"),
    },
}
_BY_DOMAIN = {"kl": "KL by domain", "response_length": "length by domain", "reward": "reward by domain"}


def _lines_of(rows: Rows) -> dict[str, Lines]:
    """Return the panels of lines, with those of the domains that the rows have."""
    parts = {tuple(key.split("/", 2)[1:]) for row in rows for key in row if key.startswith("domain/")}
    colors = itertools.cycle((BLUE, ORANGE, GREEN, GREY))
    color_of = {domain: next(colors) for domain in sorted({domain for domain, _ in parts})}
    by_domain: dict[str, Lines] = {
        title: {
            f"domain/{domain}/{metric}": (color_of[domain], domain) for domain, name in sorted(parts) if name == metric
        }
        for metric, title in _BY_DOMAIN.items()
    }
    return _LINES | by_domain


def plot_diagnostics(rows: Rows) -> bytes | None:
    """Return a figure of the panels with data as PNG; None without any data."""
    lines_of = _lines_of(rows)
    panels = [name for name, lines in lines_of.items() if any(_varies(rows, key) for key in lines)]
    positions = {prefix: firsts for prefix in _POSITIONS if (firsts := _positions(rows, prefix))}
    has_gaps = any(key.startswith(_GAPS) for row in rows for key in row)
    count = len(panels) + len(positions) + has_gaps
    if not count:
        return None
    columns = min(4, count)
    height = ceil_div(count, columns)
    figure = Figure(figsize=(2.9 * columns, 2.0 * height), layout="constrained")
    for index, name in enumerate(panels, 1):
        _draw_lines(figure.add_subplot(height, columns, index), rows, name, lines_of[name])
    for index, prefix in enumerate(positions, len(panels) + 1):
        _draw_positions(figure.add_subplot(height, columns, index), rows, prefix, positions[prefix])
    if has_gaps:
        _draw_gaps(figure.add_subplot(height, columns, count), rows)
    return as_png(figure)


def _positions(rows: Rows, prefix: str) -> list[int]:
    return sorted({int(key.removeprefix(prefix)) for row in rows for key in row if key.startswith(prefix)})


def _varies(rows: Rows, key: str) -> bool:
    """Whether a metric is recorded and not constant (such as a ratio of 1)."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return len(values) > 1 and max(values) - min(values) > 1e-6


def _draw_lines(axes: Axes, rows: Rows, title: str, lines: Lines) -> None:
    for key, (color, label) in lines.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, label=label)
    axes.legend(frameon=False, fontsize=6.5)
    _finish(axes, title)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _draw_positions(axes: Axes, rows: Rows, prefix: str, positions: list[int]) -> None:
    """Mean over tokens by position in the response, in the first and in the last quarter of the steps."""
    quarter = max(1, len(rows) // 4)
    for part, color, label in ((rows[:quarter], GREY, "first quarter"), (rows[-quarter:], BLUE, "last quarter")):
        means = []
        for first in positions:
            values = [row[f"{prefix}{first}"] for row in part if row.get(f"{prefix}{first}") is not None]
            means.append(np.mean(values) if values else np.nan)
        axes.plot(range(len(positions)), means, color=color, marker=".", linewidth=1.2, label=label)
    names = [str(first) if first < 2 else f"{first}-{2 * first - 1}" for first in positions]
    axes.set_xticks(range(len(positions)), names, fontsize=6.5, rotation=45)
    axes.legend(frameon=False, fontsize=6.5)
    _finish(axes, _POSITIONS[prefix])


def gap_shares(rows: Rows) -> dict[float, float]:
    """Return lower bin edge in nats -> mean share of tokens over the rows with a histogram; 0 for all smaller gaps.

    Bins that a row does not list are empty in it.
    """
    measured = [row for row in rows if any(key.startswith(_GAPS) for key in row)]
    keys = {key for row in measured for key in row if key.startswith(_GAPS)}
    shares = {float(key.removeprefix(_GAPS)): sum(row.get(key) or 0.0 for row in measured) for key in keys}
    return {edge: shares[edge] / len(measured) for edge in sorted(shares)}


def _draw_gaps(axes: Axes, rows: Rows) -> None:
    """Share of tokens by gap, in the first and in the last quarter of the steps; bins are half a decade wide."""
    quarter = max(1, len(rows) // 4)
    styles = {"first quarter": {"color": GREY, "alpha": 0.5}, "last quarter": {"fill": False, "edgecolor": BLUE}}
    for part, (label, style) in zip((rows[:quarter], rows[-quarter:]), styles.items(), strict=True):
        shares = gap_shares(part)
        left = np.array([max(edge, _LEAST_GAP) for edge in shares])
        axes.bar(left, list(shares.values()), width=left * (10**0.5 - 1), align="edge", label=label, **style)
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=6.5)
    _finish(axes, "tokens by gap to the engine, nats")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=8, loc="left", color=INK)
    axes.tick_params(labelsize=7)
    tidy(axes, "both")
