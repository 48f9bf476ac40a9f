"""The data of the report page: stages with their panels and numbers, and sample responses. No torch here.

The page stays small: lines have at most ``panels.MAX_POINTS`` points, and of very many stages and samples a part is
shown, with the number of all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_s2d.artifacts.files import read_jsonl
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.formatting import format_bytes, format_seconds
from megatron_s2d.report.panels import latest, stage_panels
from megatron_s2d.report.results import RolloutExample, RunResults, StageRun

MAX_SHOWN_CHARACTERS = 4000
MAX_STAGES = 100
MAX_SAMPLE_CHARACTERS = 3_000_000  # prompts, responses and tokens of all samples together
# C0 and C1 controls but for tab and newline; zero-width and bidirectional controls; lone surrogates.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: str, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    """``text`` with control and direction characters spelled out, cut after ``limit`` characters with a note."""
    cut = f"\n… ({len(text) - limit:,} more characters)" if len(text) > limit else ""
    return spell_out(text[:limit]) + cut


def spell_out(text: str) -> str:
    """Return ``text`` with control and direction characters as their numbers."""
    return _HIDDEN.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def page_data(results: RunResults) -> dict[str, Any]:
    """Return what ``templates/report.js`` reads."""
    samples = bounded([sample_data(example) for example in results.rollouts])
    return {
        "live": results.live,
        "stages": [stage_data(stage) for stage in results.stages[:MAX_STAGES]],
        "samples": samples,
        "samples_total": max(results.num_samples, len(samples)),
    }


def stage_data(stage: StageRun) -> dict[str, Any]:
    """Return the tab of a stage."""
    rows = stage.directory.metrics()
    config = stage.directory.config() if stage.directory.config_path.exists() else {}
    peak = stage.directory.finished().get("peak_memory") if stage.directory.is_finished() else None
    facts = [
        ("type", str(config.get("stage", config).get("type", "stage"))),
        ("state", stage.state),
        ("steps", f"{rows[-1]['step'] if rows else 0}" + (f" of {stage.total}" if stage.total else "")),
        ("time", format_seconds(stage.seconds) + (", reused" if stage.reused else "")),
    ]
    facts += [("peak memory of a rank", format_bytes(peak))] if peak else []
    warnings = stage.directory.warnings_path
    lines = warnings.read_text(encoding="utf-8", errors="replace").splitlines() if warnings.exists() else []
    return {
        "name": spell_out(stage.name),
        "state": stage.state,
        "facts": [(name, spell_out(value)) for name, value in facts],
        "warnings": [visible(line) for line in lines[-5:]],
        "panels": stage_panels(rows, validation_rows(stage.directory)),
        "latest": latest(rows),
    }


def validation_rows(directory: StageDirectory) -> list[dict[str, Any]]:
    """Return the validations inside a stage: ``step``, and ``data``: set -> ``pass_rate`` and ``pass_rate_std_err``."""
    path = directory.path / "validation.jsonl"
    return read_jsonl(path) if path.exists() else []


def sample_data(example: RolloutExample) -> dict[str, Any]:
    """Return one sample as the browser of samples shows it; everything in it is text."""
    largest = max((abs(float(token.get("advantage", 0.0))) for token in example.tokens), default=0.0) or 1.0
    response = example.response
    if example.episode is not None:
        response = "\n".join(f"[{part.get('role', '')}] {part.get('text', '')}" for part in example.episode)
    return {
        "stage": spell_out(example.stage),
        "source": example.source,
        "step": example.step,
        "id": visible(example.problem_id, 200),
        "prompt": visible(example.prompt),
        "response": visible(response),
        "answer": None if example.answer is None else visible(example.answer, 500),
        "reward": example.reward,
        "verdict": visible(example.verifier_label, 100),
        "finish": visible(example.finish_reason, 100),
        "detail": None if example.verifier_detail is None else visible(example.verifier_detail, 1000),
        "tokens": [
            {"text": visible(str(token["text"]), 200), "facts": token_facts(token), "color": _color(token, largest)}
            for token in example.tokens
        ],
    }


def token_facts(token: Mapping[str, Any]) -> str:
    """Return probabilities and advantage of a token in words; empty if none is stored."""
    parts = [
        f"{name} {100 * min(1.0, pow(2.718281828459045, float(token[key]))):.3g} %"
        for key, name in (("student_log_prob", "student"), ("teacher_log_prob", "teacher"))
        if token.get(key) is not None
    ]
    if token.get("log_ratio") is not None:
        parts.append(f"log teacher - log student {float(token['log_ratio']):+.3f}")
    if token.get("advantage") is not None:
        parts.append(f"advantage {float(token['advantage']):+.3f}")
    return ", ".join(parts)


def _color(token: Mapping[str, Any], largest: float) -> str:
    """Blue for a token that is made likelier, orange for one that is made less likely; the strongest is the fullest."""
    value = float(token.get("advantage") or 0.0) / largest
    color = "0, 114, 178" if value > 0 else "213, 94, 0"
    return f"rgba({color}, {0.5 * abs(value):.2f})" if value else ""


def bounded(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return as many samples, evenly spaced, as ``MAX_SAMPLE_CHARACTERS`` allows."""
    sizes = [sum(len(str(value)) for value in sample.values()) for sample in samples]
    step = 1
    while sum(sizes[::step]) > MAX_SAMPLE_CHARACTERS and step < len(samples):
        step += 1
    return list(samples[::step])
