"""The confined process that runs an untrusted program. A script of its own: standard library only.

``program.py call FILE_DESCRIPTOR LIMITS`` runs the definitions, then answers calls: a line ``encode((name, arguments,
keywords))`` on standard input gets the reply ``encode(("value", result))`` or ``encode(("error", type name))``.
``program.py script FILE_DESCRIPTOR LIMITS`` runs the program as ``__main__`` between standard input and output.
The program is read from the open file descriptor as JSON, ``{"setup", "program"}``, and run in this order. This process
does not know the expected results, and its output is trusted only as the value of a call.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from sandbox import confine
from serialization import decode, encode

sys.path.pop(0)  # this folder, needed only for the imports above


def main() -> None:
    mode, descriptor, limits = sys.argv[1:]
    with open(int(descriptor), encoding="utf-8") as file:
        sources = json.load(file)
    calls = answers = None
    if mode == "call":
        # Discard what the program prints.
        calls, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
        devnull = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1):
            os.dup2(devnull, standard)
    sys.argv[:] = ["program"]
    confine(**json.loads(limits))
    names = {"__name__": "__main__" if mode == "script" else "program", "__builtins__": __builtins__}
    if mode == "script":
        _define(sources, names)
        return
    answers.write(_attempt(_define, sources, names) + "\n")
    answers.flush()
    for line in calls:
        answers.write(_attempt(_call, names, *decode(line)) + "\n")
        answers.flush()


def _define(sources: dict[str, str], names: dict[str, object]) -> None:
    for part in ("setup", "program"):
        exec(compile(sources[part], f"<{part}>", "exec"), names)


def _call(functions: dict[str, Any], name: str, arguments: tuple, keywords: dict[str, Any]) -> object:
    return functions[name](*arguments, **keywords)


def _attempt(action: Callable[..., object], *arguments: object) -> str:
    """Return the reply line: the value of the call or the type of the exception it raised."""
    try:
        return encode(("value", action(*arguments)))
    except BaseException as error:  # also SystemExit: exiting does not pass
        return encode(("error", type(error).__name__))


if __name__ == "__main__":
    main()
