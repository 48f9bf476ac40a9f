"""The process that holds the tests and judges the values that a program's process returns. Standard library only.

    code grader --label, on standard input--> tester (confined) <==calls and values==> candidate (confined)
         ^                                       |
         +-------- one word, standard output ----+

``case_runner.py CALLS ANSWERS LIMITS`` with two open file descriptors. The words: ``correct``, ``wrong`` (a test failed),
``error`` (the program raised), ``crash`` (it ended), ``bad_label`` (the tests themselves failed to run).
"""

from __future__ import annotations

import ast
import builtins
import copy
import json
import os
import sys
from typing import Any

from sandbox import confine
from serialization import calls_like, decode, encode, equal

sys.path.pop(0)  # this folder, which was needed for the lines above only

_LONGEST_LINE = 32 << 20
_FLOAT_TOLERANCE = 1e-6


class Crash(BaseException):
    """The program's process has ended or talks nonsense; a test's ``except`` clauses do not stop it."""


class BadLabel(Exception):
    """The tests fail by themselves."""


class ProgramError(Exception):
    """The program raised something that is no built-in exception."""


class Remote:
    """A function of the program's process."""

    def __init__(self, name: str, calls: Any, answers: Any) -> None:
        self._name, self._calls, self._answers = name, calls, answers
        self.failed = False  # whether any call raised

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            self._calls.write(encode((self._name, arguments, keywords)) + "\n")
            self._calls.flush()
        except BrokenPipeError:
            raise Crash from None
        return self.answer()

    def answer(self) -> Any:
        """The value of the last call, or the exception it raised."""
        line = self._answers.readline(_LONGEST_LINE)
        if not line.endswith("\n"):
            raise Crash
        try:
            kind, value = decode(line)
        except ValueError:
            raise Crash from None
        if kind == "value":
            return value
        self.failed = True
        error = getattr(builtins, str(value), None)
        if isinstance(error, type) and issubclass(error, Exception):
            raise error("in the program")
        raise ProgramError(str(value))


def _asserts(label: dict, function: Remote) -> bool:
    names = {"__name__": "tests"}
    try:
        exec(compile(label["setup"], "<setup>", "exec"), names)
        names[label["entry_point"]] = function  # some tests of HumanEval call the function by its name
        exec(compile(label["tests"], "<tests>", "exec"), names)
        check = names["check"]
    except Exception as error:
        raise BadLabel from error
    try:
        check(function)
    except AssertionError:
        return False
    return True


def _reference(label: dict, function: Remote) -> bool:
    tolerance = max(label["tolerance"], _FLOAT_TOLERANCE)
    names = {"__name__": "reference"}
    try:
        exec(compile(label["reference"], "<reference>", "exec"), names)
        calls = calls_like(label["inputs"], ast.literal_eval(label["example"]))
    except Exception as error:
        raise BadLabel from error
    for arguments in calls:
        try:
            # Through the wire, as the program's value: what is opaque there is opaque here.
            expected = decode(encode(names[label["entry_point"]](*copy.deepcopy(arguments))))
        except Exception as error:
            raise BadLabel from error
        if not _agrees(function(*arguments), expected, label["compare"], tolerance):
            return False
    return True


def _agrees(found: Any, expected: Any, compare: str, tolerance: float) -> bool:
    if compare == "truth":
        return bool(found) == bool(expected)
    if compare == "set":
        try:
            return set(found) == set(expected)
        except TypeError:  # not a collection, or one of lists
            return equal(found, expected, tolerance)
    return equal(found, expected, tolerance)


def _examples(label: dict, function: Remote) -> bool:
    """Arguments and results as JSON has them, so a tuple may stand for a list."""
    for arguments, expected in zip(label["inputs"], label["outputs"], strict=True):
        if not equal(_lists(function(*arguments)), expected, _FLOAT_TOLERANCE):
            return False
    return True


def _lists(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    return {key: _lists(item) for key, item in value.items()} if isinstance(value, dict) else value


_KINDS = {"asserts": _asserts, "reference": _reference, "examples": _examples}


def judge(label: dict, function: Remote) -> str:
    """The word on a program, from its values."""
    try:
        function.answer()  # the definitions were run
        return "correct" if _KINDS[label["kind"]](label, function) else "wrong"
    except BadLabel:
        return "bad_label"
    except (Crash, MemoryError):
        return "crash"
    except Exception:
        return "error" if function.failed else "wrong"  # a test that trips over an odd value has failed


def main() -> None:
    calls, answers, limits = sys.argv[1:]
    label = json.load(sys.stdin)
    verdict = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what tests print goes nowhere
    confine(**json.loads(limits))
    with open(int(calls), "w", encoding="utf-8") as out, open(int(answers), encoding="utf-8") as back:
        verdict.write(judge(label, Remote(label["entry_point"], out, back)))
        verdict.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
