"""Maps a function over items in forked processes, in order: what a first pass over millions of rows needs.

The processes inherit the function and what it refers to (a tokenizer, settings), import nothing, and send back what
it returns. They use no device and no process group of their parent. No torch here.
"""

from __future__ import annotations

import collections
import concurrent.futures
import ctypes
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_s2d.errors import UserError

_PR_SET_PDEATHSIG = 1
_PENDING = 2  # items a process, at work or waiting: bounds what the parent has to keep

_function: Callable[[Any], Any]  # of the pool that this process belongs to


def num_processes() -> int:
    """Return how many processes this machine's CPUs are for: those that this process may use."""
    return len(os.sched_getaffinity(0))


def in_child(function: Callable[[], None]) -> None:
    """Call ``function`` in a forked process: its memory goes back to the system at its end."""
    for _ in forked_map(lambda _: function(), (None,), 1, always=True):
        pass


def forked_map[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], processes: int, *, always: bool = False
) -> Iterator[Result]:
    """Yield ``function`` of each item, in order; in this process for one process or one item, unless ``always``.

    Items, results and exceptions are pickled, the function is not. The first exception in the order of the items is
    raised. Raises ``UserError`` if a process was killed, by the kernel for memory as a rule.
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    inline = not always and (processes < 2 or len(first) < 2)
    if inline or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(function, itertools.chain(first, items))
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), _start, (function, os.getpid())
    )
    pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
        for item in itertools.chain(first, items):
            pending.append(pool.submit(_call, item))
            if len(pending) == _PENDING * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process that prepares prompts was killed, as a rule for want of memory; free memory and run again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any], parent: int) -> None:
    """Make this process one of the pool of ``parent``: it dies with it and leaves Ctrl-C to it."""
    global _function
    _function = function
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # there is a process for every core


def _call(item: Any) -> Any:
    return _function(item)
