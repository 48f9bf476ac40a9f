"""Renders ``report.html``: one self-contained file, from ``templates/report.html``, ``report.css`` and ``report.js``.

The template escapes every value, the script sets text and never markup, and characters that could hide or reorder text
are made visible: prompts and responses are untrusted. The page's content security policy forbids external resources
and every script but this one, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_s2d.formatting import format_seconds, percent, points
from megatron_s2d.report.page_data import page_data, spell_out, visible
from megatron_s2d.report.plots import DPI
from megatron_s2d.report.results import ArmResult, RunResults, StageRun, shares_text
from megatron_s2d.report.statistics import EXACT_PROBLEMS, SIGNIFICANCE

TEMPLATES = Path(__file__).parent / "templates"


def _finalize(value: Any) -> Any:
    """Applied to every value that the template prints, before it is escaped."""
    return spell_out(value) if type(value) is str else value


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
    """Return the page; ``plots`` has PNGs under ``arms`` and ``contrasts``, both optional."""
    return page_template().render(
        percent=percent,
        results=results,
        images={name: _image(png) for name, png in plots.items() if name in ("arms", "contrasts")},
        pass_ks=shown_pass_ks(results) if results.arms else [],
        domains=_domains(results.arms),
        has_verdicts=any(arm.verdicts for arm in (*results.arms, *results.also_evaluated)),
        shares_text=shares_text,
        summary=contrast_summary(results) if results.contrasts or results.refused else "",
        interval_note=interval_note(results),
        stages=[_stage_row(stage) for stage in results.stages if stage.directory.lineage_path.exists()],
        words={"agrees": "as expected", "undecided": "undecided", "against": "against", "no expectation": "open"},
        **scripted(page_data(results)),
    )


def page_bytes(results: RunResults, plots: Mapping[str, bytes]) -> bytes:
    """Return the page as UTF-8; a lone surrogate, which a tokenizer may produce, has no UTF-8 form."""
    return render_html(results, plots).encode("utf-8", "backslashreplace")


def page_template(name: str = "report.html") -> jinja2.Template:
    """Return a template that escapes every value and spells out hidden characters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
    )
    environment.filters |= {"shorten": visible, "points": points, "seconds": format_seconds}
    return environment.get_template(name)


def scripted(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the style, the script, the hash by which the page's policy allows this script alone, and the data."""
    css, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    # ASCII only, and nothing that ends the element: "<" is enough for "</script>" and "<!--".
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return {"css": Markup(css), "script": Markup(script), "script_hash": f"sha256-{digest}", "data": Markup(text)}


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
