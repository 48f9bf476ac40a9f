"""The confined process that runs a foreign program. A script of its own: standard library only.

``program.py call FILE_DESCRIPTOR LIMITS`` runs the definitions, then answers calls: a line ``encode((name, arguments,
keywords))`` on the standard input is answered with ``encode(("value", result))`` or ``encode(("error", type name))``.
``program.py script FILE_DESCRIPTOR LIMITS`` runs the program as ``__main__`` between standard input and output.
The program is read from the open file descriptor: ``{"setup", "program"}`` as JSON, run in this order. Nothing here
knows what is expected of the program, and nothing it writes is believed to be more than the value of a call.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from sandbox import confine
from serialization import decode, encode

sys.path.pop(0)  # this folder, which was needed for the lines above only


def main() -> None:
    mode, descriptor, limits = sys.argv[1:]
    with open(int(descriptor), encoding="utf-8") as file:
        sources = json.load(file)
    calls = answers = None
    if mode == "call":
        # What the program prints goes nowhere.
        calls, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1):
            os.dup2(nowhere, standard)
    sys.argv[:] = ["program"]
    confine(**json.loads(limits))
    names = {"__name__": "__main__" if mode == "script" else "program", "__builtins__": __builtins__}
    if mode == "script":
        _define(sources, names)
        return
    answers.write(_attempt(lambda: _define(sources, names)) + "\n")
    answers.flush()
    for line in calls:
        name, arguments, keywords = decode(line)
        answers.write(_attempt(lambda: names[name](*arguments, **keywords)) + "\n")
        answers.flush()


def _define(sources: dict[str, str], names: dict[str, object]) -> None:
    for part in ("setup", "program"):
        exec(compile(sources[part], f"<{part}>", "exec"), names)


def _attempt(action: Callable[[], object]) -> str:
    """The line that tells the value of ``action``, or what it raised."""
    try:
        return encode(("value", action()))
    except BaseException as error:  # also SystemExit: leaving is not passing
        return encode(("error", type(error).__name__))


if __name__ == "__main__":
    main()
