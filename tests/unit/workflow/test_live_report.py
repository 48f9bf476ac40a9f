"""The page of a run that goes on: when it is written, what it has, and that it cannot stop the run."""

import json
import types

import pytest

from megatron_s2d.artifacts.files import append_line
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.errors import UserError
from megatron_s2d.workflow import collect_results as collecting
from megatron_s2d.workflow import live_report
from megatron_s2d.workflow.live_report import LiveReport
from megatron_s2d.workflow.run_samples import run_samples


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(live_report.time, "monotonic", lambda: clock.now)
    return clock


def test_pages_take_a_small_share_of_the_time(tmp_path, monkeypatch, clock):
    written = []

    def write(self):
        written.append(clock.now)
        clock.now += 2.0

    monkeypatch.setattr(LiveReport, "write", write)
    page = LiveReport(tmp_path, [], None, print)
    for now in (1, 29, 31, 60, 130, 134, 140):
        clock.now = max(clock.now, now)
        page.poll()
    assert written == [31, 134]  # two seconds each: the next one a hundred seconds later


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, clock):
    def fail(self):
        raise UserError("metrics.jsonl:\n damaged")

    monkeypatch.setattr(LiveReport, "write", fail)
    said = []
    page = LiveReport(tmp_path, [], None, said.append)
    for clock.now in (31.0, 1000.0):
        page.poll()
    assert said == ["warning: report.html is written at the end only (UserError: metrics.jsonl: damaged)"]


def test_stages_that_run_or_wait_have_their_state(tmp_path):
    directory = StageDirectory(tmp_path / "stages/opd")
    append_line(directory.metrics_path, json.dumps({"step": 1, "timing_s/step": 2.5}))
    job = types.SimpleNamespace(stage="opd", directory=directory, total=4, is_pending=True)
    run = collecting._stage_run(job, live=True)
    assert (run.state, run.seconds, run.total) == ("running", 2.5, 4)
    job.directory = StageDirectory(tmp_path / "stages/none")
    assert collecting._stage_run(job, live=True).state == "waiting"


def test_samples_of_all_files_with_the_number_of_all(tmp_path):
    directory = StageDirectory(tmp_path / "evaluations/opd")
    row = {"step": 1, "problem_id": "p1", "sample": 0, "reward": 1.0, "verifier_label": "correct"}
    row |= {"finish_reason": "stop"}
    lines = [json.dumps(row | {"response": str(number)}) for number in range(3000)]
    directory.path.mkdir(parents=True)
    (directory.path / "responses.jsonl").write_text("\n".join(lines) + "\n")
    table = [types.SimpleNamespace(text="1 + 1 =")]
    prompts = type("Table", (), {"values": lambda self, _: ["p1"], "__getitem__": lambda self, i: table[i]})()
    job = types.SimpleNamespace(stage="opd", directory=directory, is_stage=False, pass_rate_check=None)
    samples = run_samples([job], types.SimpleNamespace(prompts={"pool": prompts}))
    assert samples.total == 3000 and len(samples.examples) == 1200
    first, last = samples.examples[0], samples.examples[-1]
    assert (first.prompt, first.response, first.source, first.step) == ("1 + 1 =", "0", "evaluation", 1)
    assert int(last.response) > 2990
