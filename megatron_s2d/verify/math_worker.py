"""The process that math-verify runs in: a script of its own, so that it imports math-verify and little else.

    grader thread  --JSON line-->  this process  --fork-->  child: confined, compares one pair
          ^                             |  ^                     |
          +-------- one word -----------+  +------ one word -----+     killed at the deadline

It says ``ready``, reads lines ``{"label", "answer", "cpu_seconds", "memory_bytes"}`` and answers each with one of
``correct``, ``wrong``, ``unreadable``, ``bad_label``, ``timeout``, ``crash``. Every pair gets a fresh child, so that
one answer can neither hang nor exhaust nor change what judges the next; the child is confined because expressions are
built from model output.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys

from sandbox import confine, die_with_parent

sys.path.pop(0)  # this folder, which was needed for the line above only

from math_verify import parse, verify

# Compared once before the first child: they load what sympy loads late and build the parser's tables, for all children.
_WARM_UP = (
    ("\\frac{1}{2}", "0.5"), ("\\frac{\\sqrt{3}}{2}", "0.86"), ("x^2+1", "(x+1)^2"), ("(1,2)", "\\{1,3\\}"),
    ("\\frac{\\pi}{4}", "\\sin(1)+\\log(2)"), ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "x=3"), ("[0,1)", "x \\le 2"),
)  # fmt: skip
_WALL_PER_CPU_SECOND = 10
_WORDS = ("correct", "wrong", "unreadable", "bad_label")


def compare(label: str, answer: str) -> str:
    """How ``answer`` stands to ``label``, both LaTeX or plain expressions."""
    gold, found = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (label, answer))
    if not gold:
        return "bad_label"
    if not found:
        return "unreadable"
    return "correct" if verify(gold, found, timeout_seconds=None) else "wrong"


def _judge(request: dict) -> str:
    """The word of a confined child, or what became of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writing, 1)
            for descriptor in (0, reading, writing):
                os.close(descriptor)
            confine(request["memory_bytes"], request["cpu_seconds"], 0)
            os.write(1, compare(request["label"], request["answer"]).encode())
        finally:
            os._exit(0)  # whatever was raised: no word on the pipe is a crash
    os.close(writing)
    # Processor time is the limit that counts, so that a busy machine judges as an idle one does.
    ready, _, _ = select.select([reading], [], [], _WALL_PER_CPU_SECOND * request["cpu_seconds"])
    word = os.read(reading, 64).decode(errors="replace") if ready else "timeout"
    os.close(reading)
    os.kill(child, signal.SIGKILL)  # a zombie takes it as well as a process that is stuck
    _, status = os.waitpid(child, 0)
    if not word and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return "timeout"
    return word if word in (*_WORDS, "timeout") else "crash"


def main() -> None:
    die_with_parent()  # the end of the input would do, but for a copy of the pipe in another child of the trainer
    logging.disable(logging.CRITICAL)  # math-verify warns that it was told to leave the time limit to us
    for label, answer in _WARM_UP:
        compare(label, answer)
    print("ready", flush=True)
    for line in sys.stdin:
        print(_judge(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
