"""``report.html``: one file that opens without a network and runs no script.

Every value goes through the template's escaping, and characters that could hide or reorder text are made visible:
prompts and responses are untrusted. The page's own policy forbids scripts and any load from elsewhere.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jinja2

from megatron_s2d.formatting import format_seconds
from megatron_s2d.report.plots import DPI
from megatron_s2d.report.results import ArmResult, Estimate, RolloutExample, RunResults, StageRun

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


def percent(estimate: Estimate) -> str:
    """``83.2 ± 1.5``, in per cent; without an error for a single problem."""
    error = f" ± {100 * estimate.std_err:.1f}" if estimate.std_err is not None else ""
    return f"{100 * estimate.mean:.1f}{error}"


def points(value: float) -> str:
    """A difference in percentage points with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def shown_pass_ks(results: RunResults) -> list[int]:
    """The k of pass@k that every arm has and that fit a table: at most three, 1 (which is avg@k) left out."""
    common = set.intersection(*(set(arm.pass_at_k) for arm in (*results.arms, *results.also_evaluated)))
    return sorted(common - {1})[-3:]


def headline(results: RunResults) -> str:
    """One sentence on how many contrasts came out as the paper has them."""
    counts = Counter(contrast.agreement for contrast in results.contrasts)
    parts = [f"{counts[key]} {text}" for key, text in _COUNTED.items() if counts[key]]
    if results.refused:
        parts.append(f"{len(results.refused)} refused")
    total = len(results.contrasts) + len(results.refused)
    return f"{total} contrast{'s' * (total != 1)}: {', '.join(parts)}." if parts else "No contrast was asked for."


_COUNTED = {
    "agrees": "as the paper found",
    "undecided": "not distinguishable from zero",
    "against": "against the paper",
    "no expectation": "without an expectation",
}


def render_html(results: RunResults, plots: Mapping[str, bytes]) -> str:
    """The page; ``plots`` holds PNGs under ``arms``, ``contrasts`` and ``stage/<name>``, each shown where present."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_finalize, trim_blocks=True
    )
    environment.filters |= {"shorten": visible, "percent": percent, "points": points, "seconds": format_seconds}
    environment.filters |= {"has_advantages": _has_advantages, "advantage_color": advantage_color, "facts": _facts}
    return environment.from_string(_PAGE).render(
        results=results,
        images={name: _image(png) for name, png in plots.items()},
        pass_ks=shown_pass_ks(results) if results.arms else [],
        domains=_domains(results.arms),
        headline=headline(results),
        stages=[_stage(stage) for stage in results.stages],
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
    """The PNG as an address, and its width in CSS pixels (96 to the inch) so that all text has one size."""
    width = int.from_bytes(png[16:20], "big")
    return {"src": "data:image/png;base64," + base64.b64encode(png).decode("ascii"), "width": round(width * 96 / DPI)}


def _domains(arms: tuple[ArmResult, ...]) -> list[str]:
    return sorted({domain for arm in arms for domain in arm.domains})


def _stage(stage: StageRun) -> dict[str, Any]:
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


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ results.name }}: report</title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1f2430;
  background: #fff; max-width: 70rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem; border-bottom: 2px solid #0072B2; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
p { margin: .5rem 0; max-width: 52rem; }
.muted, caption, figcaption { color: #565d6b; font-size: .88rem; }
.lead { font-size: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; width: 100%; }
th, td { text-align: left; padding: .38rem .7rem .38rem 0; border-bottom: 1px solid #e1e4e9; vertical-align: top; }
thead th { border-bottom: 2px solid #b9bec7; font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre { background: #f5f6f8; border: 1px solid #e1e4e9; border-radius: 4px; padding: .6rem .8rem; margin: .3rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 28rem; overflow-y: auto; }
figure { margin: .8rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
summary { cursor: pointer; color: #00507d; }
.tag { display: inline-block; padding: 0 .5rem; border-radius: 3px; font-size: .82rem; font-weight: 600;
  border: 1px solid currentColor; white-space: nowrap; }
.agrees { color: #00664b; } .undecided { color: #565d6b; } .against { color: #a34700; } .no { color: #00507d; }
.note { border-left: 4px solid #D55E00; background: #fdf3ec; padding: .5rem .8rem; margin: .6rem 0; }
@media print { body { font-size: 11pt; padding: 0; max-width: none; } pre { max-height: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .scroll { overflow: visible; } h2, h3 { break-after: avoid; } tr, figure, .rollout { break-inside: avoid; } }
</style>
</head>
<body>
<header>
<h1>{{ results.name }}</h1>
{% if results.description %}<p class="lead">{{ results.description }}</p>{% endif %}
<p class="lead"><strong>{{ headline }}</strong></p>
<p class="muted">Seed {{ results.seed }} · {{ results.wall_seconds|seconds }} of wall-clock time for this run
{% for key, value in results.environment.items() %} · {{ key }}: {{ value }}{% endfor %}</p>
{% for warning in results.warnings %}<p class="note">{{ warning }}</p>{% endfor %}
</header>

{% macro arm_row(arm) %}
<tr><td>{{ arm.name }}{% if arm.stage != arm.name %}<br><span class="muted">{{ arm.stage }}</span>{% endif %}</td>
<td class="number"><strong>{{ arm.avg|percent }}</strong></td>
{% for k in pass_ks %}<td class="number">{{ "%.1f"|format(100 * arm.pass_at_k[k].mean) }}</td>{% endfor %}
{% for domain in domains %}<td class="number">
{% if domain in arm.domains %}{{ arm.domains[domain]|percent }}{% else %}–{% endif %}</td>{% endfor %}
<td class="number">{{ "%.1f"|format(arm.response_length) }}</td>
<td class="number">{{ "%.1f"|format(100 * arm.truncated_fraction) }}</td>
<td class="number">{{ arm.avg.num_problems }} × {{ arm.k }}</td></tr>
{% endmacro %}
<section>
<h2>Arms</h2>
{% if results.arms %}
<div class="scroll"><table>
<thead><tr><th>Arm <span class="muted">and its final stage</span></th><th class="number">avg@k, %</th>
{% for k in pass_ks %}<th class="number">pass@{{ k }}, %</th>{% endfor %}
{% for domain in domains %}<th class="number">{{ domain }}, %</th>{% endfor %}
<th class="number">tokens</th><th class="number">cut off, %</th><th class="number">problems</th></tr></thead>
<tbody>{% for arm in results.arms %}{{ arm_row(arm) }}{% endfor %}</tbody>
{% if results.also_evaluated %}
<tbody><tr><th colspan="{{ 5 + pass_ks|length + domains|length }}" class="muted">Also evaluated</th></tr>
{% for arm in results.also_evaluated %}{{ arm_row(arm) }}{% endfor %}</tbody>{% endif %}
</table></div>
<p class="muted">Mean over problems ± one standard error over problems. Tokens: mean response length. Cut off: samples
that reached the length limit. Training was done once per arm: the errors do not include what another training seed
would change.</p>
{% if "arms" in images %}<figure><img src="{{ images["arms"].src }}" width="{{ images["arms"].width }}"
alt="Bar chart of avg@k of every arm; the numbers are in the table above"></figure>{% endif %}
{% else %}<p>No arm has been evaluated.</p>{% endif %}
</section>

{% if results.table is not none %}
<section>
<h2>{{ results.table.title }}</h2>
<div class="scroll"><table>
<thead><tr>{% for name in results.table.header %}<th{% if not loop.first %} class="number"{% endif %}>{{ name }}</th>
{% endfor %}</tr></thead>
<tbody>{% for row in results.table.rows %}<tr>{% for cell in row %}<td{% if not loop.first %} class="number"{% endif %}>
{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
<p class="muted">Beside the paper's figures, what this run measured: mean ± one standard error over problems, in per cent.
{% for agreement in results.table.agreements %}{{ agreement.sentence }} {% endfor %}</p>
</section>
{% endif %}

<section>
<h2>Contrasts</h2>
{% if results.contrasts %}
<div class="scroll"><table>
<thead><tr><th>a − b</th><th>What differs</th><th class="number">Points ± s.e.</th><th class="number">Interval</th>
<th class="number">p</th><th>Expected</th><th>Seen</th><th>In words</th></tr></thead><tbody>
{% for contrast in results.contrasts %}{% set c = contrast.comparison %}
<tr><td>{{ contrast.a }}<br>−&nbsp;{{ contrast.b }}</td>
<td>{{ contrast.factor }}<details><summary>{{ contrast.differences|length }} declared
difference{{ "s" if contrast.differences|length != 1 }}</summary>
{% for difference in contrast.differences %}<code>{{ difference }}</code><br>{% endfor %}</details></td>
<td class="number"><strong>{{ c.difference|points }}</strong>
{% if c.std_err is not none %} ± {{ "%.1f"|format(100 * c.std_err) }}{% endif %}</td>
<td class="number">{{ c.interval[0]|points }} to {{ c.interval[1]|points }}</td>
<td class="number">{{ "%.3f"|format(c.p_value) if c.p_value >= 0.001 else "< 0.001" }}</td>
<td><code>{{ contrast.expected }}</code></td><td><code>{{ c.order }}</code></td>
<td><span class="tag {{ contrast.agreement.split()[0] }}">{{ words[contrast.agreement] }}</span><br>
{{ contrast.verdict }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="muted">Paired on the same problems, in percentage points; the interval is a
{{ "%.0f"|format(100 * results.contrasts[0].comparison.level) }} % bootstrap over problems, p a two-sided sign-flip
test.
a~b: the interval covers zero. Every contrast was checked: its arms differ in the listed keys and in nothing else.
No correction for the number of contrasts.</p>
{% if "contrasts" in images %}<figure><img src="{{ images["contrasts"].src }}" width="{{ images["contrasts"].width }}"
alt="Differences with intervals; the numbers are in the table above"></figure>{% endif %}
{% else %}<p>No contrast to show.</p>{% endif %}
{% if results.refused %}
<h3>Refused contrasts</h3>
<table><thead><tr><th>a − b</th><th>Factor</th><th>Why it is not shown</th></tr></thead><tbody>
{% for contrast in results.refused %}<tr><td>{{ contrast.a }}<br>−&nbsp;{{ contrast.b }}</td>
<td>{{ contrast.factor }}</td><td>{{ contrast.reason }}</td></tr>{% endfor %}</tbody></table>
{% endif %}
</section>

{% if stages %}
<section>
<h2>Training curves</h2>
<p class="muted">One row a stage, over its steps. Thin: each step; thick: running mean. Reward is on training
prompts.</p>
{% for stage in stages if "stage/" ~ stage.name in images %}
<h3>{{ stage.name }}
<span class="muted">{{ stage.type }}, {{ stage.steps }} steps, {{ stage.seconds|seconds }}</span></h3>
{% set image = images["stage/" ~ stage.name] %}
<figure><img src="{{ image.src }}" width="{{ image.width }}"
alt="Training curves of stage {{ stage.name }}"></figure>
{% endfor %}
</section>

<section>
<h2>Diagnostics</h2>
<p class="muted">What each stage recorded beyond its curves: KL by place in the response, ratios and their outliers, gate,
clipping, truncation.</p>
{% for stage in stages if "diagnostics/" ~ stage.name in images %}
<details><summary>{{ stage.name }}</summary>
{% set image = images["diagnostics/" ~ stage.name] %}
<figure><img src="{{ image.src }}" width="{{ image.width }}"
alt="Diagnostics of stage {{ stage.name }}"></figure></details>
{% endfor %}
</section>

<section>
<h2>Stages and where they come from</h2>
<div class="scroll"><table>
<thead><tr><th>Stage</th><th>Type</th><th class="number">Time</th><th>Seeds</th><th>Inputs (digest)</th>
<th>When</th></tr></thead><tbody>
{% for stage in stages %}
<tr><td>{{ stage.name }}{% if stage.role != stage.name %}<br>
<span class="muted">as {{ stage.role }}</span>{% endif %}</td>
<td>{{ stage.type }}</td><td class="number">{{ stage.seconds|seconds }}{% if stage.reused %}<br>
<span class="muted">reused</span>{% endif %}</td>
<td>{% for name, seed in stage.lineage.seeds.items() %}{{ name }} {{ seed }}<br>{% endfor %}</td>
<td>{% for name, digest in stage.lineage.inputs.items() %}{{ name }} <code title="{{ digest }}">{{ digest[:12] }}</code>
<br>{% else %}–{% endfor %}</td>
<td>{{ stage.lineage.started }}{% if stage.lineage.resumed %}<br>
<span class="muted">resumed {{ stage.lineage.resumed|length }} ×</span>{% endif %}</td></tr>
{% endfor %}</tbody></table></div>
{% for stage in stages %}<details><summary>{{ stage.name }}: configuration, code and library versions</summary>
<pre>{{ stage.config }}</pre>
<pre>{% for name, value in stage.lineage.code.items() %}{{ name }}: {{ value }}
{% endfor %}{% for name, value in stage.lineage.libraries.items() %}{{ name }}: {{ value }}
{% endfor %}</pre></details>
{% endfor %}
</section>
{% endif %}

{% if results.ledger %}
<section>
<h2>Label ledger</h2>
<p class="muted">Which prompts each stage saw, and whether their labels (rewards or reference solutions) were used.</p>
<div class="scroll"><table><thead><tr><th>Stage</th><th>Prompts</th><th class="number">Number</th><th>Labels used</th>
<th>Note</th></tr></thead><tbody>
{% for entry in results.ledger %}<tr><td>{{ entry.stage }}</td><td>{{ entry.prompts }}</td>
<td class="number">{{ entry.num_prompts }}</td><td>{{ "yes" if entry.labels_used else "no" }}</td>
<td>{{ entry.note }}</td></tr>{% endfor %}</tbody></table></div>
</section>
{% endif %}

{% if results.rollouts %}
<section>
<h2>Sample responses</h2>
<p class="muted">Text as the model wrote it; control characters are spelled out.</p>
{% for rollout in results.rollouts %}
<div class="rollout">
<h3>{{ rollout.stage }} <span class="muted">{{ rollout.problem_id }}, reward
{{ "–" if rollout.reward is none else "%g"|format(rollout.reward) }} ({{ rollout.verifier_label }}), ended by
{{ rollout.finish_reason }}{% if rollout.answer is not none %}, label <code>{{ rollout.answer|shorten }}</code>
{% endif %}</span></h3>
<pre>{{ rollout.prompt|shorten }}</pre>
<pre>{{ rollout.response|shorten }}</pre>
{% if rollout|has_advantages %}<pre title="tokens coloured by advantage">{% for token in rollout.tokens %}<span
style="background: {{ token|advantage_color(rollout) }}" title="{{ token|facts }}">{{ token.text }}</span> {% endfor %}
</pre>{% endif %}
</div>
{% endfor %}
</section>
{% endif %}
</body>
</html>
"""
