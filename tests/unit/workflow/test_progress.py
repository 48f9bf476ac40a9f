"""Progress of stages, read from their metrics files, as bars on a terminal and as plain lines elsewhere."""

import io
import json
import math

import pytest
from rich.console import Console

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.formatting import format_seconds
from megatron_s2d.train.metrics import MetricsLog
from megatron_s2d.workflow.progress import Progress, last_row


@pytest.fixture
def stage(tmp_path):
    return StageDirectory(tmp_path / "grpo")


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def test_last_row_ignores_the_line_being_written(stage):
    assert last_row(stage.metrics_path) is None
    stage.path.mkdir()
    stage.metrics_path.write_text('{"step": 1')
    assert last_row(stage.metrics_path) is None
    rows = [json.dumps({"step": step, "text": "x" * 999}) for step in range(1, 200)]
    stage.metrics_path.write_text("\n".join(rows) + '\n{"step": 200, ')
    assert last_row(stage.metrics_path)["step"] == 199


def test_plain_progress_follows_several_stages(tmp_path):
    stages = [StageDirectory(tmp_path / name) for name in ("a", "b")]
    logs = [MetricsLog(stage) for stage in stages]
    logs[1].write(1, {"loss": 1.0})  # b resumes after a kill
    console = plain_console()
    with Progress(console, interval=60.0) as progress:
        progress.add("a", 10, stages[0])
        progress.add("b[x]", 10, stages[1])
        progress.refresh()
        assert console.file.getvalue() == ""
        logs[0].write(1, {"loss": 2.0, "reward": 0.123456, "tokens_per_second": 12345.6})
        logs[1].write(2, {"loss": math.nan})
        progress.refresh()
        logs[0].write(2, {"loss": 1.0})
        progress.refresh()  # too soon for a second line
        progress.finish("a", "done in 3s")
        logs[1].write(10, {"loss": 1.0})
        progress.refresh()
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("a: 1/10, 12,346 tokens/s, reward 0.123, loss 2, ") and lines[0].endswith(" left")
    assert lines[1].startswith("b[x]: 2/10, ") and lines[1].endswith("s left")
    assert lines[2:] == ["a: done in 3s", "b[x]: 10/10, loss 1"]


def test_notes_inside_a_round_are_shown_once_each(stage):
    stage.path.mkdir()
    console = plain_console()
    with Progress(console, interval=0.0) as progress:
        progress.add("evaluation", 2, stage)
        progress.refresh()
        stage.note("3 of 8 responses")
        progress.refresh()
        progress.refresh()
        stage.note("4 of 8 responses")  # within a second: not written
        progress.refresh()
    assert console.file.getvalue() == "evaluation: 0/2, 3 of 8 responses\n"


def test_warnings_of_a_stage_are_shown_once_and_not_those_of_earlier_runs(stage):
    stage.path.mkdir()
    stage.warn("of an earlier run")
    console = plain_console()
    with Progress(console) as progress:
        progress.add("s", 4, stage)
        stage.warn("tracking: wandb: \x1b[31mno key")
        progress.refresh()
        progress.refresh()
    assert console.file.getvalue() == "s: warning: tracking: wandb: \\x1b[31mno key\n"


def test_response_tokens_per_second_are_preferred(stage):
    console = plain_console()
    with Progress(console) as progress:
        progress.add("s", 4)
        progress.update("s", 2, {"tokens_per_second": 5.0, "response_tokens_per_second": 3.0})
    assert "3 response tokens/s" in console.file.getvalue() and "5 tokens" not in console.file.getvalue()


def test_terminal_progress_draws_bars(stage):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with Progress(console) as progress:
        progress.add("[odd] name", 4)
        progress.update("[odd] name", 2, {"tokens_per_second": 5.0})
    text = console.file.getvalue()
    assert "[odd] name" in text and "2/4" in text and "5 tokens/s" in text


@pytest.mark.parametrize("seconds,text", [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_remaining_time_does_not_count_steps_before_the_resume(stage, monkeypatch):
    log = MetricsLog(stage)
    log.write(50, {"loss": 1.0})
    clock = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr("megatron_s2d.workflow.progress.time.monotonic", lambda: next(clock))
    console = plain_console()
    progress = Progress(console)
    progress.add("s", 60, stage)
    progress.update("s", 55, {})
    assert console.file.getvalue() == "s: 55/60, 10s left\n"
