"""Runs every case of a program in a confined process of its own without starting Python again: it forks.

    code verifier --request and open files, by socket--> fork_server.py --fork--> program.py (confined), one per case
         ^                                                   |     ^                  ^
         |                                                   |     +--next program--+ | calls and values
         +-------------------- reply ------------------------+--fork--> case_runner.py (confined)

The server runs no code of a response or of a label and reads neither: it passes on open files. So its forks find
nothing in their memory, and a program cannot change what a later case inherits. A script of its own, standard library
only; it dies with the thread that started it, and its children with it.

Usage: ``fork_server.py SOCKET``, an open descriptor. Requests are JSON with ``modules`` to import once, ``limits`` and
``runner_limits`` (arguments of ``confine``), ``case_seconds``, ``total_seconds`` and open files: program, standard
input and output for ``"mode": "script"``; program, label and status for ``"mode": "calls"``. The reply has
``timed_out`` and ``exits``, the exit codes of the program and, for calls, of the test runner (negative: a signal).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from case_runner import run_tests
from program import run_script, serve_calls
from sandbox import confine, die_with_parent, python_files

sys.path.pop(0)  # this folder, needed only for the imports above

# What programs import most often.
_MODULES = (
    "array", "bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions",
    "heapq", "io", "itertools", "math", "operator", "queue", "random", "re", "statistics", "string", "threading",
    "typing",
)  # fmt: skip
_MAX_DESCRIPTOR = 4096


def main() -> None:
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # to wait for it with a time limit
    sys.argv[:], requests = ["program"], socket.socket(fileno=int(sys.argv[1]))
    _import(_MODULES)
    python_files()  # cached for the forks
    requests.send(b"ready")
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 16, 3)
        if not message:
            return
        request = json.loads(message)
        _import(request["modules"])
        reply = (_run_script if request["mode"] == "script" else _run_calls)(request, *files)
        for file in files:
            os.close(file)
        requests.send(json.dumps(reply).encode())


def _import(names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):  # a program that needs it gets its own error
            importlib.import_module(name)
    gc.freeze()  # forks neither scan nor copy what is there


def _run_script(request: dict, program: int, stdin: int, stdout: int) -> dict:
    pid = _fork({3: program, 0: stdin, 1: stdout}, run_script, request["limits"])
    status = _wait(pid, time.monotonic() + min(request["case_seconds"], request["total_seconds"]))
    return {"timed_out": status is None, "exits": [status]}


def _run_calls(request: dict, program: int, label: int, status: int) -> dict:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    runner = _fork({0: label, 1: status, 3: theirs.fileno()}, run_tests, request["runner_limits"])
    theirs.close()
    pid, end = None, time.monotonic() + request["total_seconds"]
    deadline = end
    with ours:
        # Readable when the runner asks for a fresh process of the program, and when the runner has ended.
        while timely := select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                ended = not ours.recv(16)
            except ConnectionResetError:  # it has ended without reading what it was sent
                ended = True
            if ended:
                break
            if pid is not None:
                _kill(pid)
            calls, answers = os.pipe(), os.pipe()
            pid = _fork({3: program, 0: calls[0], 1: answers[1]}, serve_calls, request["limits"])
            with contextlib.suppress(BrokenPipeError):
                socket.send_fds(ours, [b"next"], [calls[1], answers[0]])
            for descriptor in (*calls, *answers):
                os.close(descriptor)
            deadline = min(end, time.monotonic() + request["case_seconds"])
    return {"timed_out": not timely, "exits": [_kill(process) for process in (pid, runner) if process is not None]}


def _fork(files: Mapping[int, int], action: Callable[[Callable[[], object]], object], limits: dict) -> int:
    """Start a process that has no open files but ``files`` (its number: ours) and runs ``action``; return its id.

    ``action`` gets a function that confines the process, and calls it before it runs foreign code.
    """
    parent, pid = os.getpid(), os.fork()
    if pid:
        return pid
    copies = {number: fcntl.fcntl(ours, fcntl.F_DUPFD, 64) for number, ours in files.items()}
    for number, copy in copies.items():
        os.dup2(copy, number)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.closerange(3 + (3 in files), _MAX_DESCRIPTOR)
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    with open("/proc/self/statm") as file:  # what Python and imported modules take is not the program's
        pages = int(file.read().split()[0])
    limits |= {"memory_bytes": limits["memory_bytes"] + pages * resource.getpagesize()}
    action(functools.partial(confine, **limits))
    os._exit(0)


def _wait(pid: int, deadline: float) -> int | None:
    """Return the exit code of the process, negative for a signal; None if it had to be killed at ``deadline``."""
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            _kill(pid)
            return None
        signal.sigtimedwait([signal.SIGCHLD], seconds)
    return os.waitstatus_to_exitcode(ended[1])


def _kill(pid: int) -> int:
    """Return the exit code of the process, which has ended or is killed now."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main()
