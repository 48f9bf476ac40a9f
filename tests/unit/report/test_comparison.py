"""Runs side by side in one page."""

import json
import sys
from pathlib import Path

import pytest

from megatron_s2d.cli import main
from megatron_s2d.errors import UserError
from megatron_s2d.report.comparison import merged_panels, run_labels

sys.path.insert(0, str(Path(__file__).parent))
from test_report import Page, data_of, fake_stage


def test_curves_of_equal_stages_share_panels(tmp_path, capsys):
    runs = [tmp_path / "<b>one", tmp_path / "two"]
    fake_stage(runs[0], "opd", "opd", 20, ["kl", "loss"])
    fake_stage(runs[1], "opd", "opd", 30, ["kl", "reward"])
    fake_stage(runs[1], "grpo", "grpo", 10, ["reward"])
    (runs[1] / "results.json").write_text('{"arms": {"bridge": {"avg_at_k": 0.5, "std_err": 0.01}}}')
    assert main(["report", *map(str, runs)]) == 0
    assert str(runs[0] / "comparison.html") in capsys.readouterr().out.replace("\n", "")
    text = (runs[0] / "comparison.html").read_text()
    page = Page(text)
    assert page.open == [] and "<b>" not in text and "50.0 ± 1.0" in "".join(page.text)
    stages = {stage["name"]: stage for stage in data_of(text)["stages"]}
    panels = {panel["title"]: panel for panel in stages["opd"]["panels"]}
    assert [line["label"] for line in panels["KL"]["lines"]] == ["<b>one", "two"]
    assert [len(line["x"]) for line in panels["KL"]["lines"]] == [19, 29]  # step 5 has none
    assert [line["label"] for line in panels["Reward"]["lines"]] == ["two"]
    assert ["<b>one", "no such stage"] in stages["grpo"]["facts"]


def test_labels_are_as_short_as_they_can_be(tmp_path):
    assert run_labels([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]
    assert run_labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    with pytest.raises(UserError, match="named twice"):
        run_labels([tmp_path / "a", tmp_path / "b/../a"])


def test_a_loss_that_is_the_kl_is_compared_with_kl():
    line = {"label": "mean", "x": [1, 2], "y": [1.0, 2.0]}
    panels = {
        "a": [{"group": "Curves", "title": "KL, which is the loss", "unit": "", "lines": [line, line]}],
        "b": [{"group": "Curves", "title": "KL", "unit": "", "lines": [line]},
              {"group": "x", "title": "places", "unit": "", "lines": [line], "x_labels": ["0"]}],
    }  # fmt: skip
    merged = merged_panels(panels)
    assert json.loads(json.dumps(merged)) == [
        {"group": "Curves", "title": "KL", "unit": "", "lines": [line | {"label": "a"}, line | {"label": "b"}]}
    ]
