"""Rows of metrics.jsonl over a resume, and the timer."""

import math
import time

import pytest

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.train.metrics import MetricsLog, Timer, timed


@pytest.fixture
def stage(tmp_path):
    return StageDirectory(tmp_path / "grpo")


def test_rows_beyond_the_checkpoint_are_dropped_on_resume(stage):
    log = MetricsLog(stage)
    before = time.time()
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": 1.0 / step, "kl": math.nan})
    with open(stage.metrics_path, "a") as file:
        file.write('{"step": 5, "lo')  # the process is killed here
    assert [row["step"] for row in stage.metrics()] == [1, 2, 3, 4]
    resumed = MetricsLog(stage, step=2)
    resumed.write(3, {"loss": 9.0})
    rows = stage.metrics()
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert rows[0]["kl"] is None and rows[0]["time"] == pytest.approx(before, abs=60)
    with pytest.raises(ValueError, match="step 3"):
        resumed.write(3, {"loss": 1.0})


def test_timer_sections_add_up_and_reset():
    timer = Timer()
    for _ in range(2):
        with timer.section("generate"):
            time.sleep(0.01)
    with pytest.raises(RuntimeError), timer.section("update"):
        raise RuntimeError
    times = timer.collect_and_reset()
    assert 0.02 <= times["timing_s/generate"] <= times["timing_s/step"] and 0 <= times["timing_s/update"] < 0.02
    assert set(timer.collect_and_reset()) == {"timing_s/step"}


def test_timed_adds_to_the_open_section_and_the_outer_one_does_not_count_it():
    with timed("teacher"):
        pass  # no timer: nothing happens
    timer = Timer()
    with timer.section("rollout"):
        with timed("teacher"):
            time.sleep(0.03)
        with timed("teacher"), timed("score"):
            time.sleep(0.02)
    times = timer.collect_and_reset()
    assert times["timing_s/teacher"] >= 0.03 and times["timing_s/score"] >= 0.02
    parts = [value for name, value in times.items() if name != "timing_s/step"]
    assert sum(parts) <= times["timing_s/step"] + 1e-6  # nothing is counted twice
