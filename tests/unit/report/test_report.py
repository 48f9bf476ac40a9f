"""The report: numbers in results.json, honest words, and a page that is safe and needs no network."""

import base64
import dataclasses
import hashlib
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from megatron_s2d.artifacts.files import append_line, read_json
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.data.label_ledger import LedgerEntry
from megatron_s2d.report import html_page, report
from megatron_s2d.report.diagnostics import _lines_of, gap_shares, plot_diagnostics
from megatron_s2d.report.evaluation import evaluation_from_rows, paired_comparison
from megatron_s2d.report.page_data import MAX_SHOWN_CHARACTERS, visible
from megatron_s2d.report.plots import plot_stage, running_mean
from megatron_s2d.report.report import print_report, render_markdown, write_report
from megatron_s2d.report.results import (
    ArmResult,
    ContrastResult,
    RefusedContrast,
    RolloutExample,
    RunResults,
    StageRun,
)
from megatron_s2d.report.statistics import PairedComparison

HOSTILE = '</pre><script>alert("x")</script><img src=http://example.invalid/a.png onerror=x>\x1b[31mred\u202eabc'
RATES = {
    "direct_student_grpo": 0.72,
    "raw_teacher_bridge": 0.24,
    "rl_teacher_bridge": 0.84,
    "no_forward_kl_warmup": 0.57,
    "no_on_policy_distillation": 0.83,
    "half_bridge_stage3": 0.83,
}


def fake_evaluation(name, rate, n=96, k=16):
    generator = np.random.default_rng(7)  # the same problems for every arm
    difficulty = generator.normal(0, 1.2, size=n)
    sampler = np.random.default_rng(len(name))
    chance = 1 / (1 + np.exp(-(math.log(rate / (1 - rate)) + difficulty)))
    rewards = (sampler.random((n, k)) < chance[:, None]).astype(float)
    rows = [
        {
            "problem_id": f"p{index}",
            "domain": "short" if index % 2 else "long",
            "rewards": rewards[index].tolist(),
            "response_lengths": sampler.integers(6, 12, k).tolist(),
            "finish_reasons": ["stop"] * (k - 1) + ["length"],
        }
        for index in range(n)
    ]
    return evaluation_from_rows(rows, name)


def fake_stage(root, name, kind, steps, names, resumed=False):
    stage = StageDirectory(root / "stages" / name)
    config = {"role": name, "type": kind, "steps": steps, "optimizer": {"lr": 1e-3}, "note": HOSTILE}
    inputs = {"init": "ab" * 32, "prompts pool/1H": "cd" * 32}
    stage.begin(config, inputs, {"seed": 1})
    if resumed:
        stage.begin(config, inputs, {"seed": 1})
    generator = np.random.default_rng(steps)
    shapes = {
        "reward": lambda u: 0.15 + 0.6 * u,
        "kl": lambda u: 0.05 * u,
        "entropy": lambda u: 0.9 - 0.5 * u,
        "response_length": lambda u: 9 - u,
        "loss": lambda u: math.exp(-3 * u),
    }
    for step in range(1, steps + 1):
        row = {"step": step, "time": 1e9 + step}
        for metric in names:
            row[metric] = shapes[metric](step / steps) + 0.03 * generator.standard_normal()
        if step == 5:
            row[names[0]] = None
        append_line(stage.metrics_path, json.dumps(row))
    stage.finish({"seconds": 12.5})
    return StageRun(name, stage, seconds=12.5 * steps / 10, reused=resumed)


def fake_results(root):
    """Results with the paper's ordering in most contrasts, one undecided, one against, one refused."""
    evaluations = {name: fake_evaluation(name, rate) for name, rate in RATES.items()}

    def contrast(a, b, factor, expected, *differences):
        comparison = paired_comparison(evaluations[a], evaluations[b], seed=1)
        return ContrastResult(a, b, factor, expected, comparison, differences, by_paper=True)

    teacher = '"teacher_grpo" against "teacher_base"'
    everything = ["reward", "kl", "entropy", "response_length", "loss"]
    return RunResults(
        name="quickstart",
        description="A tiny teacher and student family, trained from scratch on modular arithmetic.",
        seed=1,
        wall_seconds=412.3,
        arms=tuple(ArmResult.from_evaluation(name, f"{name}_opd", item) for name, item in evaluations.items()),
        contrasts=(
            contrast("rl_teacher_bridge", "raw_teacher_bridge", "the teacher", "a>b", f"opd.teacher: {teacher}"),
            contrast("rl_teacher_bridge", "direct_student_grpo", "where the labels go", "a>b", "opd", "student_grpo"),
            contrast("rl_teacher_bridge", "half_bridge_stage3", "half the labels after the bridge", "a>b", "stage3"),
            contrast("no_forward_kl_warmup", "no_on_policy_distillation", "which stage is left", "a>b", "opd", "fkl"),
            contrast("rl_teacher_bridge", "no_forward_kl_warmup", "stage 2a", "unknown", "forward_kl"),
        ),
        refused=(
            RefusedContrast(
                "half_bridge_stage3", "half_bridge_replay", "fresh labels", "the arms also differ in stage3.steps: 80"
            ),
        ),
        also_evaluated=(ArmResult.from_evaluation("teacher_grpo", "teacher_grpo", fake_evaluation("teacher", 0.87)),),
        stages=(
            fake_stage(root, "teacher_base", "supervised", 400, ["loss"]),
            fake_stage(root, "teacher_grpo", "grpo", 60, everything, resumed=True),
            fake_stage(root, "forward_kl", "forward_kl", 20, ["loss", "kl", "entropy"]),
            fake_stage(root, "opd", "opd", 60, everything),
        ),
        ledger=(
            LedgerEntry("teacher_grpo", "pool/1H", 512, labels_used=True),
            LedgerEntry("forward_kl", "pool/1H", 512, labels_used=False, note="through the teacher's responses"),
            LedgerEntry("stage3", "pool/2H", 512, labels_used=True, note="held out until here"),
        ),
        rollouts=(
            RolloutExample("opd", "p17", "12 + 5 - 3 * 4 + 2 =", "0 14 5 7 [ 7 ]", "7", 1.0, "correct", "stop"),
            RolloutExample("opd", "p18", "4 * 4 =", HOSTILE, "16", 0.0, "no_answer", "length", f"judge: {HOSTILE}"),
        ),
        environment={"machine": "2 cores, no GPU", "torch": "2.11.0"},
        warnings=("the teacher's pass rate on training prompts is 0.91, above the window's 0.90",),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    results = fake_results(root)
    page = write_report(root, results)
    return root, results, page.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def test_results_json_has_what_the_statistics_say(run):
    root, results, _ = run
    data = read_json(root / "results.json")
    assert set(data) == {"wall_seconds", "arms", "contrasts"} and data["wall_seconds"] == 412.3
    assert list(data["arms"]) == list(RATES)
    entry, rewards = data["arms"]["direct_student_grpo"], fake_evaluation("direct_student_grpo", 0.72).rewards
    assert entry["avg_at_k"] == pytest.approx(rewards.mean()) and (entry["k"], entry["num_problems"]) == (16, 96)
    assert entry["std_err"] == pytest.approx(rewards.mean(axis=1).std(ddof=1) / math.sqrt(96))
    assert entry["pass_at_k"]["16"] == pytest.approx(rewards.any(axis=1).mean())
    assert entry["truncated_fraction"] == pytest.approx(1 / 16)
    assert entry["domains"]["long"]["avg_at_k"] == pytest.approx(rewards[::2].mean())
    contrast = data["contrasts"][0]
    assert contrast["matched"] is True and contrast["differences"] == list(results.contrasts[0].differences)
    assert contrast["interval"][0] < contrast["difference"] < contrast["interval"][1]
    assert [item["agreement"] for item in data["contrasts"]] == [
        "agrees",
        "agrees",
        "undecided",
        "against",
        "no expectation",
    ]


@pytest.mark.parametrize(
    "expected,interval,wanted",
    [
        ("a>b", (0.1, 0.3), "a is better, as the paper found"),
        ("a>b", (-0.1, 0.3), "not distinguishable from zero on these problems; the paper found a better"),
        ("a>b", (-0.3, -0.1), "AGAINST the paper: b is better; the paper found a better"),
        ("a<b", (-0.3, -0.1), "b is better, as the paper found"),
        ("a~b", (0.0, 0.3), "not distinguishable from zero on these problems; the paper found no difference"),
        ("a~b", (0.1, 0.3), "AGAINST the paper: a is better; the paper found no difference"),
        ("unknown", (0.1, 0.3), "a is better"),
        ("unknown", (-0.1, 0.0), "not distinguishable from zero on these problems"),
    ],
)
def test_verdicts_are_honest(expected, interval, wanted):
    p_value = 0.5 if interval[0] <= 0 <= interval[1] else 0.01
    comparison = PairedComparison(sum(interval) / 2, 0.05, interval, 0.95, p_value, 100, 16)
    assert ContrastResult("x", "y", "factor", expected, comparison, (), by_paper=True).verdict == wanted
    own = wanted.replace("the paper found", "you expected").replace("the paper:", "your expectation:")
    assert ContrastResult("x", "y", "factor", expected, comparison, ()).verdict == own


def test_no_verdict_where_interval_and_p_value_disagree():
    # -20.8 +- 9.6 points, p 0.121: a bootstrap interval of 12 problems left out 0
    comparison = PairedComparison(-0.208, 0.096, (-0.417, -0.042), 0.95, 0.121, 12, 2)
    assert comparison.order == "a~b"
    assert ContrastResult("x", "y", "factor", "a>b", comparison, ()).agreement == "undecided"


def test_page_is_well_formed_and_loads_nothing(run):
    page = Page(run[2])
    assert page.open == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "object", "form", "a"})
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "content" in a]
    script = run[2].rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert any("default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy for policy in policies)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://(?!www\.w3\.org)", script)
    style = run[2].partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_page_shows_hostile_text_as_text(run):
    page = run[2]
    assert page.count("<script") == 2 and "&lt;script&gt;alert(" in page  # as the notes of the configuration have it
    assert not set(page) & set("\x1b\u202e\u2028\u2029") and "\\u001b[31mred\\u202eabc" in page
    sample = data_of(page)["samples"][1]
    assert sample["response"] == visible(HOSTILE) and sample["detail"] == f"judge: {visible(HOSTILE)}"


def data_of(page):
    """Return the data of the script; it has neither "<" nor anything but ASCII."""
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert text.isascii() and "<" not in text
    return json.loads(text)


def test_stages_have_panels_numbers_and_facts(run):
    stages = {stage["name"]: stage for stage in data_of(run[2])["stages"]}
    assert list(stages) == ["teacher_base", "teacher_grpo", "forward_kl", "opd"]
    panels = {panel["title"]: panel for panel in stages["teacher_grpo"]["panels"]}
    assert list(panels) == ["Reward", "KL", "Loss", "Entropy", "Response length"]
    line = panels["Reward"]["lines"][0]
    assert line["x"] == [step for step in range(1, 61) if step != 5] and len(line["y"]) == 59
    assert ["state", "done"] in stages["opd"]["facts"] and ["steps", "60"] in stages["opd"]["facts"]
    assert set(stages["opd"]["latest"]) == {"reward", "kl", "entropy", "response_length", "loss"}


def test_table_of_arms_has_the_shares_of_verdicts(run):
    arm = dataclasses.replace(run[1].arms[0], verdicts={"correct": 0.612, "<b>": 0.388})
    page = html_page.render_html(dataclasses.replace(run[1], arms=(arm, *run[1].arms[1:])), {})
    assert "<td>correct 61.2 %, &lt;b&gt; 38.8 %</td>" in page and page.count("<th>verdicts of the samples</th>") == 1
    assert "verdicts of the samples" not in run[2]  # none of its arms has any


def test_page_says_everything(run):
    text = " ".join("".join(Page(run[2]).text).split())
    assert data_of(run[2])["samples"][0]["prompt"] == "12 + 5 - 3 * 4 + 2 ="
    for needle in (
        "6 contrasts: 2 as the paper found, 1 not distinguishable from zero, 1 against the paper, "
        "1 without an expectation, 1 refused.",
        "AGAINST the paper: b is better; the paper found a better",
        "not distinguishable from zero on these problems",
        "the arms also differ in stage3.steps: 80",
        'opd.teacher: "teacher_grpo" against "teacher_base"',
        "prompts pool/1H cdcdcdcdcdcd",
        "resumed 1 ×",
        "held out until here",
        "above the window's 0.90",
        "source_digest",
        '"lr": 0.001',
    ):
        assert needle in text, needle


def test_plots_are_written_as_png(run):
    plots = sorted(path.name for path in (run[0] / "plots").iterdir())
    stages = [f"stage_{name}.png" for name in ("forward_kl", "opd", "teacher_base", "teacher_grpo")]
    assert plots == ["arms.png", "contrasts.png", *stages]
    assert all((run[0] / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_markdown_and_terminal_agree(run):
    _, results, _ = run
    markdown = render_markdown(results)
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(tables) == (2 + 7) + (2 + 5) + (2 + 1)
    console = Console(file=io.StringIO(), width=200)
    print_report(results, console)
    terminal = console.file.getvalue()
    for arm in results.arms:
        number = f"{100 * arm.avg.mean:.1f} ± {100 * arm.avg.std_err:.1f}"
        assert f"| {arm.name} | {number} |" in markdown and number in terminal
    assert "AGAINST the paper" in markdown and "refused: half_bridge_stage3 - half_bridge_replay" in terminal


def test_markdown_cannot_be_injected(run):
    from dataclasses import replace

    results = replace(run[1], description="a | b <img src=x> [x](http://example.invalid)\n# head")
    line = render_markdown(results).splitlines()[2]
    assert line == r"a \| b \<img src=x\> \[x\](http://example.invalid) # head"


def test_a_run_without_results_still_has_a_report(tmp_path):
    empty = RunResults("empty", "", 0, 1.0, (), ())
    page = Page(write_report(tmp_path, empty).read_text())
    assert page.open == [] and "No arm has been evaluated." in "".join(page.text)
    print_report(empty, Console(file=io.StringIO()))
    one = ArmResult.from_evaluation("a $\\frac$ <b>", "one", fake_evaluation("one", 0.5, n=1))
    write_report(tmp_path, RunResults("one", "", 0, 1.0, (one,), ()))
    assert read_json(tmp_path / "results.json")["arms"]["a $\\frac$ <b>"]["std_err"] is None


def test_of_very_many_arms_and_stages_the_first_are_drawn(tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(report, "_DRAWN_ARMS", 4)
    monkeypatch.setattr(report, "_DRAWN_STAGES", 2)
    monkeypatch.setattr(report, "plot_arms", lambda *arms: rows.extend(map(len, arms)) or b"")
    monkeypatch.setattr(report, "plot_contrasts", lambda contrasts: rows.append(len(contrasts)) or b"")
    results = fake_results(tmp_path)
    plots = report.make_plots(results)
    assert rows == [4, 0, 4] and {name for name in plots if name.startswith("stage/")} == {
        "stage/teacher_base",
        "stage/teacher_grpo",
    }
    assert render_markdown(results).count("half_bridge_stage3") >= 2  # the tables have all


def test_visible_cuts_and_spells_out():
    assert visible("a\tb\nc\rd\u200be\ud800") == "a\tb\nc\\u000dd\\u200be\\ud800"
    text = visible("x" * (MAX_SHOWN_CHARACTERS + 1234))
    assert text.endswith("x\n… (1,234 more characters)")


def test_running_mean_skips_gaps():
    values = np.array([1.0, math.nan, 3.0, math.nan, math.nan, math.nan])
    result = running_mean(values, 1)
    assert result[:4].tolist() == [1.0, 2.0, 3.0, 3.0] and np.isnan(result[4:]).all()


def test_stage_without_curves_has_no_plot():
    assert plot_stage([]) is None and plot_stage([{"step": 1, "seconds": 2.0, "loss": None}]) is None
    assert plot_stage([{"step": 1, "loss": 2.0}]).startswith(b"\x89PNG")


def test_the_histogram_of_gaps_is_the_mean_of_the_steps_that_measured():
    rows = [
        {"step": 1, "mismatch/hist/0": 0.5, "mismatch/hist/1e-06": 0.5},
        {"step": 2, "mismatch/hist/1e-06": 0.8, "mismatch/hist/0.0003": 0.2},
        {"step": 3, "loss": 1.0},  # cached responses only
    ]
    assert gap_shares(rows) == pytest.approx({0.0: 0.25, 1e-6: 0.65, 3e-4: 0.1})
    assert list(gap_shares(rows)) == sorted(gap_shares(rows)) and gap_shares(rows[2:]) == {}
    assert plot_diagnostics(rows).startswith(b"\x89PNG") and plot_diagnostics(rows[2:]) is None


def test_domains_have_a_line_each():
    rows = [{"step": step, "domain/math/kl": step, "domain/code/kl": 2 * step} for step in range(1, 4)]
    lines = _lines_of(rows)
    assert {key: label for key, (_, label) in lines["KL by domain"].items()} == {
        "domain/math/kl": "math",
        "domain/code/kl": "code",
    }
    assert not lines["reward by domain"] and plot_diagnostics(rows).startswith(b"\x89PNG")
