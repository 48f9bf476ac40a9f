"""Grades Python programs by unit tests that run in a separate process.

The program is one block of the response (``code_extraction.py``). It runs in a confined process of its own
(``sandbox.py``) that does not know the tests; these run in a second confined process, which calls the program's
function through a pipe and gets plain data only (``case_runner.py``), or compare the output of a script. So a program
cannot patch the tests, forge a verdict, or pass by exiting early. Every case has a fresh process, forked by a server
that never runs foreign code (``fork_server.py``), and a time limit; all cases of a response together have another.

Labels (``Prompt.answer``) are unit tests in one of the layouts of ``code_labels.py``.
Not supported: other languages, tests that exchange objects of a class, programs that need files, processes or sockets.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.code_extraction import extract_program
from megatron_s2d.verify.code_labels import parse_unit_tests
from megatron_s2d.verify.code_output import same_output
from megatron_s2d.verify.code_pool import ForkServer, ForkServers, environment, memory_file, read_all
from megatron_s2d.verify.verifier import Verdict

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_MAX_WORKERS = 8
_OUTPUT_BYTES = 16 << 20
_WALL_PER_CPU_SECOND = 4  # the verdict should not depend on the load of the machine
_TOTAL_PER_WALL_SECOND = 3
_PRELOADED = re.compile(r"\b(numpy|sympy)\b")  # slow to import: the server does it once
# LeetCode and the test programs of LiveCodeBench and APPS import these for a class Solution.
_SOLUTION = re.compile(r"^class\s+Solution\b", re.MULTILINE)
_SOLUTION_SETUP = """\
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
from builtins import *
"""


class CodeVerifier:
    """Runs the program in a response against the prompt's tests.

    Verdict labels: ``correct``, ``wrong``, ``no_code``, ``error`` (it raised), ``crash`` (it ended or ran out of
    memory), ``timeout``, ``bad_label`` (the tests themselves could not run).
    """

    def __init__(
        self,
        num_workers: int | None = None,
        cpu_seconds: int = 10,
        memory_bytes: int = 1 << 30,
        wall_seconds: float | None = None,
        total_seconds: float | None = None,
        *,
        partial_credit: bool = False,
        correct_at: float = 1.0,
    ) -> None:
        """Limit each case to ``cpu_seconds`` and ``memory_bytes`` beyond Python's own, and to ``wall_seconds``.

        All cases of one response together may take ``total_seconds``. partial_credit: the reward is the share of the
        cases that pass, which count as correct from ``correct_at`` on; the cases of test code are its asserts.

        Defaults: one worker per core, at most 8; four times ``cpu_seconds``; three times ``wall_seconds``.
        Raises ``UserError`` if this machine cannot confine a process.
        """
        if "landlock" not in sandbox_layers():
            logger.warning("this kernel has no Landlock: programs under test can read all files of this user")
        self._partial_credit, self._correct_at = partial_credit, correct_at
        num_workers = num_workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="code")
        self._servers = ForkServers(num_workers)
        wall_seconds = _WALL_PER_CPU_SECOND * cpu_seconds if wall_seconds is None else wall_seconds
        self._total_seconds = _TOTAL_PER_WALL_SECOND * wall_seconds if total_seconds is None else total_seconds
        limits = {"memory_bytes": memory_bytes, "cpu_seconds": cpu_seconds, "file_bytes": _OUTPUT_BYTES}
        self._request = {
            "case_seconds": wall_seconds,
            "limits": limits,
            # It runs through all cases, and receives the pipes to each process of the program.
            "runner_limits": limits
            | {"cpu_seconds": max(cpu_seconds, int(self._total_seconds)), "receive_files": True},
        }

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order. Raises ``UserError`` for malformed unit tests."""
        labels = {answer: parse_unit_tests(prompt) for answer, prompt in {p.answer: p for p in prompts}.items()}
        programs = [
            extract_program(response, labels[prompt.answer], prompt.text)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        pairs = dict.fromkeys(
            (prompt.answer, program) for prompt, program in zip(prompts, programs, strict=True) if program is not None
        )
        results = self._threads.map(lambda pair: self._judge(labels[pair[0]], pair[1]), pairs)
        statuses = dict(zip(pairs, results, strict=True))
        verdicts = []
        for prompt, program in zip(prompts, programs, strict=True):
            verdicts.append(self._verdict(statuses.get((prompt.answer, program), "no_code")))
        return verdicts

    def _verdict(self, status: str) -> Verdict:
        """Return the verdict of a status, or of ``status passed total`` with partial credit."""
        status, _, counts = status.partition(" ")
        reward = float(status == "correct")
        if counts:
            passed, total = map(int, counts.split())
            reward = passed / total
            if status != "bad_label" and reward >= self._correct_at:
                status = "correct"
        return Verdict(reward, status, f"{passed} of {total} cases" if counts else None)

    def close(self) -> None:
        """Wait for the running programs, each of which has a time limit, and stop the processes."""
        self._threads.shutdown(cancel_futures=True)
        self._servers.close()

    def _judge(self, label: dict[str, Any], program: str) -> str:
        setup = label.get("setup", "")
        if _SOLUTION.search(program):
            setup = _SOLUTION_SETUP + setup
        sources = json.dumps({"setup": setup, "program": program}).encode()
        tests = label.get("tests", label.get("reference", ""))
        modules = sorted(set(_PRELOADED.findall(program) + _PRELOADED.findall(tests)))
        request = self._request | {"modules": modules, "total_seconds": self._total_seconds}
        with self._servers.borrow() as server, memory_file(sources) as program_file:
            if label["kind"] != "script":
                return self._judge_calls(server, request, program_file, label)
            deadline, statuses = time.monotonic() + self._total_seconds, []
            for stdin, expected in zip(label["inputs"], label["outputs"], strict=True):
                request["total_seconds"] = deadline - time.monotonic()
                statuses.append(self._judge_script(server, request, program_file, stdin, expected))
                if statuses[-1] != "correct" and not self._partial_credit:
                    return statuses[-1]
        first_failure = next((status for status in statuses if status != "correct"), "correct")
        counts = f" {statuses.count('correct')} {len(statuses)}" if self._partial_credit else ""
        return first_failure + counts

    def _judge_calls(self, server: ForkServer, request: dict, program_file: int, label: dict[str, Any]) -> str:
        label = label | {"partial_credit": self._partial_credit}
        with memory_file(json.dumps(label).encode()) as label_file, memory_file() as status_file:
            reply = server.run({"mode": "calls"} | request, [program_file, label_file, status_file])
            if reply is None:
                return "crash"
            if reply["timed_out"]:
                return "timeout"
            status = read_all(status_file, 64).decode(errors="replace") or "crash"
        return "timeout" if status == "crash" and -signal.SIGXCPU in reply["exits"] else status

    def _judge_script(self, server: ForkServer, request: dict, program_file: int, stdin: str, expected: str) -> str:
        if request["total_seconds"] <= 0:
            return "timeout"
        with memory_file(stdin.encode(errors="replace")) as input_file, memory_file() as output_file:
            reply = server.run({"mode": "script"} | request, [program_file, input_file, output_file])
            if reply is None:
                return "crash"
            (exit_code,) = reply["exits"]
            if reply["timed_out"] or exit_code == -signal.SIGXCPU:
                return "timeout"
            if exit_code:
                return "crash" if exit_code < 0 else "error"
            output = read_all(output_file, _OUTPUT_BYTES).decode(errors="replace")
        return "correct" if same_output(output, expected) else "wrong"


@functools.cache
def sandbox_layers() -> tuple[str, ...]:
    """Return the layers that confine a process on this machine (``sandbox.confine``).

    Raises ``UserError`` if a required layer is missing.
    """
    run = subprocess.run(
        [sys.executable, "-s", str(_HERE / "sandbox.py")], capture_output=True, text=True, env=environment(), cwd="/"
    )
    if run.returncode:
        reason = run.stderr.strip().rpartition("\n")[2]
        raise UserError(f"cannot sandbox programs on this machine ({reason}); verifier code needs Linux with seccomp")
    return tuple(json.loads(run.stdout))
