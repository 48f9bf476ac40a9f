"""Signals that end a command before (or after) its jobs run, when nobody collects them for the jobs.

Ctrl-C raises ``KeyboardInterrupt`` by itself; SIGTERM and SIGUSR1 would end the process without a word and without its
cleanup.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from megatron_s2d.workflow.status import STOP_SIGNALS


@contextlib.contextmanager
def stop_signals_raised() -> Iterator[None]:
    """Inside the block the first SIGTERM or SIGUSR1 raises ``KeyboardInterrupt`` with its name; later ones do nothing.

    Has no effect outside of the main thread, which has all handlers. The signals end forked processes, as they would
    without this: only the process that entered the block has something to say.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, received = os.getpid(), []

    def interrupt(number: int, _: object) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not received:  # a second one would end the cleanup of the first
            received.append(number)
            raise KeyboardInterrupt(signal.Signals(number).name)

    others = [number for number in STOP_SIGNALS if number != signal.SIGINT]
    before = {number: signal.signal(number, interrupt) for number in others}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
