"""Plain Python values as JSON with their types: the exchange format between an untrusted program and its tests.

Only data crosses: numbers, text, bytes and containers of them. A named tuple, a numeric enumeration or a numpy scalar
crosses as its plain value. Anything else becomes ``Opaque``, which equals nothing and has only a truth value, so a
program cannot hand its tests an object with an ``__eq__`` of its own. Standard library only.
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


def encode(value: Any, strict: bool = False) -> str:
    """Return ``value`` as one line of text. With ``strict``, raise ``TypeError`` if a part of it is not plain data.

    An ``Opaque`` that was received passes.
    """
    return json.dumps(_pack(value, strict))


def decode(text: str) -> Any:
    """Return the value of a line written by ``encode``; raise ``ValueError`` for any other text."""
    try:
        return _unpack(json.loads(text))
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not an encoded value: {error}") from None


def equal(actual: Any, expected: Any, tolerance: float) -> bool:
    """Compare like ``==``, but at any depth floats within a tolerance are equal, and so are nan and nan."""
    if type(actual) in (int, float) and type(expected) in (int, float) and float in (type(actual), type(expected)):
        both_nan = math.isnan(actual) and math.isnan(expected)
        return both_nan or math.isclose(actual, expected, rel_tol=tolerance, abs_tol=tolerance)
    if type(actual) is not type(expected):
        return actual == expected
    if isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(
            equal(one, other, tolerance) for one, other in zip(actual, expected, strict=True)
        )
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(
            equal(actual[key], expected[key], tolerance) for key in expected
        )
    return actual == expected


def equal_json(actual: Any, expected: Any) -> bool:
    """Compare a result with a value read from JSON, which has lists for tuples and text for the keys of objects.

    Floats are equal within 1e-6 of their size (1e-9 near zero), an integer and a float within rounding.
    """
    if isinstance(expected, list):
        return (
            isinstance(actual, (list, tuple))
            and len(actual) == len(expected)
            and all(equal_json(one, other) for one, other in zip(actual, expected, strict=True))
        )
    if isinstance(expected, dict):
        if not isinstance(actual, dict):
            return False
        named = {_json_key(key): item for key, item in actual.items()}  # 1 and "1" are the same key in JSON
        return (
            len(named) == len(actual)
            and named.keys() == expected.keys()
            and all(equal_json(named[key], expected[key]) for key in expected)
        )
    kinds = {type(actual), type(expected)}
    if float not in kinds or not kinds <= {int, float}:
        return actual == expected
    if math.isnan(actual) or math.isnan(expected):
        return math.isnan(actual) and math.isnan(expected)
    relative, absolute = (1e-6, 1e-9) if kinds == {float} else (1e-12, 1e-12)
    try:
        return math.isclose(actual, expected, rel_tol=relative, abs_tol=absolute)
    except OverflowError:  # an integer beyond the floats
        return False


def _json_key(key: Any) -> Any:
    """Return the text that JSON has for a key; other keys unchanged."""
    if key is None or isinstance(key, bool):
        return json.dumps(key)
    return repr(key) if isinstance(key, (int, float)) else key


def calls_like(calls: list[list], example: tuple) -> list[list]:
    """Return ``calls``, read from JSON, with arguments converted to the types of the call ``example``.

    JSON has complex numbers as text. If one call has one ("1j"), texts in place of numbers ("2") are numbers in all.
    """
    typed = [list(like(arguments, example)) for arguments in calls]
    texts = [
        (arguments, index)
        for arguments in typed
        for index, (value, shown) in enumerate(zip(arguments, example, strict=False))
        if isinstance(value, str) and isinstance(shown, (int, float, complex))
    ]
    if any(_COMPLEX.fullmatch(arguments[index]) for arguments, index in texts):
        for arguments, index in texts:
            arguments[index] = complex(arguments[index])
    return typed


def like(value: Any, example: Any) -> Any:
    """Convert ``value`` from JSON to the types in ``example``, because JSON has no tuples and sets.

    ``like([[1, [2]], [3, 4]], ((1, (2,)), {5}))`` is ``((1, (2,)), {3, 4})``.
    """
    if isinstance(value, dict) and isinstance(example, dict) and example:
        return {key: like(item, next(iter(example.values()))) for key, item in value.items()}
    if not isinstance(value, list) or not isinstance(example, (list, tuple, set)):
        return value
    templates = list(example)
    # For items beyond the example: its first container, or an empty one of the type of the example.
    general = next((item for item in templates if isinstance(item, _CONTAINERS)), type(example)())
    items = []
    for index, item in enumerate(value):
        template = templates[index] if index < len(templates) else templates[-1] if templates else None
        use_general = isinstance(item, list) and not isinstance(template, _CONTAINERS)
        items.append(like(item, general if use_general else template))
    return type(example)(items)


def _pack(value: Any, strict: bool) -> Any:
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if abs(value) < _SAFE_INTEGER else {"int": hex(value)}  # no limit on digits, no loss
    if kind is float:
        return {"float": value.hex()}  # distinguishes 1.0 from 1 and keeps nan and infinities
    if kind is list:
        return [_pack(item, strict) for item in value]
    if kind in _SEQUENCES:
        return {_SEQUENCES[kind]: [_pack(item, strict) for item in value]}
    if kind in _MAPPINGS:
        return {"dict": [[_pack(key, strict), _pack(item, strict)] for key, item in value.items()]}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    for plain in (str, int, float, tuple, list, dict):  # a named tuple or an enumeration as its plain value
        if isinstance(value, plain):
            return _pack(plain(value) if plain in _CONTAINERS else plain.__add__(value, plain()), strict)
    if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _pack(value.item(), strict)
    if strict and kind is not Opaque:
        raise TypeError(f"{kind.__name__} is not plain data")
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
