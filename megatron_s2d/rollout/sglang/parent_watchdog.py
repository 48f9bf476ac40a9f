"""Runs a command until it ends or its parent has died, then kills all processes that it started.

``python parent_watchdog.py COMMAND ...``; the parent holds the other end of standard input. The file imports nothing of
this package, so that it starts at once. A server has many processes and would outlive a killed trainer; if this process
itself is killed, the kernel kills the server.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_GRACE_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1


def main() -> int:
    own = os.getpid()
    child = subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=lambda: _die_with(own)
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while child.poll() is None:
            # Nothing is ever written to standard input: it becomes readable when the other end is closed.
            if select.select([sys.stdin], [], [], 0.2)[0]:
                break
    finally:
        _kill_group(child)
    return child.returncode if child.returncode is not None else 0


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the watchdog dies, however that happens; end if it has died already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _kill_group(child: subprocess.Popen) -> None:
    """End the child's whole process group, which its own children share."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + _GRACE_SECONDS
        while number == signal.SIGTERM and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    child.wait()


if __name__ == "__main__":
    sys.exit(main())
