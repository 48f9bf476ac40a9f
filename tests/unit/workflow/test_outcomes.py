"""How a rank's end is reported: full and read-only disks, and memory that the system refuses, are one line each."""

import errno
import os

import pytest

torch = pytest.importorskip("torch")

from megatron_s2d.workflow import worker
from megatron_s2d.workflow.status import RESUME_HINT
from megatron_s2d.workflow.worker import capture_outcome


def raises(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM])
def test_disk_that_fails_anywhere_is_an_error_of_the_user(code):
    outcome = capture_outcome(raises(OSError(code, os.strerror(code), "runs/a/log.txt")))
    assert outcome.status == "error" and outcome.message.startswith(f"runs/a/log.txt: {os.strerror(code)}; ")
    assert "\n" not in outcome.message and "Traceback" in outcome.traceback


@pytest.mark.parametrize(
    "action",
    [
        lambda: torch.empty(2**62, dtype=torch.uint8),
        raises(MemoryError()),
        raises(RuntimeError("can't start new thread")),
        raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        raises(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
    ],
)
def test_memory_that_the_system_refuses_is_an_error_of_the_user(action):
    outcome = capture_outcome(action)
    assert outcome.status == "error", outcome
    assert outcome.message.startswith("out of memory") and "max_tokens_per_gpu" in outcome.message
    assert outcome.message.endswith(RESUME_HINT) and "\n" not in outcome.message


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O"), RuntimeError("shapes differ"), KeyError("x")])
def test_other_exceptions_are_crashes(error):
    assert capture_outcome(raises(error)).status == "crash"


def test_log_that_cannot_be_opened_is_reported_by_the_rank(tmp_path, monkeypatch):
    """Before: a traceback on the terminal and a rank that exited with code 1."""
    sent = []

    def refuse(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(worker, "exit_with_runner", lambda pipe: None)
    monkeypatch.setattr(worker.os, "open", refuse)

    class Job:
        class directory:
            path = tmp_path

    class Pipe:
        send = staticmethod(sent.append)

    class Address:
        rank = 0

    worker.run_rank(None, Job, tmp_path, Address, Pipe)
    (outcome,) = sent
    assert outcome.status == "error" and f"{tmp_path}/log.txt: cannot be written (Read-only" in outcome.message
