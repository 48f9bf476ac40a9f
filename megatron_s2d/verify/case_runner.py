"""Runs the unit tests of a program in a process of their own, apart from the program. Standard library only.

    code verifier --label, on standard input--> case_runner.py (confined) <==calls and values==> program.py (confined)
         ^                                            |
         +-----------status, standard output ---------+

Usage: ``case_runner.py CALLS ANSWERS LIMITS``, the first two being open file descriptors. It prints one status:
``correct``, ``wrong`` (a test failed), ``error`` (the program raised), ``crash`` (the program ended or sent an invalid
reply), ``bad_label`` (the tests themselves could not run).
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

sys.path.pop(0)  # this folder, needed only for the imports above

_MAX_LINE_BYTES = 32 << 20
_FLOAT_TOLERANCE = 1e-6


class Crash(BaseException):
    """The program's process ended or sent an invalid reply. A BaseException, so that tests cannot catch it."""


class BadLabel(Exception):
    """The tests themselves could not run."""


class ProgramError(Exception):
    """The program raised an exception that is not built in, or one that would end the tests' loops."""


class RemoteFunction:
    """A function that runs in the program's process."""

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
        """Return the value of the last call, or raise its exception."""
        line = self._answers.readline(_MAX_LINE_BYTES)
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
        # Iterators that the tests build around the program (map, all) would take StopIteration for their regular end.
        ends_loops = (StopIteration, StopAsyncIteration)
        if isinstance(error, type) and issubclass(error, Exception) and not issubclass(error, ends_loops):
            raise error("in the program")
        raise ProgramError(str(value))


def _asserts(label: dict, function: RemoteFunction) -> bool:
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


def _reference(label: dict, function: RemoteFunction) -> bool:
    tolerance = max(label["tolerance"], _FLOAT_TOLERANCE)
    names = {"__name__": "reference"}
    try:
        exec(compile(label["reference"], "<reference>", "exec"), names)
        calls = calls_like(label["inputs"], ast.literal_eval(label["example"]))
    except Exception as error:
        raise BadLabel from error
    for arguments in calls:
        try:
            # Serialized like the program's value, so that both lose the same types.
            expected = decode(encode(names[label["entry_point"]](*copy.deepcopy(arguments))))
        except Exception as error:
            raise BadLabel from error
        if not _agrees(function(*arguments), expected, label["compare"], tolerance):
            return False
    return True


def _agrees(actual: Any, expected: Any, compare: str, tolerance: float) -> bool:
    if compare == "truth":
        return bool(actual) == bool(expected)
    if compare == "set":
        try:
            return set(actual) == set(expected)
        except TypeError:  # not a collection, or one of lists
            return equal(actual, expected, tolerance)
    return equal(actual, expected, tolerance)


def _examples(label: dict, function: RemoteFunction) -> bool:
    """Compare results with JSON values, for which a tuple counts as a list."""
    for arguments, expected in zip(label["inputs"], label["outputs"], strict=True):
        if not equal(_lists(function(*arguments)), expected, _FLOAT_TOLERANCE):
            return False
    return True


def _lists(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    return {key: _lists(item) for key, item in value.items()} if isinstance(value, dict) else value


_KINDS = {"asserts": _asserts, "reference": _reference, "examples": _examples}


def judge(label: dict, function: RemoteFunction) -> str:
    """Run the tests against ``function`` and return the status of the program."""
    try:
        function.answer()  # the reply to running the definitions
        return "correct" if _KINDS[label["kind"]](label, function) else "wrong"
    except BadLabel:
        return "bad_label"
    except (Crash, MemoryError):
        return "crash"
    except Exception:
        return "error" if function.failed else "wrong"  # the test raised on an unexpected value: it failed


def main() -> None:
    calls, answers, limits = sys.argv[1:]
    label = json.load(sys.stdin)
    status_file = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discard what tests print
    confine(**json.loads(limits))
    with open(int(calls), "w", encoding="utf-8") as call_file, open(int(answers), encoding="utf-8") as answer_file:
        status_file.write(judge(label, RemoteFunction(label["entry_point"], call_file, answer_file)))
        status_file.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
