"""Programs, judged by unit tests that run apart from them.

A response's last fenced block is the program. It runs in a process of its own that is confined (``sandbox.py``) and
knows nothing of the tests; these run in a second confined process, which calls the program's function through a pipe
and sees plain data only (``case_runner.py``), or compare what a script prints. So a program cannot patch the checker, forge
a verdict, or leave early and pass. A process that overruns is killed.

Labels (``Prompt.answer``) are JSON, of one of the kinds
``{"kind": "asserts", "setup", "entry_point", "tests"}`` (HumanEval: ``tests`` defines ``check``),
``{"kind": "reference", "reference", "entry_point", "inputs", "example", "compare", "tolerance"}`` (MBPP+),
``{"inputs": [...], "outputs": [...]}`` texts for standard input and output; with ``"fn_name"`` arguments and results.
Left out: languages other than Python, methods of a class as entry point, programs that need files, processes, sockets.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.verdicts import Verdict

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_MOST_WORKERS = 8
_OUTPUT_BYTES = 16 << 20
_WALL_PER_CPU_SECOND = 4  # a busy machine should judge as an idle one does
_LANGUAGES = ("", "python", "py", "python3")
_FIELDS = {
    "asserts": {"setup", "entry_point", "tests"},
    "reference": {"reference", "entry_point", "inputs", "example", "compare", "tolerance"},
    "examples": {"entry_point", "inputs", "outputs"},
    "script": {"inputs", "outputs"},
}


class CodeVerifier:
    """Runs the program in a response against the prompt's tests.

    Verdict words: ``correct``, ``wrong``, ``no_code``, ``error`` (it raised), ``crash`` (it ended, or ran out of
    memory), ``timeout``, ``bad_label`` (the tests fail by themselves).
    """

    def __init__(
        self,
        num_workers: int | None = None,
        cpu_seconds: int = 10,
        memory_bytes: int = 1 << 30,
        wall_seconds: float | None = None,
    ) -> None:
        """``cpu_seconds`` and ``memory_bytes`` bound each process, ``wall_seconds`` each run, also one that sleeps.

        None: a worker per core, 8 at most; four times ``cpu_seconds``.
        Raises ``UserError`` on a machine that cannot confine a process.
        """
        if "landlock" not in isolation():
            logger.warning("this kernel has no Landlock: programs under test can read what this user can read")
        cores = len(os.sched_getaffinity(0))
        self._threads = ThreadPoolExecutor(num_workers or min(_MOST_WORKERS, cores), thread_name_prefix="code")
        self._limits = json.dumps(
            {"memory_bytes": memory_bytes, "cpu_seconds": cpu_seconds, "file_bytes": _OUTPUT_BYTES}
        )
        self._wall_seconds = _WALL_PER_CPU_SECOND * cpu_seconds if wall_seconds is None else wall_seconds

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """One verdict a response, in order. Raises ``UserError`` for a label of no known kind."""
        labels = {prompt.answer: read_label(prompt) for prompt in prompts}
        programs = [extract_program(response) for response in responses]
        pairs = dict.fromkeys(
            (prompt.answer, program) for prompt, program in zip(prompts, programs, strict=True) if program is not None
        )
        found = self._threads.map(lambda pair: self._judge(labels[pair[0]], pair[1]), pairs)
        words = dict(zip(pairs, found, strict=True))
        verdicts = []
        for prompt, program in zip(prompts, programs, strict=True):
            word = words.get((prompt.answer, program), "no_code")
            verdicts.append(Verdict(float(word == "correct"), word))
        return verdicts

    def close(self) -> None:
        """Wait for what runs; each process has its limit."""
        self._threads.shutdown(cancel_futures=True)

    def _judge(self, label: dict[str, Any], program: str) -> str:
        sources = json.dumps({"setup": label.get("setup", ""), "program": program}).encode()
        if label["kind"] != "script":
            return self._judge_calls(sources, label)
        for given, expected in zip(label["inputs"], label["outputs"], strict=True):
            word = self._judge_script(sources, _text(given), _text(expected))
            if word != "correct":
                return word
        return "correct"

    def _judge_calls(self, sources: bytes, label: dict[str, Any]) -> str:
        with (
            _file(sources) as program,
            _file(json.dumps(label).encode()) as tests,
            tempfile.TemporaryFile() as verdict,
        ):
            calls, answers = os.pipe(), os.pipe()
            candidate = tester = None
            try:
                candidate = self._start(
                    ["program.py", "call", str(program.fileno())], calls[0], answers[1], (program.fileno(),)
                )
                ends = (calls[1], answers[0])
                tester = self._start(["case_runner.py", *map(str, ends)], tests, verdict, ends)
                for end in (*calls, *answers):
                    os.close(end)
                if not self._ends(tester):
                    return "timeout"
            finally:
                for process in (candidate, tester):
                    if process is not None:
                        process.kill()
                        process.wait()
            verdict.seek(0)
            word = verdict.read(64).decode(errors="replace") or "crash"
            overran = -signal.SIGXCPU in (candidate.returncode, tester.returncode)
            return "timeout" if word == "crash" and overran else word

    def _judge_script(self, sources: bytes, given: str, expected: str) -> str:
        with _file(sources) as program, _file(given.encode(errors="replace")) as input, _file(b"") as output:
            process = self._start(["program.py", "script", str(program.fileno())], input, output, (program.fileno(),))
            try:
                if not self._ends(process):
                    return "timeout"
            finally:
                process.kill()
                process.wait()
            if process.returncode < 0:
                return "timeout" if process.returncode == -signal.SIGXCPU else "crash"
            if process.returncode > 0:
                return "error"
            output.seek(0)
            return "correct" if same_output(output.read().decode(errors="replace"), expected) else "wrong"

    def _start(self, command: list[str], input: Any, output: Any, descriptors: Sequence[int]) -> subprocess.Popen:
        script, *arguments = command
        return subprocess.Popen(
            [sys.executable, "-s", "-X", "utf8", str(_HERE / script), *arguments, self._limits],
            stdin=input, stdout=output, stderr=subprocess.DEVNULL, pass_fds=descriptors, env=_environment(), cwd="/",
            start_new_session=True,
        )  # fmt: skip

    def _ends(self, process: subprocess.Popen) -> bool:
        """Whether the process ends by itself in time."""
        try:
            process.wait(self._wall_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def read_label(prompt: Prompt) -> dict[str, Any]:
    """The tests of a prompt with their ``kind``. Raises ``UserError`` where they are of none that is known."""
    try:
        label = json.loads(prompt.answer)
    except ValueError:
        label = None
    if not isinstance(label, dict):
        raise UserError(f"prompt {prompt.id}: the answer is not a JSON object; the verifier code needs unit tests")
    if "kind" not in label and {"inputs", "outputs"} <= label.keys():
        name = label.get("fn_name")
        label = label | ({"kind": "script"} if name is None else {"kind": "examples", "entry_point": name})
    wanted = _FIELDS.get(label.get("kind"))
    if wanted is None:
        raise UserError(f"prompt {prompt.id}: unit tests of an unknown kind (known: {', '.join(_FIELDS)})")
    if missing := wanted - label.keys():
        raise UserError(f"prompt {prompt.id}: unit tests of kind {label['kind']} lack {', '.join(sorted(missing))}")
    if "outputs" in wanted and len(label["inputs"]) != len(label["outputs"]):
        raise UserError(f"prompt {prompt.id}: {len(label['inputs'])} inputs and {len(label['outputs'])} outputs")
    if "inputs" in wanted and not label["inputs"]:
        raise UserError(f"prompt {prompt.id}: no unit tests")
    return label


def extract_program(response: str) -> str | None:
    """The last fenced Python block after the thought, or None."""
    program, block = None, None
    for line in response.rpartition("</think>")[2].split("\n"):
        mark = line.strip()
        text = mark.lstrip("`")
        num_ticks = len(mark) - len(text)
        is_fence = num_ticks >= 3 and "`" not in text
        if block is None:
            if is_fence:
                language, _, _ = text.strip().lower().partition(" ")
                block, wanted, opening, indent = [], language in _LANGUAGES, num_ticks, _num_spaces(line)
        elif is_fence and not text and num_ticks >= opening:
            program = "\n".join(block) if wanted else program
            block = None
        else:
            block.append(line[min(indent, _num_spaces(line)) :])  # in a list, the fence and what it holds are indented
    return program


def _num_spaces(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def same_output(found: str, expected: str) -> bool:
    """Equal but for white space at the ends of lines and of the text."""
    lines, expected_lines = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (found, expected))
    return lines == expected_lines


@functools.cache
def isolation() -> tuple[str, ...]:
    """The layers that confine a process on this machine (``sandbox.confine``).

    Raises ``UserError`` where one that is needed cannot be had.
    """
    run = subprocess.run(
        [sys.executable, "-s", str(_HERE / "sandbox.py")], capture_output=True, text=True, env=_environment(), cwd="/"
    )
    if run.returncode:
        reason = run.stderr.strip().rpartition("\n")[2]
        raise UserError(f"programs cannot be confined here ({reason}); the verifier code needs Linux with seccomp")
    return tuple(json.loads(run.stdout))


def _environment() -> dict[str, str]:
    """All that a program sees of the trainer's environment: nothing."""
    return {
        "PATH": "/usr/bin:/bin",
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or "",
        "PYTHONHASHSEED": "0",  # sets in the same order every time
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _file(content: bytes) -> BinaryIO:
    """An open file of ``content`` at its start, without a name."""
    file = tempfile.TemporaryFile()
    file.write(content)
    file.seek(0)
    return file


def _text(lines: Any) -> str:
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)
