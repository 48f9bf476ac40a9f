"""Runs the s2d command as a user does, for the tests of this folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
COMMAND = [sys.executable, "-m", "megatron_s2d.cli"]
# The arm that needs no teacher: two stages and an evaluation of the smoke workflow, for tests that run it again.
DIRECT_ARM = ["--set", "arms={direct_student_grpo: student_grpo}", "--set", "contrasts=[]"]
# Only stops hanging runs: a busy machine may need many times the usual duration.
LIMIT_SECONDS = 1500
_TIMES = ("time", "tokens_per_second", "response_tokens_per_second")


def s2d(*arguments: object, timeout: float = LIMIT_SECONDS) -> subprocess.CompletedProcess:
    """Run the command to its end and capture its output as text."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment()
    )


def s2d_here(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command in this process, which has imported the libraries: for commands that start no job."""
    from megatron_s2d.cli import main

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), contextlib.chdir(ROOT):
        code = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(list(arguments), code, output.getvalue(), errors.getvalue())


def start(*arguments: object, **options: object) -> subprocess.Popen:
    """Start the command in the background, with ``options`` of ``subprocess.Popen``."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(),
        **options,
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def metrics(run_dir: Path, job: str) -> list[dict]:
    """Return the metrics of a job without those that depend on the clock."""
    lines = (run_dir / job / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in _TIMES and not key.startswith("timing_s/")}
        for line in lines
    ]


def wait_for(condition, run: subprocess.Popen | None = None, timeout: float = LIMIT_SECONDS) -> None:
    """Poll until ``condition()`` is true; fail with the output of ``run`` if it ends before that."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert run is None or run.poll() is None or condition(), run.stdout.read()
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def processes_of(run_dir: Path) -> list[int]:
    """Return the processes with open files below ``run_dir``, such as ranks that write there."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            targets = [os.readlink(link) for link in (entry / "fd").iterdir()]
        except OSError:
            continue
        if any(target.startswith(str(run_dir)) for target in targets):
            pids.append(int(entry.name))
    return pids
