"""What a confined process does with an untrusted program. Standard library only; ``fork_server.py`` starts it.

``run_script`` runs the program as ``__main__`` between standard input and output. ``serve_calls`` runs its definitions,
then answers calls: a line ``encode((name, arguments, keywords, want_arguments))`` on standard input gets the reply
``encode(("value", result, arguments))`` or ``encode(("error", type name, None))``; the arguments as the call left them,
only if they are wanted. Descriptor 3 has the sources as JSON, ``{"setup", "program"}``, run in this order. This process
does not know the expected results, and its output is trusted only as the value of a call.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from serialization import decode, encode

_SOURCES = 3


def run_script(confine: Callable[[], object]) -> None:
    """Run the program as a script and end the process as Python would, but without clearing all modules (0.4 s)."""
    sources = _read_sources()
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", errors="surrogateescape")
    stdout = sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape")
    confine()
    main, exit_code = types.ModuleType("__main__"), 0
    for action in (lambda: _define(sources, main), threading._shutdown, atexit._run_exitfuncs, _flush):
        try:
            action()
        except SystemExit as error:
            is_code = isinstance(error.code, int)
            exit_code = error.code & 0xFF if is_code else int(error.code is not None)
        except BaseException:
            exit_code = 1
    with contextlib.suppress(BaseException):  # files that the program left open are written when nothing refers to them
        main.__dict__.clear()
        gc.collect()
        stdout.flush()
    os._exit(exit_code)


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def serve_calls(confine: Callable[[], object]) -> None:
    """Run the definitions, then answer calls until the end of standard input."""
    sources = _read_sources()
    calls, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    devnull = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):  # discard what the program prints
        os.dup2(devnull, standard)
    confine()
    names: dict[str, dict[str, Any]] = {}

    def define() -> tuple[None, None]:
        names.update(_define(sources, types.ModuleType("program")))
        return None, None

    answers.write(_attempt(define) + "\n")
    answers.flush()
    for line in calls:
        answers.write(_attempt(_call, names, line) + "\n")
        answers.flush()
    os._exit(0)


def _read_sources() -> dict[str, str]:
    os.lseek(_SOURCES, 0, os.SEEK_SET)  # an earlier case has read the file
    with open(_SOURCES, encoding="utf-8") as file:
        return json.load(file)


def _define(sources: dict[str, str], module: types.ModuleType) -> dict[str, dict[str, Any]]:
    """Run the sources in ``module``; return its names after each source.

    Like this file, the sources do not evaluate annotations: ``List[int]`` needs no import.
    """
    sys.modules[module.__name__] = module
    names = {}
    for part in ("setup", "program"):
        exec(compile(sources[part], f"<{part}>", "exec"), module.__dict__)
        names[part] = dict(module.__dict__)
    return names


def _function(names: dict[str, dict[str, Any]], name: str) -> Callable[..., object]:
    """Return what the program calls ``name``: a function, or the method of a new ``Solution``."""
    given, defined = names["setup"], names["program"]
    if name in defined and defined[name] is not given.get(name):
        return defined[name]
    return getattr(defined["Solution"](), name)


def _call(names: dict[str, dict[str, Any]], line: str) -> tuple[object, object]:
    name, arguments, keywords, want_arguments = decode(line)
    result = _function(names, name)(*arguments, **keywords)
    return result, (arguments, keywords) if want_arguments else None


def _attempt(action: Callable[..., tuple], *arguments: object) -> str:
    """Return the reply line: the value and arguments of ``action``, or the type of the exception it raised."""
    try:
        return encode(("value", *action(*arguments)))
    except BaseException as error:  # also SystemExit: exiting does not pass
        return encode(("error", type(error).__name__, None))
