"""Signals that end a command while no jobs run: one line, exit code 130, handlers as before."""

import os
import signal
import threading
import time

import pytest

from megatron_s2d import cli
from megatron_s2d.workflow.stop_signals import stop_signals_raised


@pytest.fixture
def ignored():
    """Signals that would end the tests are collected here instead."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_command_says_which_signal_ended_it(number, ignored, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    handler, cleanup = signal.getsignal(number), []

    def command(options):
        try:
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        finally:
            os.kill(os.getpid(), number)  # a second one does not end the cleanup
            cleanup.append(True)

    monkeypatch.setattr(cli.run, "_run", command)
    assert cli.main(["run", "any.yaml"]) == 130
    assert capsys.readouterr().err == f"stopped by {number.name}; run the same command again to resume\n"
    assert cleanup and not ignored and signal.getsignal(number) is handler


def test_ranks_of_a_launcher_answer_by_themselves(ignored, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli.run, "_run", lambda options: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["run", "any.yaml"]) == 0 and ignored == [signal.SIGTERM]


def test_forked_processes_end_and_other_threads_have_no_handlers(ignored):
    with stop_signals_raised():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    entered = []

    def enter():
        with stop_signals_raised():
            entered.append(signal.getsignal(signal.SIGTERM))

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [handler]
