"""Plain Python values as JSON, with their types: what a foreign program and the tests of it exchange.

Only data crosses: numbers, text, bytes and containers of them; of a named tuple, an enumeration of numbers or a scalar
of numpy its plain part. Anything else becomes ``Opaque``, which equals nothing and knows only whether it was true. So a
program cannot hand its judge an object with an ``__eq__`` of its own.
Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

_SAFE_INTEGER = 1 << 53
_COMPLEX = re.compile(r"\(?[-+.\de]*\dj\)?")
_CONTAINERS = (list, tuple, set, dict)


class Opaque:
    """A value that is not plain data."""

    def __init__(self, truth: bool) -> None:
        self._truth = truth

    def __bool__(self) -> bool:
        return self._truth

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None


_SEQUENCES = {tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}
_MAPPINGS = {dict: "dict", OrderedDict: "dict", defaultdict: "dict", Counter: "dict"}
_MAKERS = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


def encode(value: Any) -> str:
    """One line of text for ``value``."""
    return json.dumps(_pack(value))


def decode(text: str) -> Any:
    """The value of a line that ``encode`` wrote. Raises ``ValueError`` for any other text."""
    try:
        return _unpack(json.loads(text))
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not an encoded value: {error}") from None


def equal(found: Any, expected: Any, tolerance: float) -> bool:
    """Python's equality, but floats within a relative or absolute tolerance and nan equal to nan, at any depth."""
    if type(found) in (int, float) and type(expected) in (int, float) and float in (type(found), type(expected)):
        both_nan = math.isnan(found) and math.isnan(expected)
        return both_nan or math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    if type(found) is not type(expected):
        return found == expected
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(
            equal(one, other, tolerance) for one, other in zip(found, expected, strict=True)
        )
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key], tolerance) for key in expected)
    return found == expected


def calls_like(calls: list[list], example: tuple) -> list[list]:
    """The arguments of calls from JSON, with the types of the call ``example``.

    Complex numbers come as text; where one call has one ("1j"), the texts in place of numbers ("2") are numbers in all.
    """
    found = [list(like(arguments, example)) for arguments in calls]
    texts = [
        (arguments, place)
        for arguments in found
        for place, (value, shown) in enumerate(zip(arguments, example, strict=False))
        if isinstance(value, str) and isinstance(shown, (int, float, complex))
    ]
    if any(_COMPLEX.fullmatch(arguments[place]) for arguments, place in texts):
        for arguments, place in texts:
            arguments[place] = complex(arguments[place])
    return found


def like(value: Any, example: Any) -> Any:
    """``value`` from JSON with the types that ``example`` shows: tuples and sets are not JSON.

    ``like([[1, [2]], [3, 4]], ((1, (2,)), {5}))`` is ``((1, (2,)), {3, 4})``.
    """
    if isinstance(value, dict) and isinstance(example, dict) and example:
        return {key: like(item, next(iter(example.values()))) for key, item in value.items()}
    if not isinstance(value, list) or not isinstance(example, (list, tuple, set)):
        return value
    shown = list(example)
    # For what lies beyond the example: the first container that it shows, or one like itself.
    general = next((item for item in shown if isinstance(item, _CONTAINERS)), type(example)())
    found = []
    for place, item in enumerate(value):
        own = shown[place] if place < len(shown) else shown[-1] if shown else None
        found.append(like(item, general if isinstance(item, list) and not isinstance(own, _CONTAINERS) else own))
    return type(example)(found)


def _pack(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if abs(value) < _SAFE_INTEGER else {"int": hex(value)}  # no limit on digits, no loss
    if kind is float:
        return {"float": value.hex()}  # tells 1.0 from 1, and keeps nan and infinities
    if kind is list:
        return [_pack(item) for item in value]
    if kind in _SEQUENCES:
        return {_SEQUENCES[kind]: [_pack(item) for item in value]}
    if kind in _MAPPINGS:
        return {"dict": [[_pack(key), _pack(item)] for key, item in value.items()]}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    for plain in (str, int, float, tuple, list, dict):  # a named tuple or an enumeration, by its plain part
        if isinstance(value, plain):
            return _pack(plain(value) if plain in _CONTAINERS else plain.__add__(value, plain()))
    if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _pack(value.item())
    return {"opaque": bool(value)}


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in _MAKERS:
        return _MAKERS[kind](_unpack(item) for item in content)
    if kind == "dict":
        return {_unpack(key): _unpack(item) for key, item in content}
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(float.fromhex(content[0]), float.fromhex(content[1]))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "range":
        return range(*content)
    if kind == "opaque":
        return Opaque(bool(content))
    raise ValueError(f"unknown kind {kind}")
