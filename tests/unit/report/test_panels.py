"""What the report page draws of a stage, and how it stays small."""

import math

import pytest

from megatron_s2d.artifacts.files import append_line
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.report import page_data
from megatron_s2d.report.page_data import bounded, sample_data, token_facts, validation_rows
from megatron_s2d.report.panels import MAX_POINTS, latest, stage_panels
from megatron_s2d.report.results import RolloutExample


def by_title(rows, validations=()):
    return {panel["title"]: panel for panel in stage_panels(rows, validations)}


def test_a_loss_that_is_the_kl_is_drawn_once():
    rows = [{"step": step, "kl": 1 / step, "loss": 1 / step} for step in range(1, 9)]
    assert list(by_title(rows)) == ["KL, which is the loss"]
    other = [row | {"loss": 2 / row["step"]} for row in rows]
    assert list(by_title(other)) == ["KL", "Loss"]


def test_a_single_row_is_numbers_and_no_dot():
    rows = [{"step": 1, "loss": 0.5, "kl_by_position/0": 1.0, "kl_by_position/1": 2.0, "time": 7.0, "kl": None}]
    assert stage_panels(rows) == [] and stage_panels([]) == []
    assert latest(rows) == {"loss": 0.5, "kl_by_position/0": 1.0, "kl_by_position/1": 2.0} and latest([]) == {}


def test_long_lines_are_means_of_neighbours():
    rows = [{"step": step, "grad_norm": float(step)} for step in range(1, 8001)]
    line = by_title(rows)["Gradient norm"]["lines"][0]
    assert len(line["x"]) == MAX_POINTS and line["x"][0] == 10.5 and line["y"][0] == 10.5
    assert line["y"][-1] == pytest.approx(7990.5)


def test_phases_verdicts_domains_and_places():
    rows = [
        {"step": step, "timing_s/step": 3.0, "timing_s/train": 2.0, "verifier/correct": step / 8,
         **({"verifier/wrong": 0.5} if step % 2 else {}), "domain/math/kl": 0.1 * step, "domain/code/kl": 0.2,
         "kl_by_position/0": 4.0 / step, "kl_by_position/1": 1.0, "kl_by_position/2": math.nan,
         "mismatch/hist/0": 0.75, "mismatch/hist/1e-06": 0.25, "policy_lag": step % 3}
        for step in range(1, 9)
    ]  # fmt: skip
    panels = by_title(rows)
    assert [line["label"] for line in panels["Seconds of a step by phase"]["lines"]] == ["step", "train"]
    wrong = next(line for line in panels["Verdicts"]["lines"] if line["label"] == "wrong")
    assert wrong["y"] == [0.5, 0, 0.5, 0, 0.5, 0, 0.5, 0]  # a step without the verdict had none
    assert [line["label"] for line in panels["KL by domain"]["lines"]] == ["code", "math"]
    places = panels["KL by position in the response"]
    assert places["x_labels"] == ["0", "1", "2-3"]
    assert [line["y"] for line in places["lines"]] == [[3.0, 1.0], [pytest.approx(0.53571), 1.0]]
    assert panels["Tokens by gap to the engine"]["x_labels"] == ["0", "1e-06"]
    assert panels["Age of the sampling weights"]["group"] == "Weight push and staleness"


def test_validation_has_standard_errors_and_the_kept_step(tmp_path):
    directory = StageDirectory(tmp_path)
    assert validation_rows(directory) == []
    for step, rate, best in ((0, 0.25, True), (4, 0.5, True), (8, 0.375, False)):
        part = f'{{"pass_rate": {rate}, "pass_rate_std_err": {"null" if step == 0 else 0.1}}}'
        append_line(
            tmp_path / "validation.jsonl",
            f'{{"step": {step}, "data": {{"held_out": {part}}}, "best": {str(best).lower()}}}',
        )
    rows = [{"step": step, "reward": step / 10} for step in range(1, 9)]
    panel = stage_panels(rows, validation_rows(directory))[0]
    curve, reward = panel["lines"]
    assert (panel["title"], panel["mark"], reward["label"]) == ("Validation", 4, "reward in training")
    assert (curve["x"], curve["y"], curve["err"]) == ([0, 4, 8], [0.25, 0.5, 0.375], [None, 0.1, 0.1])


def test_tokens_say_probabilities():
    token = {"text": "x", "student_log_prob": math.log(0.25), "teacher_log_prob": math.log(0.5), "log_ratio": 0.6931,
             "advantage": -0.5}  # fmt: skip
    assert token_facts(token) == "student 25 %, teacher 50 %, log teacher - log student +0.693, advantage -0.500"
    example = RolloutExample("s", "p", "q", "r", None, 1.0, "", "stop", tokens=[token, {"text": "\u202e"}])
    tokens = sample_data(example)["tokens"]
    assert tokens[0]["color"] == "rgba(213, 94, 0, 0.50)" and tokens[1] == {"text": "\\u202e", "facts": "", "color": ""}


def test_samples_are_bounded(monkeypatch):
    monkeypatch.setattr(page_data, "MAX_SAMPLE_CHARACTERS", 1000)
    samples = [{"id": index, "text": "x" * 100} for index in range(100)]
    kept = bounded(samples)
    assert 8 <= len(kept) <= 10 and kept[0]["id"] == 0 and kept[-1]["id"] > 80
