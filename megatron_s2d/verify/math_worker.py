"""The worker process that runs math-verify: a script of its own, so that it imports math-verify and little else.

    verifier thread  --JSON line-->  this process  --fork-->  child: confined, compares one pair
          ^                               |  ^                     |
          +---------- status -------------+  +------ status -------+     killed at the deadline

It prints ``ready``, reads lines ``{"label", "answer", "cpu_seconds", "memory_bytes"}`` and answers each with a status:
``correct``, ``wrong``, ``unreadable``, ``bad_label``, ``timeout`` or ``crash``. Every pair gets a fresh child, so that
one answer cannot hang, exhaust or change the next comparison; the child is confined because expressions are built from
model output.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys

from sandbox import confine, die_with_parent

sys.path.pop(0)  # this folder, needed only for the import above

from math_verify import parse, verify

# Compared once before the first fork: this loads sympy's lazy imports and builds the parser's tables for all children.
_WARM_UP = (
    ("\\frac{1}{2}", "0.5"), ("\\frac{\\sqrt{3}}{2}", "0.86"), ("x^2+1", "(x+1)^2"), ("(1,2)", "\\{1,3\\}"),
    ("\\frac{\\pi}{4}", "\\sin(1)+\\log(2)"), ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "x=3"), ("[0,1)", "x \\le 2"),
)  # fmt: skip
_WALL_PER_CPU_SECOND = 10
_STATUSES = ("correct", "wrong", "unreadable", "bad_label")


def compare(label: str, answer: str) -> str:
    """Compare ``answer`` with ``label``, both LaTeX or plain expressions, and return the status."""
    gold, parsed = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (label, answer))
    if not gold:
        return "bad_label"
    if not parsed:
        return "unreadable"
    return "correct" if verify(gold, parsed, timeout_seconds=None) else "wrong"


def _judge(request: dict) -> str:
    """Compare in a confined child and return its status, or how the child failed."""
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
            os._exit(0)  # even after an exception: no status on the pipe counts as a crash
    os.close(writing)
    # The limit is on processor time, so that the status does not depend on the load of the machine.
    ready, _, _ = select.select([reading], [], [], _WALL_PER_CPU_SECOND * request["cpu_seconds"])
    status = os.read(reading, 64).decode(errors="replace") if ready else "timeout"
    os.close(reading)
    os.kill(child, signal.SIGKILL)  # harmless for a zombie, needed for a process that hangs
    _, exit_status = os.waitpid(child, 0)
    if not status and os.WIFSIGNALED(exit_status) and os.WTERMSIG(exit_status) == signal.SIGXCPU:
        return "timeout"
    return status if status in (*_STATUSES, "timeout") else "crash"


def main() -> None:
    die_with_parent()  # end of input is not enough: another child of the trainer may hold a copy of the pipe
    logging.disable(logging.CRITICAL)  # math-verify warns about disabled time limits
    for label, answer in _WARM_UP:
        compare(label, answer)
    print("ready", flush=True)
    for line in sys.stdin:
        print(_judge(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
