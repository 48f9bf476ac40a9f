"""What the report page draws of a stage: panels of lines and numbers, as plain data for ``templates/report.js``.

A panel is ``{"group", "title", "unit", "lines": [{"label", "x", "y", "err"}], "x_labels"}`` with few enough points
for a browser; ``err`` is one standard error. A stage with a single row has numbers instead of plots. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.report.diagnostics import gap_shares

Row = Mapping[str, Any]
Panel = dict[str, Any]
MAX_POINTS = 400  # of a line; of longer ones each point is the mean of several steps

# (group, title, unit, metric -> label); panels without data are left out.
_PANELS: list[tuple[str, str, str, dict[str, str]]] = [
    ("Curves", "Reward", "", {"reward": "training prompts"}),
    ("Curves", "KL", "nats per token", {"kl": "mean", "kl/first_token": "first token", "kl/end_token": "end token"}),
    ("Curves", "Loss", "", {"loss": "loss"}),
    ("Curves", "Entropy", "nats per token", {"entropy": "mean"}),
    ("Curves", "Response length", "tokens", {"response_length": "mean", "response_length_max": "longest"}),
    ("Curves", "Cut off, or without a signal", "share", {
        "truncated_fraction": "reached the length limit", "zero_variance_fraction": "groups of equal rewards"}),
    ("Optimizer", "Gradient norm", "", {"grad_norm": "before clipping"}),
    ("Optimizer", "Learning rate", "", {"learning_rate": "rate"}),
    ("Optimizer", "Update ratio, new / old", "", {"ratio_max": "max", "ratio_mean": "mean", "ratio_min": "min"}),
    ("Optimizer", "Clipped tokens", "share", {"clip_fraction_high": "above", "clip_fraction_low": "below"}),
    ("Optimizer", "Gate", "share of tokens", {
        "gate/consensus_fraction": "consensus", "gate/conflict_fraction": "conflict",
        "gate/neutral_fraction": "neutral"}),
    ("Optimizer", "Top-k of student and teacher", "share", {
        "topk/overlap": "overlap", "topk/teacher_mass": "teacher's mass"}),
    ("Optimizer", "Teacher anchors", "", {"anchor/alpha": "weight", "anchor/kept_fraction": "kept"}),
    ("Weight push and staleness", "Age of the sampling weights", "updates", {
        "policy_lag": "mean", "policy_lag_max": "oldest", "rollout/staleness": "staleness",
        "rollout/staleness_max": "staleness, oldest"}),
    ("Weight push and staleness", "Trainer against engine", "nats", {
        "mismatch/log_prob_abs_diff_max": "largest gap", "mismatch/log_prob_abs_diff_mean": "mean gap",
        "mismatch/k3_kl": "KL"}),
    ("Weight push and staleness", "Importance ratio, trainer / engine", "", {
        "importance_ratio_max": "max", "importance_ratio_mean": "mean"}),
    ("Weight push and staleness", "Weight push", "seconds", {"timing_s/update_weights": "push"}),
    ("Weight push and staleness", "Weight push, speed", "GB/s", {"weight_sync/gb_per_s": "speed"}),
    ("Weight push and staleness", "Weight push, check", "nats", {"weight_sync/max_log_prob_diff": "largest gap"}),
    ("Weight push and staleness", "Waiting for responses", "seconds", {
        "rollout/wait_seconds": "trainer waits", "rollout/producer_wait_seconds": "engine waits"}),
    ("Speed", "Throughput", "tokens/s", {
        "response_tokens_per_second": "response tokens", "tokens_per_second": "tokens with prompts"}),
]  # fmt: skip
_POSITIONS = {"kl_by_position/": "KL by position in the response", "entropy_by_position/": "Entropy by position"}
_DOMAINS = {"kl": "KL by domain", "reward": "Reward by domain", "response_length": "Length by domain"}


def stage_panels(rows: Sequence[Row], validations: Sequence[Row] = ()) -> list[Panel]:
    """Return the panels of a stage. rows: of ``metrics.jsonl``. validations: of ``validation.jsonl``."""
    panels = [_panel(rows, *entry) for entry in _PANELS]
    panels = _without_repeated_loss(panels)
    if validations:
        panels.insert(0, validation_panel(rows, validations))
    panels += [_prefix_panel(rows, "verifier/", "Curves", "Verdicts", "share of the responses")]
    panels += [_domain_panel(rows, metric, title) for metric, title in _DOMAINS.items()]
    panels += [_prefix_panel(rows, "timing_s/", "Speed", "Seconds of a step by phase", "seconds")]
    panels += [_prefix_panel(rows, "memory/", "Speed", "Memory", "GiB")]
    panels += [_position_panel(rows, prefix, title) for prefix, title in _POSITIONS.items()]
    panels.append(_gap_panel(rows))
    return [panel for panel in panels if panel["lines"]]


def validation_panel(rows: Sequence[Row], validations: Sequence[Row]) -> Panel:
    """Return pass rates on the validation sets with one standard error, beside the reward in training."""
    lines = []
    for name in dict.fromkeys(name for row in validations for name in _sets(row)):
        points = [(row["step"], _sets(row)[name]) for row in validations if name in _sets(row)]
        rates = [(step, part.get("pass_rate"), part.get("pass_rate_std_err")) for step, part in points]
        line = _line(name, [(step, rate) for step, rate, _ in rates])
        line["err"] = [_number(error) for _, rate, error in rates if _number(rate) is not None]
        lines.append(line)
    reward = _panel(rows, "", "", "", {"reward": "reward in training"})["lines"]
    best = [row["step"] for row in validations if row.get("best")]
    note = {"mark": best[-1], "mark_label": "weights that were kept"} if best else {}
    return {"group": "Curves", "title": "Validation", "unit": "pass rate", "lines": [*lines, *reward], **note}


def _sets(row: Row) -> Mapping[str, Any]:
    return row.get("data") or {}


def latest(rows: Sequence[Row]) -> dict[str, float]:
    """Return metric -> value of the last row, for stages with too few rows to draw."""
    return {key: value for key, raw in rows[-1].items() if key not in ("step", "time")
            and (value := _number(raw)) is not None} if rows else {}  # fmt: skip


def _panel(rows: Sequence[Row], group: str, title: str, unit: str, lines: Mapping[str, str]) -> Panel:
    drawn = [_line(label, [(row["step"], row.get(key)) for row in rows]) for key, label in lines.items()]
    return {"group": group, "title": title, "unit": unit, "lines": [line for line in drawn if len(line["x"]) > 1]}


def _prefix_panel(rows: Sequence[Row], prefix: str, group: str, title: str, unit: str) -> Panel:
    """Return a panel of all metrics below ``prefix``, those with the largest means first."""
    keys = {key for row in rows for key in row if key.startswith(prefix)}
    totals = {key: sum(_number(row.get(key)) or 0.0 for row in rows) for key in keys}
    ordered = sorted(keys, key=lambda key: (-totals[key], key))[:8]
    # A verdict that a step does not name had no response; a phase that it does not name took no time.
    filled = [{"step": row["step"], **{key: row.get(key, 0.0) for key in ordered}} for row in rows]
    return _panel(filled, group, title, unit, {key: key.removeprefix(prefix) for key in ordered})


def _domain_panel(rows: Sequence[Row], metric: str, title: str) -> Panel:
    names = sorted({key.split("/")[1] for row in rows for key in row
                    if key.startswith("domain/") and key.endswith(f"/{metric}")})  # fmt: skip
    return _panel(rows, "Curves", title, "", {f"domain/{name}/{metric}": name for name in names})


def _position_panel(rows: Sequence[Row], prefix: str, title: str) -> Panel:
    """Return the mean over tokens by place in the response, in the first and the last quarter of the steps."""
    firsts = sorted({int(key.removeprefix(prefix)) for row in rows for key in row if key.startswith(prefix)})
    quarter = max(1, len(rows) // 4)
    lines = []
    for part, label in ((rows[:quarter], "first quarter"), (rows[-quarter:], "last quarter")):
        means = [_mean(row.get(f"{prefix}{first}") for row in part) for first in firsts]
        lines.append(_line(label, list(enumerate(means))))
    names = [str(first) if first < 2 else f"{first}-{2 * first - 1}" for first in firsts]
    shown = [line for line in lines if len(line["x"]) > 1] if len(rows) > 1 else []
    return {"group": "By place", "title": title, "unit": "nats", "lines": shown, "x_labels": names}


def _gap_panel(rows: Sequence[Row]) -> Panel:
    """Return the shares of tokens by gap between trainer and engine, in the first and the last quarter."""
    quarter = max(1, len(rows) // 4)
    edges = list(gap_shares(rows))
    lines = []
    for part, label in ((rows[:quarter], "first quarter"), (rows[-quarter:], "last quarter")):
        shares = gap_shares(part)
        if shares:
            lines.append(_line(label, [(index, shares.get(edge, 0.0)) for index, edge in enumerate(edges)]))
    shown = [line for line in lines if len(line["x"]) > 1]
    panel = {"group": "By place", "title": "Tokens by gap to the engine", "unit": "share", "lines": shown}
    return panel | {"x_labels": [f"{edge:g}" for edge in edges]}


def _without_repeated_loss(panels: list[Panel]) -> list[Panel]:
    """Drop the loss where it is the KL, which distillation minimises, and say so in the title of the other."""
    by_title = {panel["title"]: panel for panel in panels}
    kl, loss = by_title["KL"]["lines"][:1], by_title["Loss"]["lines"]
    if not kl or not loss or len(kl[0]["y"]) != len(loss[0]["y"]):
        return panels
    if not np.allclose(kl[0]["y"], loss[0]["y"], rtol=1e-3, atol=1e-9):
        return panels
    by_title["KL"]["title"] = "KL, which is the loss"
    return [panel for panel in panels if panel is not by_title["Loss"]]


def _line(label: str, points: Iterable[tuple[float, Any]]) -> dict[str, Any]:
    """Return the finite points, at most ``MAX_POINTS``: means of equally many neighbours, at their mean place."""
    pairs = [(x, number) for x, y in points if (number := _number(y)) is not None]
    if len(pairs) > MAX_POINTS:
        parts = np.array_split(np.array(pairs, dtype=np.float64), MAX_POINTS)
        pairs = [(round(float(part[:, 0].mean()), 1), float(part[:, 1].mean())) for part in parts]
    return {"label": label, "x": [x for x, _ in pairs], "y": [float(f"{y:.5g}") for _, y in pairs]}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _mean(values: Iterable[Any]) -> float | None:
    numbers = [number for value in values if (number := _number(value)) is not None]
    return sum(numbers) / len(numbers) if numbers else None
