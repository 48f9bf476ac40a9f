"""Grades Python programs by unit tests that run in a separate process.

The last fenced block of a response is the program. It runs in a confined process of its own (``sandbox.py``) that does
not know the tests; these run in a second confined process, which calls the program's function through a pipe and gets
plain data only (``case_runner.py``), or compares the output of a script. So a program cannot patch the tests, forge a
verdict, or pass by exiting early. A process that exceeds its time limit is killed.

Labels (``Prompt.answer``) are JSON, of one of the kinds
``{"kind": "asserts", "setup", "entry_point", "tests"}`` (HumanEval: ``tests`` defines ``check``),
``{"kind": "reference", "reference", "entry_point", "inputs", "example", "compare", "tolerance"}`` (MBPP+),
``{"inputs": [...], "outputs": [...]}`` texts for standard input and output; with ``"fn_name"`` arguments and results.
Not supported: other languages, methods as entry point, programs that need files, processes or sockets.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.verifier import Verdict

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_MAX_WORKERS = 8
_OUTPUT_BYTES = 16 << 20
_WALL_PER_CPU_SECOND = 4  # the verdict should not depend on the load of the machine
_TOTAL_PER_WALL_SECOND = 3
_LANGUAGES = ("", "python", "py", "python3")
_FIELDS = {
    "asserts": {"setup", "entry_point", "tests"},
    "reference": {"reference", "entry_point", "inputs", "example", "compare", "tolerance"},
    "examples": {"entry_point", "inputs", "outputs"},
    "script": {"inputs", "outputs"},
}


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
    ) -> None:
        """Limit each process to ``cpu_seconds`` and ``memory_bytes``, each run to ``wall_seconds``.

        All script tests of one response together may take ``total_seconds``.

        Defaults: one worker per core, at most 8; four times ``cpu_seconds``; three times ``wall_seconds``.
        Raises ``UserError`` if this machine cannot confine a process.
        """
        if "landlock" not in sandbox_layers():
            logger.warning("this kernel has no Landlock: programs under test can read all files of this user")
        cores = len(os.sched_getaffinity(0))
        self._threads = ThreadPoolExecutor(num_workers or min(_MAX_WORKERS, cores), thread_name_prefix="code")
        self._limits = json.dumps(
            {"memory_bytes": memory_bytes, "cpu_seconds": cpu_seconds, "file_bytes": _OUTPUT_BYTES}
        )
        self._wall_seconds = _WALL_PER_CPU_SECOND * cpu_seconds if wall_seconds is None else wall_seconds
        self._total_seconds = _TOTAL_PER_WALL_SECOND * self._wall_seconds if total_seconds is None else total_seconds

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order. Raises ``UserError`` for malformed unit tests."""
        labels = {prompt.answer: parse_unit_tests(prompt) for prompt in prompts}
        programs = [extract_program(response) for response in responses]
        pairs = dict.fromkeys(
            (prompt.answer, program) for prompt, program in zip(prompts, programs, strict=True) if program is not None
        )
        results = self._threads.map(lambda pair: self._judge(labels[pair[0]], pair[1]), pairs)
        statuses = dict(zip(pairs, results, strict=True))
        verdicts = []
        for prompt, program in zip(prompts, programs, strict=True):
            status = statuses.get((prompt.answer, program), "no_code")
            verdicts.append(Verdict(float(status == "correct"), status))
        return verdicts

    def close(self) -> None:
        """Wait for the running programs, each of which has a time limit."""
        self._threads.shutdown(cancel_futures=True)

    def _judge(self, label: dict[str, Any], program: str) -> str:
        sources = json.dumps({"setup": label.get("setup", ""), "program": program}).encode()
        if label["kind"] != "script":
            return self._judge_calls(sources, label)
        deadline = time.monotonic() + self._total_seconds
        for stdin, expected in zip(label["inputs"], label["outputs"], strict=True):
            seconds = min(self._wall_seconds, deadline - time.monotonic())
            status = self._judge_script(sources, _text(stdin), _text(expected), seconds) if seconds > 0 else "timeout"
            if status != "correct":
                return status
        return "correct"

    def _judge_calls(self, sources: bytes, label: dict[str, Any]) -> str:
        with (
            _file(sources) as program_file,
            _file(json.dumps(label).encode()) as label_file,
            tempfile.TemporaryFile() as status_file,
        ):
            calls, answers = os.pipe(), os.pipe()
            program = runner = None
            try:
                descriptor = program_file.fileno()
                program = self._start(["program.py", "call", str(descriptor)], calls[0], answers[1], (descriptor,))
                ends = (calls[1], answers[0])
                runner = self._start(["case_runner.py", *map(str, ends)], label_file, status_file, ends)
                for end in (*calls, *answers):
                    os.close(end)
                if not _ends_within(runner, self._wall_seconds):
                    return "timeout"
            finally:
                for process in (program, runner):
                    if process is not None:
                        process.kill()
                        process.wait()
            status_file.seek(0)
            status = status_file.read(64).decode(errors="replace") or "crash"
            cpu_limit_hit = -signal.SIGXCPU in (program.returncode, runner.returncode)
            return "timeout" if status == "crash" and cpu_limit_hit else status

    def _judge_script(self, sources: bytes, stdin: str, expected: str, wall_seconds: float) -> str:
        with (
            _file(sources) as program_file,
            _file(stdin.encode(errors="replace")) as input_file,
            _file(b"") as output_file,
        ):
            descriptor = program_file.fileno()
            command = ["program.py", "script", str(descriptor)]
            process = self._start(command, input_file, output_file, (descriptor,))
            try:
                if not _ends_within(process, wall_seconds):
                    return "timeout"
            finally:
                process.kill()
                process.wait()
            if process.returncode < 0:
                return "timeout" if process.returncode == -signal.SIGXCPU else "crash"
            if process.returncode > 0:
                return "error"
            output_file.seek(0)
            return "correct" if same_output(output_file.read().decode(errors="replace"), expected) else "wrong"

    def _start(self, command: list[str], stdin: Any, stdout: Any, descriptors: Sequence[int]) -> subprocess.Popen:
        script, *arguments = command
        return subprocess.Popen(
            [sys.executable, "-s", "-X", "utf8", str(_HERE / script), *arguments, self._limits],
            stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, pass_fds=descriptors, env=_environment(), cwd="/",
            start_new_session=True,
        )  # fmt: skip


def _ends_within(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def parse_unit_tests(prompt: Prompt) -> dict[str, Any]:
    """Return the unit tests in a prompt's label, with their ``kind``. Raises ``UserError`` if they are malformed."""
    try:
        label = json.loads(prompt.answer)
    except ValueError:
        label = None
    if not isinstance(label, dict):
        raise UserError(f"prompt {prompt.id}: the label is not a JSON object; verifier code needs unit tests")
    if "kind" not in label and {"inputs", "outputs"} <= label.keys():
        name = label.get("fn_name")
        label = label | ({"kind": "script"} if name is None else {"kind": "examples", "entry_point": name})
    required = _FIELDS.get(label.get("kind"))
    if required is None:
        raise UserError(f"prompt {prompt.id}: unit tests of an unknown kind; choose one of {', '.join(_FIELDS)}")
    if missing := required - label.keys():
        raise UserError(f"prompt {prompt.id}: unit tests of kind {label['kind']} lack {', '.join(sorted(missing))}")
    if "outputs" in required and len(label["inputs"]) != len(label["outputs"]):
        raise UserError(
            f"prompt {prompt.id}: unit tests with {len(label['inputs'])} inputs and "
            f"{len(label['outputs'])} outputs; give one output per input"
        )
    if "inputs" in required and not label["inputs"]:
        raise UserError(f"prompt {prompt.id}: no unit tests; give at least one input")
    return label


def extract_program(response: str) -> str | None:
    """Return the last fenced Python block after the reasoning, or None."""
    program, block = None, None
    for line in response.rpartition("</think>")[2].split("\n"):
        mark = line.strip()
        text = mark.lstrip("`")
        num_ticks = len(mark) - len(text)
        is_fence = num_ticks >= 3 and "`" not in text
        if block is None:
            if is_fence:
                language, _, _ = text.strip().lower().partition(" ")
                block, is_python, opening, indent = [], language in _LANGUAGES, num_ticks, _num_spaces(line)
        elif is_fence and not text and num_ticks >= opening:
            program = "\n".join(block) if is_python else program
            block = None
        else:
            block.append(line[min(indent, _num_spaces(line)) :])  # blocks in a list are indented with their fence
    return program


def _num_spaces(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def same_output(actual: str, expected: str) -> bool:
    """Return whether the texts are equal, ignoring white space at the ends of lines and of the text."""
    lines, expected_lines = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (actual, expected))
    return lines == expected_lines


@functools.cache
def sandbox_layers() -> tuple[str, ...]:
    """Return the layers that confine a process on this machine (``sandbox.confine``).

    Raises ``UserError`` if a required layer is missing.
    """
    run = subprocess.run(
        [sys.executable, "-s", str(_HERE / "sandbox.py")], capture_output=True, text=True, env=_environment(), cwd="/"
    )
    if run.returncode:
        reason = run.stderr.strip().rpartition("\n")[2]
        raise UserError(f"cannot sandbox programs on this machine ({reason}); verifier code needs Linux with seccomp")
    return tuple(json.loads(run.stdout))


def _environment() -> dict[str, str]:
    """Return the environment of programs, which has none of the trainer's variables."""
    return {
        "PATH": "/usr/bin:/bin",
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or "",
        "PYTHONHASHSEED": "0",  # sets iterate in the same order every time
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _file(content: bytes) -> BinaryIO:
    """Return an unnamed open file with ``content``, positioned at its start."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    file.write(content)
    file.seek(0)
    return file


def _text(lines: Any) -> str:
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)
