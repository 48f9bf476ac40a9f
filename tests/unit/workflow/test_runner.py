"""The runner starts jobs whose inputs are finished, a few at a time, and stops the others when one fails."""

import io
import multiprocessing
import os
import signal
import types
from pathlib import Path

import pytest
from rich.console import Console

from megatron_s2d.errors import UserError
from megatron_s2d.workflow.runner import _Runner
from megatron_s2d.workflow.status import Interrupted, JobCrashed, JobOutcome


class Rank:
    """A rank that ends when the test says so; its sentinel is ready then."""

    def __init__(self, outcome):
        self._outcome, self.stopped, self.ended = outcome, False, False
        self.sentinel, self._sender = multiprocessing.Pipe(duplex=False)

    def end(self):
        self.ended = True
        self._sender.close()

    def outcome(self):
        return self._outcome if self.ended else None

    def request_stop(self):
        self.stopped = True
        self._outcome = JobOutcome("stopped", "stopped after step 1")
        self.end()

    def kill(self):
        self.end()

    def join(self):
        self.sentinel.close()


class Server:
    """Starts one rank a job. Jobs end as soon as ``together`` of them run, and those of ``ends_at_once`` earlier."""

    def __init__(self, outcomes=None, together=1, ends_at_once=()):
        self.outcomes, self.together, self.ends_at_once = outcomes or {}, together, ends_at_once
        self.started, self.ranks, self.at_once = [], {}, []

    def start(self, config, job, run_dir):
        self.ranks[job.id] = rank = Rank(self.outcomes.get(job.id, JobOutcome("finished")))
        self.started.append(job.id)
        running = {name: other for name, other in self.ranks.items() if not other.ended}
        self.at_once.append(sorted(running))
        for name, other in running.items():
            if len(running) >= self.together or name in self.ends_at_once:
                other.end()
        return [rank]


def job(name, *inputs, is_pending=True):
    nowhere = Path("/nowhere")
    directory = types.SimpleNamespace(
        metrics_path=types.SimpleNamespace(),
        note_path=nowhere,
        warnings_path=nowhere,
        validation_path=nowhere,
        validations=list,
    )
    return types.SimpleNamespace(id=name, inputs=dict.fromkeys(inputs, "key"), is_pending=is_pending, total=1,
                                 directory=directory, is_stage=False, stage=name)  # fmt: skip


def run(jobs, server, tmp_path, monkeypatch, max_parallel_stages=1):
    monkeypatch.setattr("megatron_s2d.workflow.progress.last_row", lambda path: None)
    config = types.SimpleNamespace(max_parallel_stages=max_parallel_stages)
    _Runner(config, tmp_path, jobs, {}, server, Console(file=io.StringIO())).run()


def test_a_job_starts_after_all_of_its_inputs(tmp_path, monkeypatch):
    """The list is not in order on purpose: only the inputs count."""
    jobs = [job("end", "left", "right"), job("left", "base"), job("right", "other"), job("other"), job("base")]
    server = Server()
    run(jobs, server, tmp_path, monkeypatch)
    position = {name: index for index, name in enumerate(server.started)}
    assert len(position) == 5
    for item in jobs:
        assert all(position[name] < position[item.id] for name in item.inputs)
    assert all(len(names) == 1 for names in server.at_once)


def test_finished_jobs_count_as_inputs_and_do_not_start(tmp_path, monkeypatch):
    server = Server()
    run([job("base", is_pending=False), job("end", "base")], server, tmp_path, monkeypatch)
    assert server.started == ["end"]


def test_at_most_the_configured_number_runs_at_a_time(tmp_path, monkeypatch):
    server = Server(together=2)
    run([job(name) for name in "abcd"], server, tmp_path, monkeypatch, max_parallel_stages=2)
    assert server.at_once == [["a"], ["a", "b"], ["c"], ["c", "d"]]


@pytest.mark.parametrize(("status", "error"), [("error", UserError), ("crash", JobCrashed)])
def test_a_failure_stops_the_others_and_starts_nothing_more(tmp_path, monkeypatch, status, error):
    server = Server({"bad": JobOutcome(status, "it failed")}, ends_at_once={"bad"}, together=3)
    with pytest.raises(error, match="bad: it failed"):
        run([job("good"), job("bad"), job("next", "good")], server, tmp_path, monkeypatch, max_parallel_stages=2)
    assert server.started == ["good", "bad"] and server.ranks["good"].stopped


class InterruptedServer(Server):
    """Ctrl-C comes while ``name`` runs, which then ends by itself (``outcome``) or is deaf until it is killed."""

    def __init__(self, name, outcome=None):
        super().__init__(together=2)
        self.name, self.final, self.killed = name, outcome, []

    def start(self, config, job, run_dir):
        ranks = super().start(config, job, run_dir)
        if job.id == self.name:
            (rank,) = ranks

            def stop():
                rank.stopped = True
                if self.final is not None:
                    rank._outcome = self.final
                    rank.end()

            def kill():
                self.killed.append(job.id)
                rank._outcome = JobOutcome("crash", "killed")
                rank.end()

            rank.request_stop, rank.kill = stop, kill
            os.kill(os.getpid(), signal.SIGINT)
        else:
            ranks[0].end()
        return ranks


def test_ctrl_c_ends_an_evaluation_that_does_not_end_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_s2d.workflow.runner._STOP_SECONDS", 0.0)
    server = InterruptedServer("evaluation")
    with pytest.raises(Interrupted):
        run([job("base"), job("evaluation", "base"), job("next", "evaluation")], server, tmp_path, monkeypatch)
    assert server.killed == ["evaluation"] and server.started == ["base", "evaluation"]


def test_ctrl_c_at_the_end_of_the_last_job_does_not_claim_to_have_stopped_it(tmp_path, monkeypatch):
    server = InterruptedServer("last", JobOutcome("finished"))
    run([job("base"), job("last", "base")], server, tmp_path, monkeypatch)
    assert server.ranks["last"].stopped
    server = InterruptedServer("base", JobOutcome("finished"))
    with pytest.raises(Interrupted):
        run([job("base"), job("last", "base")], server, tmp_path, monkeypatch)
