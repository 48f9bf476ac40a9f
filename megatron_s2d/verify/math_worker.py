"""The worker process that compares mathematical answers: a script of its own, which imports mpmath and little else.

    verifier thread  --JSON line-->  this process  --fork-->  child: confined, compares one pair
          ^                               |  ^                     |
          +---------- status -------------+  +------ status -------+     killed at the deadline

It prints ``ready``, reads lines ``{"label", "answer", "cpu_seconds", "memory_bytes"}`` and answers each with a status:
``correct``, ``wrong``, ``unreadable``, ``bad_label``, ``timeout`` or ``crash``. Reading takes time in proportion to the
text, and short answers without powers, roots and symbols are compared here. Every other pair gets a fresh child, so
that one answer cannot hang, exhaust or change the next comparison; the child is confined because it computes what model
output says.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this copy of the package, wherever it is installed

from megatron_s2d.verify.mathematics.compare import compare, is_quick
from megatron_s2d.verify.sandbox import confine, die_with_parent

sys.path.pop(0)

# Compared once before the first fork: this fills the caches of mpmath and of regular expressions for all children.
_WARM_UP = (
    ("\\frac{1}{2}", "0.5"), ("\\frac{\\sqrt{3}}{2}", "0.86"), ("x^2+1", "(x+1)^2"), ("(1,2)", "\\{1,3\\}"),
    ("\\frac{\\pi}{4}", "\\sin(1)+\\ln(2)"), ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "x=3"), ("[0,1)", "x \\le 2"),
)  # fmt: skip
_WALL_PER_CPU_SECOND = 10
_STATUSES = ("correct", "wrong", "unreadable", "bad_label")


def _judge(request: dict) -> str:
    """Compare in a confined child and return its status, or how the child failed."""
    try:
        if is_quick(request["label"], request["answer"]):
            return compare(request["label"], request["answer"])
    except Exception:
        return "crash"  # a bug; the next comparison is not affected
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
    for label, answer in _WARM_UP:
        compare(label, answer)
    print("ready", flush=True)
    for line in sys.stdin:
        print(_judge(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
