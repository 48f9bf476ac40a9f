"""Draws the figures of the documents: the four stages, four arms of the quickstart (from the table in docs/results.md),
and the layers of the package (from tests/unit/test_layers.py).

python docs/figures/figures.py        # writes stages.svg, quickstart.svg and layers.svg beside this file
"""

from __future__ import annotations

import ast
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent / "results.md"
LAYER_TEST = FOLDER.parents[1] / "tests/unit/test_layers.py"

TEACHER, STUDENT, INK, MUTED, GRID = "#7a4bb5", "#1f6fb2", "#1c2430", "#5b6675", "#d9dee5"

EVERY_TOKEN = "a signal on every token"
STAGES = [
    ("1", "GRPO on the teacher", TEACHER, ["labelled prompts", "verifier reward", "one reward per response"]),
    ("2a", "Forward-KL warm-up", STUDENT, ["cached teacher responses", "KL(teacher ‖ student)", EVERY_TOKEN]),
    ("2b", "On-policy distillation", STUDENT, ["student's own responses", "KL(student ‖ teacher)", EVERY_TOKEN]),
    ("3", "GRPO on the student", STUDENT, ["held-out labelled prompts", "verifier reward", "optional"]),
]

ARMS = [
    ("direct_student_grpo", "GRPO on the student", "no teacher", MUTED),
    ("raw_teacher_bridge", "distil the base teacher", "stages 2a, 2b", MUTED),
    ("rl_teacher_bridge", "distil the RL teacher", "stages 1, 2a, 2b", STUDENT),
    ("half_bridge_stage3", "the same, then GRPO", "stages 1, 2a, 2b, 3", STUDENT),
]


def stages_svg() -> str:
    """Return the picture of the four stages: a box for each, an arrow where weights go to the next one."""
    width, box, gap, top = 1000, 220, 40, 46
    parts = [
        text(0, 22, "Sparse labels train the teacher", 14, TEACHER, "start", bold=True),
        text(box + gap, 22, "dense supervision trains the student", 14, STUDENT, "start", bold=True),
        text(3 * (box + gap), 22, "held-out labels finish it", 14, STUDENT, "start", bold=True),
    ]
    for index, (number, title, colour, lines) in enumerate(STAGES):
        left = index * (box + gap)
        frame = f'fill="none" stroke="{colour}" stroke-width="2"'
        parts.append(f'<rect x="{left}" y="{top}" width="{box}" height="128" rx="8" {frame}/>')
        parts.append(f'<rect x="{left}" y="{top}" width="{box}" height="36" rx="8" fill="{colour}"/>')
        parts.append(text(left + 12, top + 24, f"{number}  {title}", 14, "#ffffff", "start", bold=True))
        parts += [text(left + 12, top + 62 + 24 * row, line, 14, INK, "start") for row, line in enumerate(lines)]
        if index:
            parts.append(arrow(left - gap + 4, left - 4, top + 64))
    return document(width, top + 130, parts)


def quickstart_svg() -> str:
    """Return the bar chart of ``ARMS``: bars are means over the seeds of docs/results.md, dots the single seeds."""
    scores = accuracies(RESULTS.read_text(encoding="utf-8"))
    left, right, top, row = 210, 780, 34, 46
    scale = (right - left) / 100

    def x(value: float) -> float:
        return left + scale * value

    parts = [text(0, 18, "avg@16 on 384 held-out problems, per cent", 14, MUTED, "start")]
    bottom = top + row * len(ARMS)
    for tick in range(0, 101, 25):
        parts.append(f'<line x1="{x(tick):.1f}" y1="{top}" x2="{x(tick):.1f}" y2="{bottom}" stroke="{GRID}"/>')
        parts.append(text(x(tick), bottom + 18, str(tick), 12, MUTED, "middle"))
    for index, (arm, label, what, colour) in enumerate(ARMS):
        mean, y = sum(scores[arm]) / len(scores[arm]), top + row * index + 6
        parts.append(text(0, y + 15, label, 14, INK, "start", bold=True))
        parts.append(text(0, y + 31, what, 12, MUTED, "start"))
        parts.append(
            f'<rect x="{left}" y="{y}" width="{scale * mean:.1f}" height="32" rx="3" fill="{colour}" opacity="0.85"/>'
        )
        parts += [
            f'<circle cx="{x(score):.1f}" cy="{y + 16}" r="4" fill="#ffffff" stroke="{INK}" stroke-width="1.5"/>'
            for score in scores[arm]
        ]
        parts.append(text(right + 12, y + 21, " / ".join(f"{score:.1f}" for score in scores[arm]), 14, INK, "start"))
    return document(940, bottom + 26, parts)


PURPOSE = {
    "errors": "shared by all: errors, number formats, buffer sizes",
    "config": "what users write, what flows through a run, what lies on disk",
    "kl": "exact divergences of sharded vocabularies",
    "objectives": "losses, advantages, metrics",
    "parallel": "device, process groups, collectives, checkpoints",
    "models": "Megatron models; prompts, packing, caches; rewards",
    "rollout": "engines that generate responses",
    "train": "a model under a layout, the training loop",
    "teachers": "teacher distributions: models, caches, servers",
    "stages": "one file per method",
    "estimate": "memory and time beforehand, tables and plots afterwards",
    "workflow": "plan, checks before a run, worker processes",
    "studies": "sweeps, scaling laws, simulations; a rank on a CUDA runtime without a GPU",
    "cli": "the s2d command; also calls conversion/ and launchers/",
}


def layers_svg() -> str:
    """Return the layers of the package, top to bottom in the order in which they may import."""
    width, row = 860, 34
    parts = []
    for level, names in enumerate(layers(LAYER_TEST.read_text(encoding="utf-8"))):
        y = level * row
        parts.append(f'<rect x="0" y="{y}" width="{width}" height="{row - 6}" rx="5" fill="{GRID}" opacity="0.6"/>')
        parts.append(text(12, y + 19, ", ".join(names), 14, INK, "start", bold=True))
        parts.append(text(330, y + 19, PURPOSE.get(names[0], ""), 13, MUTED, "start"))
    bottom = (level + 1) * row
    parts.append(
        f'<line x1="{width + 24}" y1="{bottom - 6}" x2="{width + 24}" y2="10" stroke="{INK}" stroke-width="2"/>'
    )
    parts.append(f'<path d="M{width + 24} 0 l-6 12 h12 z" fill="{INK}"/>')
    parts.append(text(width + 40, bottom / 2, "imports", 13, MUTED, "start"))
    return document(width + 100, bottom, parts)


def layers(test: str) -> list[tuple[str, ...]]:
    """Return the value of ``LAYERS`` in the source of the test that checks imports."""
    for node in ast.parse(test).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LAYERS":
            return ast.literal_eval(node.value)
    raise ValueError("no LAYERS in the test")


def accuracies(page: str) -> dict[str, list[float]]:
    """Return arm -> avg@16 of each seed, from the first table of docs/results.md."""
    scores = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and all("±" in cell and cell[0].isdigit() for cell in cells[-3:]):
            scores[cells[0].strip("`")] = [float(cell.split("±")[0]) for cell in cells[-3:]]
    return scores


def document(width: int, height: int, parts: list[str]) -> str:
    """Return an SVG document with a white margin, so that it reads on dark pages too."""
    size = f'width="{width + 40}" height="{height + 40}" viewBox="-20 -20 {width + 40} {height + 40}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif">'
    ground = '<rect x="-20" y="-20" width="100%" height="100%" rx="10" fill="#ffffff"/>'
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, size: int, colour: str, anchor: str, bold: bool = False) -> str:
    """Return one line of text."""
    weight = ' font-weight="bold"' if bold else ""
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style} xml:space="preserve">{escape(words)}</text>'


def arrow(start: float, end: float, y: float) -> str:
    """Return an arrow that points to the right."""
    shaft = f'<line x1="{start}" y1="{y}" x2="{end - 8}" y2="{y}" stroke="{INK}" stroke-width="2"/>'
    return shaft + f'<path d="M{end} {y} l-10 -5 v10 z" fill="{INK}"/>'


FIGURES = {"stages.svg": stages_svg, "quickstart.svg": quickstart_svg, "layers.svg": layers_svg}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
