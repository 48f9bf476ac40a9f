"""The figures of a report as PNG bytes: arms, contrasts, and the curves of one stage. No torch, no display.

Colours are from the Okabe-Ito set, which colour-blind readers tell apart; no meaning hangs on colour alone.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_s2d.formatting import percent
from megatron_s2d.report.results import ArmResult, ContrastResult

DPI = 160
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8a8f98", "#1f2430"
_COLOR_OF = {"agrees": GREEN, "undecided": GREY, "against": ORANGE, "no expectation": BLUE}
_MARKER_OF = {"agrees": "o", "undecided": "s", "against": "X", "no expectation": "D"}
_LABEL_OF = {
    "agrees": "as expected",
    "undecided": "interval covers 0",
    "against": "against the expectation",
    "no expectation": "no expectation",
}
_CURVE_STYLES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (GREY, ":")]  # told apart without color, too

CURVES = {
    "reward": "reward",
    "kl": "KL (nats per token)",
    "entropy": "entropy (nats per token)",
    "response_length": "response length (tokens)",
    "loss": "loss",
}


def plot_arms(arms: Sequence[ArmResult], also: Sequence[ArmResult]) -> bytes:
    """avg@k of every arm with one standard error; ``also`` (teachers, bases) below in grey."""
    rows = [*arms, *also]
    figure = Figure(figsize=(8.4, 0.9 + 0.34 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for row, arm in enumerate(rows):
        color = BLUE if row < len(arms) else GREY
        error = arm.avg.std_err or 0.0
        axes.barh(row, arm.avg.mean, height=0.62, color=color, alpha=0.9)
        axes.errorbar(arm.avg.mean, row, xerr=error, color=INK, capsize=3, linewidth=1.2)
        text = percent(arm.avg.mean, arm.avg.std_err)
        axes.annotate(text, (arm.avg.mean + error, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [arm.name for arm in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(0.05, min(1.16, 1.18 * max(arm.avg.mean + (arm.avg.std_err or 0) for arm in rows))))
    ks = sorted({arm.k for arm in rows})
    axes.set_xlabel(f"avg@{'/'.join(map(str, ks))}, with one standard error over problems")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], prune="upper"))
    tidy(axes, "x")
    return as_png(figure)


def plot_contrasts(contrasts: Sequence[ContrastResult]) -> bytes:
    """Plot the difference of every contrast with its interval, and a line at zero."""
    figure = Figure(figsize=(8.4, 1.2 + 0.46 * len(contrasts)), layout="constrained")
    axes = figure.add_subplot()
    shown: set[str] = set()
    for row, contrast in enumerate(contrasts):
        kind, comparison = contrast.agreement, contrast.comparison
        low, high = comparison.interval
        axes.plot([low, high], [row, row], color=_COLOR_OF[kind], linewidth=2.2, solid_capstyle="butt")
        label = None if kind in shown else _LABEL_OF[kind]
        shown.add(kind)
        axes.plot(comparison.difference, row, _MARKER_OF[kind], color=_COLOR_OF[kind], markersize=7, label=label)
    axes.axvline(0, color=INK, linewidth=1)
    names = [f"{contrast.a}\n− {contrast.b}" for contrast in contrasts]
    axes.set_yticks(range(len(contrasts)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(contrasts) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=""))
    level = 100 * contrasts[0].comparison.level
    axes.set_xlabel(f"difference in percentage points, {level:.0f} % interval over problems")
    figure.legend(loc="outside upper right", ncols=len(shown), frameon=False, fontsize=8)
    tidy(axes, "x")
    return as_png(figure)


def plot_stage(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Reward, KL, entropy, length and loss of a stage over its steps, those that it recorded; None for no curve."""
    names = [name for name in CURVES if any(row.get(name) is not None for row in rows)]
    if not names:
        return None
    figure = Figure(figsize=(2.3 * len(names), 1.75), layout="constrained")
    for column, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), column)
        steps = np.array([row["step"] for row in rows])
        values = np.array([math.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)
        smooth = running_mean(values, max(1, len(values) // 12))
        rough = len(values) >= 24
        marker = "." if len(rows) == 1 else None
        axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.35 if rough else 1.0, marker=marker)
        if rough:
            axes.plot(steps, smooth, color=BLUE, linewidth=1.6)
        axes.set_title(CURVES[name], fontsize=8, loc="left", color=INK)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        tidy(axes, "both")
    return as_png(figure)


def plot_validation(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Pass rate of each validation set over the steps, with standard errors; None without a validation."""
    names = list(dict.fromkeys(name for row in rows for name in row["data"]))
    if not names:
        return None
    figure = Figure(figsize=(5.2, 2.3), layout="constrained")
    axes = figure.add_subplot()
    for name, (color, line) in zip(names, itertools.cycle(_CURVE_STYLES), strict=False):
        points = [(row["step"], row["data"][name]) for row in rows if name in row["data"]]
        rates = [data["pass_rate"] for _, data in points]
        errors = [data["pass_rate_std_err"] or 0.0 for _, data in points]
        steps = [step for step, _ in points]
        style = {"color": color, "linestyle": line, "linewidth": 1.4, "marker": ".", "capsize": 2}
        axes.errorbar(steps, rates, errors, label=name, **style)
    best = [row["step"] for row in rows if row["best"]]
    if best:
        axes.axvline(best[-1], color=GREY, linewidth=0.8, linestyle=":", label="weights that were kept")
    axes.set_title("pass rate in validation, %, with one standard error", fontsize=8, loc="left", color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=""))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=7)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    tidy(axes, "both")
    return as_png(figure)


def running_mean(values: np.ndarray, half_width: int) -> np.ndarray:
    """Return the mean of the finite values within ``half_width`` steps on both sides [n], NaN without any; float64."""
    result = np.full(len(values), math.nan)
    for index in range(len(values)):
        window = values[max(0, index - half_width) : index + half_width + 1]
        window = window[np.isfinite(window)]
        if window.size:
            result[index] = window.mean()
    return result


def tidy(axes: Axes, grid: str) -> None:
    """Apply the common style to axes; ``grid``: x, y or both."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9bec7")
    axes.tick_params(color="#b9bec7", labelcolor=INK)
    axes.grid(axis=grid, color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)


def as_png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()
