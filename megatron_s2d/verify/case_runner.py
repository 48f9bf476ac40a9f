"""Runs the unit tests of a program in a process of their own, apart from the program. Standard library only.

``fork_server.py`` starts it with the label on standard input, and whenever it asks for one on descriptor 3, a fresh
process of the program (``program.py``). It prints one status: ``correct``, ``wrong`` (a test failed), ``error``
(the program raised), ``crash`` (it ended or sent an invalid reply), ``bad_label`` (the tests could not run).
"""

from __future__ import annotations

import ast
import builtins
import copy
import json
import os
import re
import socket
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from serialization import calls_like, decode, encode, equal, equal_json

_CONTROL = 3
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
_MAX_LINE_BYTES = 32 << 20
_FLOAT_TOLERANCE = 1e-6
_REPORT = "_s2d_report"  # what instrumented test code calls


class Crash(BaseException):
    """The program's process ended or sent an invalid reply. A BaseException, so that tests cannot catch it."""


class BadLabel(BaseException):
    """The tests themselves could not run."""


class ProgramError(Exception):
    """The program raised an exception that is not built in, or one that would end the tests' loops."""


class Program:
    """The program, in a process of its own that ``start`` replaces by a fresh one."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._files: list[Any] = []
        self.failed = False  # whether any call raised
        self.called = False

    def start(self) -> None:
        """Start a fresh process and run the definitions; raise their exception."""
        for file in self._files:
            file.close()
        os.write(self._control.fileno(), b"next")
        _, (calls, answers), _, _ = socket.recv_fds(self._control, 16, 2)
        self._files = [os.fdopen(calls, "w", encoding="utf-8"), os.fdopen(answers, encoding="utf-8")]
        self._answer()

    def call(self, name: str, arguments: tuple, keywords: dict[str, Any], want_arguments: bool = False) -> Any:
        """Return the value of a call, or raise its exception; with ``want_arguments``, change them as the call did."""
        try:
            line = encode((name, arguments, keywords, want_arguments), strict=True)
        except (TypeError, RecursionError) as error:
            raise BadLabel from error
        self.called = True
        try:
            self._files[0].write(line + "\n")
            self._files[0].flush()
        except BrokenPipeError:
            raise Crash from None
        value, after = self._answer()
        if want_arguments:
            try:
                _write_back((arguments, keywords), after)
            except (TypeError, ValueError, KeyError):
                raise Crash from None
        return value

    def _answer(self) -> tuple[Any, Any]:
        line = self._files[1].readline(_MAX_LINE_BYTES)
        if not line.endswith("\n"):
            raise Crash
        try:
            kind, value, after = decode(line)
        except ValueError:
            raise Crash from None
        if kind == "value":
            return value, after
        self.failed = True
        error = getattr(builtins, str(value), None)
        # Iterators that the tests build around the program (map, all) would take StopIteration for their regular end.
        ends_loops = (StopIteration, StopAsyncIteration)
        if isinstance(error, type) and issubclass(error, Exception) and not issubclass(error, ends_loops):
            raise error("in the program")
        raise ProgramError(str(value))


def _write_back(before: Any, after: Any) -> Any:
    """Change the containers in ``before`` in place to the values of ``after``; return what stands for ``after``."""
    if type(before) is not type(after):
        return after
    if isinstance(before, tuple) and len(before) == len(after):
        return tuple(_write_back(one, other) for one, other in zip(before, after, strict=True))
    if isinstance(before, (list, deque)):
        merged = [_write_back(one, other) for one, other in zip(before, after, strict=False)]
        merged += list(after)[len(merged) :]
        before.clear()
        before.extend(merged)
        return before
    if isinstance(before, dict):
        merged = {key: _write_back(before[key], item) if key in before else item for key, item in after.items()}
        before.clear()
        before.update(merged)
        return before
    if isinstance(before, set):
        before.clear()
        before.update(after)
        return before
    return after


class _Solution:
    """``Solution().name`` of the tests: a method of the program's class."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __call__(self) -> _Solution:
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _remote(self._program, name)


def _remote(program: Program, name: str) -> Callable[..., Any]:
    def function(*arguments: Any, **keywords: Any) -> Any:
        return program.call(name, arguments, keywords, want_arguments=True)

    function.__name__ = name
    return function


def _asserts(label: dict, program: Program) -> str:
    """Run test code: its ``check`` with the function, else its ``test_*`` functions; all may call it by name."""
    program.start()
    try:
        _run_test_code(label, program, compile(label["tests"], "<tests>", "exec"))
    except Exception as error:
        if not program.called:
            raise BadLabel from error  # not of the program's making
        if isinstance(error, AssertionError):
            return "wrong"
        raise
    if not program.called:
        raise BadLabel
    return "correct"


def _run_test_code(label: dict, program: Program, code: types.CodeType, more: dict[str, Any] | None = None) -> None:
    """Run ``code``, the test code, against the started program, with the names ``more`` in it."""
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(label["setup"], "<setup>", "exec"), names)
    except Exception as error:
        raise BadLabel from error
    functions = {name: _remote(program, name) for name in label.get("functions", [label["entry_point"]])}
    names |= functions | {"Solution": _Solution(program)} | (more or {})
    exec(code, names)
    if callable(names.get("check")):
        takes_function = getattr(names["check"], "__code__", None) is None or names["check"].__code__.co_argcount
        names["check"](*[functions[label["entry_point"]]] if takes_function else [])
    else:
        for name, test in list(names.items()):
            if name.startswith("test") and callable(test):
                test()


class _Instrumented(ast.NodeTransformer):
    """Reports every assert of test code, and continues after one that fails."""

    def __init__(self) -> None:
        self.count = 0

    def visit_Assert(self, node: ast.Assert) -> ast.Try:
        """Return the assert between calls of ``_REPORT``."""
        number, self.count = self.count, self.count + 1

        def report(passed: bool) -> ast.stmt:
            arguments: list[ast.expr] = [ast.Constant(number), ast.Constant(passed)]
            return ast.Expr(ast.Call(ast.Name(_REPORT, ast.Load()), arguments, []))

        handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [report(False)])
        return ast.Try([node, report(True)], [handler], [], [])


def _count_asserts(label: dict, program: Program) -> str:
    """Run test code to its end; return a status, the asserts that passed whenever they were reached, and all of them.

    An assert that is not reached has not passed, unless none failed and nothing was raised.
    """
    results: dict[int, bool] = {}

    def report(number: int, passed: bool) -> None:
        results[number] = results.get(number, True) and passed

    visitor = _Instrumented()
    tree = ast.fix_missing_locations(visitor.visit(ast.parse(label["tests"])))
    status = "correct"
    program.start()
    try:
        _run_test_code(label, program, compile(tree, "<tests>", "exec"), {_REPORT: report})
    except (Crash, MemoryError):
        status = "crash"
    except Exception as error:
        if not program.called:
            raise BadLabel from error  # not of the program's making
        status = "error" if program.failed else "wrong"
    if status != "crash" and not program.called:
        raise BadLabel
    if status == "correct" and not all(results.values()):
        status = "error" if program.failed else "wrong"
    total = max(1, visitor.count)
    return f"{status} {total if status == 'correct' else sum(results.values())} {total}"


def _reference_calls(label: dict) -> Iterator[tuple[list, Any]]:
    """Yield the arguments of each call and the result of the reference."""
    names = {"__name__": "reference"}
    try:
        exec(compile(label["reference"], "<reference>", "exec"), names)
        calls = calls_like(label["inputs"], ast.literal_eval(label["example"]))
        for arguments in calls:
            # Serialized like the program's value, so that both lose the same types.
            yield arguments, decode(encode(names[label["entry_point"]](*copy.deepcopy(arguments))))
    except Exception as error:
        raise BadLabel from error


def _reference(label: dict, program: Program) -> str:
    tolerance = max(label["tolerance"], _FLOAT_TOLERANCE)
    program.start()  # one process for all calls, hundreds in MBPP+, as in EvalPlus
    for arguments, expected in _reference_calls(label):
        value = program.call(label["entry_point"], tuple(arguments), {})
        if not _agrees(value, expected, label["compare"], tolerance):
            return "wrong"
    return "correct"


def _count_reference(label: dict, program: Program) -> str:
    """Make all calls; return the first status that is not ``correct``, the calls that agreed, and their number.

    They share a process, as in EvalPlus; one that ends is replaced for the calls that follow.
    """
    tolerance = max(label["tolerance"], _FLOAT_TOLERANCE)
    passed, total, first_failure, is_running = 0, 0, "correct", False
    for arguments, expected in _reference_calls(label):
        total, status, program.failed = total + 1, "wrong", False
        try:
            if not is_running:
                program.start()
                is_running = True
            value = program.call(label["entry_point"], tuple(arguments), {})
            status = "correct" if _agrees(value, expected, label["compare"], tolerance) else "wrong"
        except (Crash, MemoryError):
            status, is_running = "crash", False
        except Exception:
            status = "error" if program.failed else "wrong"
        passed += status == "correct"
        if first_failure == "correct":
            first_failure = status
    return f"{first_failure} {passed} {max(1, total)}"


def _agrees(actual: Any, expected: Any, compare: str, tolerance: float) -> bool:
    if compare == "truth":
        return bool(actual) == bool(expected)
    if compare == "set":
        try:
            return set(actual) == set(expected)
        except TypeError:  # not a collection, or one of lists
            return equal(actual, expected, tolerance)
    return equal(actual, expected, tolerance)


def _examples(label: dict, program: Program) -> str:
    """Compare results with JSON values, or all of them with the one item of each (APPS wraps results in a list)."""
    readings = {"whole", "item"}
    for arguments, expected in zip(label["inputs"], label["outputs"], strict=True):
        readings &= _passing(label, program, arguments, expected)
        if not readings:
            return "wrong"
    return "correct"


def _passing(label: dict, program: Program, arguments: list, expected: Any) -> set[str]:
    """Return the readings of the expected result by which a fresh process of the program passes a case."""
    program.start()
    value = program.call(label["entry_point"], tuple(map(_with_integer_keys, arguments)), {})
    wrapped = isinstance(expected, list) and len(expected) == 1
    passing = {"whole"} if equal_json(value, expected) else set()
    return passing | ({"item"} if wrapped and equal_json(value, expected[0]) else set())


def _count_examples(label: dict, program: Program) -> str:
    """Run all cases; return the first status that is not ``correct``, the cases that passed, and their number."""
    passed, first_failure = {"whole": 0, "item": 0}, "correct"
    for arguments, expected in zip(label["inputs"], label["outputs"], strict=True):
        program.failed = False
        passing: set[str] = set()
        status = "wrong"
        try:
            passing = _passing(label, program, arguments, expected)
        except (Crash, MemoryError):
            status = "crash"
        except Exception:
            status = "error" if program.failed else "wrong"
        for reading in passing:
            passed[reading] += 1
        if first_failure == "correct" and not passing:
            first_failure = status
    best, total = max(passed.values()), len(label["outputs"])
    return f"{'wrong' if first_failure == 'correct' and best < total else first_failure} {best} {total}"


def _with_integer_keys(value: Any) -> Any:
    """Return JSON with an integer for every key of an object that has only integers, of which JSON makes text."""
    if isinstance(value, list):
        return [_with_integer_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    are_integers = all(_INTEGER.fullmatch(key) for key in value)
    return {int(key) if are_integers else key: _with_integer_keys(item) for key, item in value.items()}


_COUNTED = {"asserts": _count_asserts, "reference": _count_reference, "examples": _count_examples}
_KINDS = {"asserts": _asserts, "reference": _reference, "examples": _examples}


def judge(label: dict, program: Program) -> str:
    """Run the tests against ``program`` and return its status."""
    try:
        return (_COUNTED if label.get("partial_credit") else _KINDS)[label["kind"]](label, program)
    except BadLabel:
        return "bad_label"
    except (Crash, MemoryError):
        return "crash"
    except SystemExit:
        return "bad_label"  # a program cannot raise it here
    except Exception:
        return "error" if program.failed else "wrong"  # the test raised on an unexpected value: it failed


def run_tests(confine: Callable[[], object]) -> None:
    """Read the label, judge the program, print the status. Does not return."""
    os.lseek(0, 0, os.SEEK_SET)
    with open(0, encoding="utf-8", closefd=False) as label_file:
        label = json.load(label_file)
    status_file = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discard what tests print
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, _CONTROL)
    confine()
    status_file.write(judge(label, Program(control)))
    status_file.flush()
    os._exit(0)
