"""Real SGLang servers end with all their processes when the trainer, or the watchdog between them, is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="sglang is not installed (extra `sglang`)"
)

pytest.importorskip("torch")

from s2d import environment, wait_for

from megatron_s2d.models.weights import export_buckets
from megatron_s2d.rollout.served.senders import Senders
from megatron_s2d.rollout.sglang.weight_sync import DiskWeightSync

TRAINER = """
import sys, time
from pathlib import Path
from megatron_s2d.config.training import SglangConfig
from megatron_s2d.rollout.sglang.api_key import new_api_key, write_api_key
from megatron_s2d.rollout.sglang.server import SglangServer

model, directory = map(Path, sys.argv[1:])
options = dict(weight_version="x", max_positions=64, dtype="float32", max_tokens=128)
key = write_api_key(directory, new_api_key())
servers = [SglangServer(SglangConfig(), model, directory / f"{n}.log", key, number=n, **options) for n in range(2)]
for server in servers:
    server.wait(time.monotonic() + 1000)
print(*(server._process.pid for server in servers), flush=True)
time.sleep(10000)
"""


def descendants(pid: int) -> set[int]:
    """Return the processes below ``pid``, itself included, that are not zombies."""
    found, children = set(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry.name))
    pending = [pid]
    while pending:
        found.add(pending[-1])
        pending += children.get(pending.pop(), [])
    return found


def running(pids: set[int]) -> set[int]:
    """Return those of ``pids`` that run; zombies have ended."""
    states = subprocess.run(["ps", "-o", "pid=,stat=", "-p", ",".join(map(str, pids))], capture_output=True, text=True)
    lines = [line.split() for line in states.stdout.splitlines()]
    return {int(pid) for pid, state in lines if not state.startswith("Z")}


@pytest.mark.slow
def test_no_process_of_a_server_outlives_a_killed_watchdog_or_trainer(policy, tokenizer, tmp_path):
    weights = DiskWeightSync(tmp_path / "weights", policy.spec, tokenizer, Senders.rank_zero())
    (bucket,) = export_buckets(policy.chunks, policy.spec, policy.layout)
    weights.write(bucket, "start", last=True)
    weights.written()
    with open(tmp_path / "trainer.log", "w") as log:
        command = [sys.executable, "-c", TRAINER, str(weights.complete), str(tmp_path)]
        trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment())
    line = trainer.stdout.readline()
    assert line, (tmp_path / "trainer.log").read_text()
    processes = {int(watchdog): descendants(int(watchdog)) for watchdog in line.split()}
    everything = set().union(*processes.values())
    try:
        for pids in processes.values():
            assert len(pids) >= 4  # watchdog, server, scheduler, detokenizer
        first, second = processes
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: not running(processes[first]))
        assert running(processes[second]) == processes[second]
        trainer.kill()
        wait_for(lambda: not running(processes[second]))
    finally:
        trainer.kill()
        trainer.wait()
        for pid in running(everything):
            os.kill(pid, signal.SIGKILL)
