"""A process without progress dumps its stacks and exits; one that makes progress is left alone."""

import concurrent.futures
import functools
import re
import subprocess
import sys
import time
import types

import pytest

from megatron_s2d.parallel import watchdog as module
from megatron_s2d.parallel.watchdog import has_stack_dump, heartbeat, watchdog

PROGRAM = """
import re, sys, time
from pathlib import Path
from megatron_s2d.parallel.watchdog import heartbeat, watchdog

def hang_holding_the_gil():
    re.match("(a*)*b", "a" * 60)

rank = int(sys.argv[3])
with watchdog(Path(sys.argv[1]), 1.0 if sys.argv[2] != "never" else None, rank=rank, local_rank=rank % 4):
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


def run(path, what, rank=0):
    command = [sys.executable, "-c", PROGRAM, path, what, str(rank)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50)


def test_the_file_is_touched_a_hundred_times_a_timeout_at_most(tmp_path, monkeypatch):
    touched, clock = [], 0.0
    monkeypatch.setattr(module.os, "utime", touched.append)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: clock))
    with watchdog(tmp_path / "node-heartbeat.txt", 1000):
        for _ in range(500):
            clock += 1.0
            heartbeat()
    assert len(touched) == 1 + 50


@pytest.mark.parametrize("what", ["sleep", "regex"])
def test_hang_exits_with_a_stack_dump(tmp_path, what):
    path = tmp_path / "job" / "node-heartbeat.txt"
    assert run(path, what).returncode == 1
    assert has_stack_dump(path) and ("match" if what == "regex" else "<module>") in path.read_text()


@pytest.mark.parametrize(("what", "code"), [("nothing", 0), ("never", 0), ("error", 1)])
def test_progress_and_errors_leave_no_stack_dump(tmp_path, what, code):
    path = tmp_path / "node-heartbeat.txt"
    process = run(path, what)
    assert process.returncode == code and not has_stack_dump(path), process.stderr
    assert ("an error" in process.stderr) == (what == "error")


def test_the_ranks_of_a_machine_write_one_file(tmp_path):
    """Eight ranks of two stand-in machines hang; each dump says whose it is."""
    machines = [tmp_path / "job" / f"node{number}-heartbeat.txt" for number in range(2)]
    first, others = (0, 4), (1, 2, 3, 5, 6, 7)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        start = functools.partial(pool.submit, lambda rank: run(machines[rank // 4], "sleep", rank))
        processes = [start(rank) for rank in first]
        while not all(path.exists() for path in machines):  # the first rank of a machine empties the file
            time.sleep(0.05)
        processes = [process.result() for process in [*processes, *map(start, others)]]
    assert [process.returncode for process in processes] == [1] * 8
    assert sorted((tmp_path / "job").iterdir()) == machines
    for number, path in enumerate(machines):
        ranks = [
            int(digits or 0) % 10_000
            for digits in re.findall(r"^Timeout \([\d:]+(?:\.(\d+))?\)!$", path.read_text(), re.M)
        ]
        assert sorted(ranks) == list(range(4 * number, 4 * number + 4))


def test_only_the_first_rank_of_a_machine_touches_the_file(tmp_path, monkeypatch):
    touched, clock = [], 0.0
    monkeypatch.setattr(module.os, "utime", touched.append)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: clock))
    with watchdog(tmp_path / "node-heartbeat.txt", 1000, rank=9, local_rank=1):
        for _ in range(500):
            clock += 1.0
            heartbeat()
    assert not touched and (tmp_path / "node-heartbeat.txt").exists()
