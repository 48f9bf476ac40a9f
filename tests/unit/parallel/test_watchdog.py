"""A process without progress dumps its stacks and exits; one that makes progress is left alone."""

import subprocess
import sys

import pytest

from megatron_s2d.parallel.watchdog import has_stack_dump

PROGRAM = """
import re, sys, time
from pathlib import Path
from megatron_s2d.parallel.watchdog import heartbeat, watchdog

def hang_holding_the_gil():
    re.match("(a*)*b", "a" * 60)

with watchdog(Path(sys.argv[1]), 1.0 if sys.argv[2] != "never" else None):
    for _ in range(6):
        time.sleep(0.3)
        heartbeat()
    if sys.argv[2] == "sleep":
        time.sleep(60)
    elif sys.argv[2] == "regex":
        hang_holding_the_gil()
    elif sys.argv[2] == "error":
        raise ValueError("an error")
"""


def run(path, what):
    return subprocess.run([sys.executable, "-c", PROGRAM, path, what], capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize("what", ["sleep", "regex"])
def test_hang_exits_with_a_stack_dump(tmp_path, what):
    path = tmp_path / "job" / "rank0-heartbeat.txt"
    assert run(path, what).returncode == 1
    assert has_stack_dump(path) and ("match" if what == "regex" else "<module>") in path.read_text()


@pytest.mark.parametrize(("what", "code"), [("nothing", 0), ("never", 0), ("error", 1)])
def test_progress_and_errors_leave_no_stack_dump(tmp_path, what, code):
    path = tmp_path / "rank0-heartbeat.txt"
    process = run(path, what)
    assert process.returncode == code and not has_stack_dump(path), process.stderr
    assert ("an error" in process.stderr) == (what == "error")
