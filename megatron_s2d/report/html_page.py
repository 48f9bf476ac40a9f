"""Renders ``report.html``: one self-contained file without scripts, from ``templates/report.html``.

The template escapes every value, and characters that could hide or reorder text are made visible: prompts and
responses are untrusted. The page's content security policy forbids scripts and external resources.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from megatron_s2d.formatting import format_seconds, percent, points
from megatron_s2d.report.plots import DPI
from megatron_s2d.report.results import ArmResult, RolloutExample, RunResults, StageRun
from megatron_s2d.report.statistics import EXACT_PROBLEMS, SIGNIFICANCE

TEMPLATES = Path(__file__).parent / "templates"
MAX_SHOWN_CHARACTERS = 4000
# C0 and C1 controls but for tab and newline; zero-width and bidirectional controls; lone surrogates.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: str, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    """``text`` with control and direction characters spelled out, cut after ``limit`` characters with a note."""
    cut = f"\n… ({len(text) - limit:,} more characters)" if len(text) > limit else ""
    return _spell_out(text[:limit]) + cut


def _spell_out(text: str) -> str:
    return _HIDDEN.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def _finalize(value: Any) -> Any:
    """Applied to every value that the template prints, before it is escaped."""
    return _spell_out(value) if type(value) is str else value


def shown_pass_ks(results: RunResults) -> list[int]:
    """Return at most three k of pass@k that every arm has, without 1 (which is avg@k)."""
    common = set.intersection(*(set(arm.pass_at_k) for arm in (*results.arms, *results.also_evaluated)))
    return sorted(common - {1})[-3:]


def contrast_summary(results: RunResults) -> str:
    """Return one sentence on how many contrasts agree with the paper, or with what the user expected."""
    counts = Counter(contrast.agreement for contrast in results.contrasts)
    by_paper = any(contrast.by_paper for contrast in results.contrasts)
    words = _COUNTED | ({} if by_paper else {"agrees": "as you expected", "against": "against your expectation"})
    parts = [f"{counts[key]} {text}" for key, text in words.items() if counts[key]]
    if results.refused:
        parts.append(f"{len(results.refused)} refused")
    total = len(results.contrasts) + len(results.refused)
    return f"{total} contrast{'s' * (total != 1)}: {', '.join(parts)}." if parts else "No contrast was asked for."


def interval_note(results: RunResults) -> str:
    """Return how the intervals of the contrasts were made, and how many problems a difference of 5 points needs."""
    comparisons = [contrast.comparison for contrast in results.contrasts]
    exact = all(item.num_problems <= EXACT_PROBLEMS for item in comparisons)
    how = "invert the exact sign-flip test" if exact else "are bootstrapped over problems"
    needed = [number for item in comparisons if (number := item.problems_needed()) is not None]
    size = f" A difference of 5 points needs about {max(needed):,} problems (power 80 %)." if needed else ""
    return (
        f"The intervals {how}; a difference counts if p is at most {SIGNIFICANCE} and the interval leaves out 0.{size}"
    )


_COUNTED = {
    "agrees": "as the paper found",
    "undecided": "not distinguishable from zero",
    "against": "against the paper",
    "no expectation": "without an expectation",
}


def render_html(results: RunResults, plots: Mapping[str, bytes]) -> str:
    """Return the page; ``plots`` has PNGs under ``arms``, ``contrasts`` and ``stage/<name>``, all optional."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
    )
    environment.filters |= {"shorten": visible, "points": points, "seconds": format_seconds}
    environment.filters |= {"has_advantages": _has_advantages, "advantage_color": advantage_color, "facts": _facts}
    return environment.get_template("report.html").render(
        percent=percent,
        results=results,
        images={name: _image(png) for name, png in plots.items()},
        pass_ks=shown_pass_ks(results) if results.arms else [],
        domains=_domains(results.arms),
        summary=contrast_summary(results),
        interval_note=interval_note(results),
        stages=[_stage_row(stage) for stage in results.stages],
        words={"agrees": "as expected", "undecided": "undecided", "against": "against", "no expectation": "open"},
    )


def _has_advantages(rollout: RolloutExample) -> bool:
    return any("advantage" in token for token in rollout.tokens)


def advantage_color(token: Mapping[str, Any], rollout: RolloutExample) -> str:
    """Blue for a token that is made likelier, orange for one that is made less likely; the strongest is the fullest."""
    largest = max(abs(float(other.get("advantage", 0.0))) for other in rollout.tokens) or 1.0
    value = float(token.get("advantage", 0.0)) / largest
    color = "0, 114, 178" if value > 0 else "213, 94, 0"
    return f"rgba({color}, {0.5 * abs(value):.2f})"


def _facts(token: Mapping[str, Any]) -> str:
    names = {"advantage": "advantage", "log_ratio": "log teacher - log student"}
    return ", ".join(f"{text} {float(token[name]):+.3f}" for name, text in names.items() if name in token)


def _image(png: bytes) -> dict[str, Any]:
    """Return the PNG as a data URL with its width in CSS pixels (96 per inch), so that all text has one size."""
    width = int.from_bytes(png[16:20], "big")
    return {"src": "data:image/png;base64," + base64.b64encode(png).decode("ascii"), "width": round(width * 96 / DPI)}


def _domains(arms: tuple[ArmResult, ...]) -> list[str]:
    return sorted({domain for arm in arms for domain in arm.domains})


def _stage_row(stage: StageRun) -> dict[str, Any]:
    config, lineage = stage.directory.config(), stage.directory.lineage()
    return {
        "name": stage.name,
        "role": config.get("role", stage.name),
        "type": config.get("stage", config).get("type", "stage"),
        "seconds": stage.seconds,
        "reused": stage.reused,
        "steps": len(stage.directory.metrics()),
        "lineage": lineage,
        "config": json.dumps(config, indent=1, ensure_ascii=False),
    }
