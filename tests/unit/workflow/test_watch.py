"""The view of a run in a terminal: states, curves, files that are half there, and text that must not act."""

import io
import json
import os
import time

import pytest
from rich.console import Console

from megatron_s2d.cli import main
from megatron_s2d.config.base import dump
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.workflow.watch import MetricsReader, RunView, plain, sparkline, watch

EVIL = "\x1b]0;owned\x07\x1b[31m ‮ red [bold]x[/bold]\r\nnext"


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path):
    """A run with a finished stage, one that runs, one that waits, and an evaluation."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(dump(load_workflow("configs/smoke.yaml"))))
    rows = [
        {"step": step, "loss": 2 / step, "kl": 1 / step, "reward": step / 10,
         "timing_s/step": 30.0, "response_tokens_per_second": 1234.0, "time": 1.0}
        for step in range(1, 5)
    ]  # fmt: skip
    write_rows(run / "stages/teacher_base/metrics.jsonl", rows)
    (run / "stages/teacher_base/finished.json").write_text('{"seconds": 90.0}')
    write_rows(run / "stages/rl_teacher/metrics.jsonl", rows)
    (run / "stages/rl_teacher/progress.txt").write_text(f"3 of 8 {EVIL}")
    (run / "stages/rl_teacher/warnings.txt").write_text(f"tracking: {EVIL}\n")
    sample = {"step": 4, "prompt": EVIL, "response": EVIL, "verifier_label": EVIL}
    write_rows(run / "stages/rl_teacher/rollouts.jsonl", [sample])
    return run


def line_of(text, name):
    return next(line for line in text.splitlines() if line.startswith(name))


def test_states_curves_speed_and_remaining_time(run_dir):
    text = plain(RunView(run_dir).render(160), 160)
    assert "smoke: 1 of 12 done" in text
    done, running = line_of(text, "teacher_base"), line_of(text, "rl_teacher")
    assert "done" in done and "1m30s" in done
    assert "running" in running and "4/8" in running and "1,234" in running
    assert running.rstrip().endswith("2m00s")  # four of eight steps, 30 seconds each
    assert "▁▃▆█ 0.4" in running and "0.25" in running and " 0.5" in running
    assert "waiting" in line_of(text, "opd") and "waiting" in line_of(text, "evaluations/stage3")
    old = time.time() + 3600
    assert "stopped" in line_of(plain(RunView(run_dir).render(160, old), 160), "rl_teacher")


def test_text_of_models_cannot_act_on_the_terminal(run_dir):
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
        watch(run_dir, console, once=True, interval=0)
        text = console.file.getvalue()
        assert "\\x1b]0;owned\\x07" in text and "[bold]x[/bold]" in text
        assert not set(text) & set("\x1b\x07\r‮")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_width_is_kept(run_dir, width):
    assert max(map(len, plain(RunView(run_dir).render(width), width).splitlines())) <= width


def test_half_written_directories_are_shown(run_dir, tmp_path):
    with open(run_dir / "stages/rl_teacher/metrics.jsonl", "a") as file:
        file.write('nonsense\n[1]\n{"step": null}\n{"step": 5, "loss": NaN}\n{"step": 6, "lo')
    assert " 5/8 " in line_of(plain(RunView(run_dir).render(160), 160), "rl_teacher")
    (run_dir / "config.json").write_text('{"name": "sm')
    (run_dir / "stages/teacher_base/finished.json").write_text("")
    assert "teacher_base" in plain(RunView(run_dir).render(160), 160)
    with pytest.raises(UserError, match="not a run directory"):
        RunView(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        RunView(tmp_path / "none")


def test_only_new_rows_are_read_and_a_resume_starts_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [{"step": step} for step in range(1, 6)])
    reader = MetricsReader(path)
    reader.refresh()
    first = reader.rows[0]
    with open(path, "a") as file:
        file.write('{"step": 6}\n{"st')
    reader.refresh()
    assert [row["step"] for row in reader.rows] == [1, 2, 3, 4, 5, 6] and reader.rows[0] is first
    write_rows(tmp_path / "new", [{"step": step} for step in range(1, 9)])  # replaced, and longer
    os.replace(tmp_path / "new", path)
    reader.refresh()
    assert [row["step"] for row in reader.rows] == list(range(1, 9)) and reader.rows[0] is not first


def test_sparkline():
    assert sparkline([], 8) == "" and sparkline([1.0, 1.0], 8) == "▁▁"
    assert sparkline(list(range(8)), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(list(range(8000)), 4) == "▁▃▆█"
    assert len(sparkline(list(range(11)), 4)) == 4


def test_command_prints_once_as_plain_text(run_dir, capsys):
    assert main(["watch", str(run_dir), "--once"]) == 0
    text = capsys.readouterr().out
    assert "rl_teacher" in text and "\x1b" not in text


def test_without_a_terminal_changes_are_printed_until_the_run_is_finished(run_dir, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=False, width=160)
    calls = []

    def sleep(_):
        calls.append(1)
        if len(calls) == 2:
            (run_dir / "results.json").write_text("{}")
            monkeypatch.setattr(RunView, "is_finished", lambda self: True)

    monkeypatch.setattr("megatron_s2d.workflow.watch.time.sleep", sleep)
    monkeypatch.setattr("megatron_s2d.workflow.watch.time.time", lambda: 0.0)
    watch(run_dir, console, once=False, interval=1)
    assert len(calls) == 2 and console.file.getvalue().count("smoke: 1 of 12 done") == 1
