"""Equality of numbers and expressions: exact where both are exact, by rounding for decimals, by values with symbols."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import mpmath
from mpmath import mp

from megatron_s2d.verify.mathematics.nodes import Node, symbols_of
from megatron_s2d.verify.mathematics.values import Evaluator, NoValueError, Value, number

ROUNDED_DIGITS = 6  # a decimal with fewer significant digits equals only itself
_NOISE_DIGITS = 15  # 0.30000000000000004 is 0.3
_POINTS, _NEEDED_POINTS = 8, 3
_GUARD, _BASE_DIGITS, _MAX_DIGITS = 20, 50, 6000


def same_number(label: Node, answer: Node, least_digits: int = ROUNDED_DIGITS) -> bool:
    """Return whether two expressions have the same value, at every point if they have symbols.

    A decimal with ``least_digits`` significant digits may round the other number. False if a value does not exist.
    """
    infinities = [_infinity(node) for node in (label, answer)]
    if any(infinities):
        return infinities[0] == infinities[1]
    names = sorted(symbols_of(label) | symbols_of(answer))
    if names:
        return _same_everywhere(label, answer, names)
    try:
        values = _values(label, answer, {})
    except NoValueError:
        return False
    if values is None:
        return True
    decimals = [_decimal(node) for node in (label, answer)]
    (x, x_decimal), (y, y_decimal) = zip(values, decimals, strict=True)
    if x_decimal is None and y_decimal is None:
        return False
    return _rounds(y_decimal, x, x_decimal, least_digits) or _rounds(x_decimal, y, y_decimal, least_digits)


def same_ratio(label: Node, answer: Node, *, positive: bool) -> bool:
    """Return whether ``answer`` is ``label`` times a number other than zero, which is ``positive`` if asked for."""
    names = sorted(symbols_of(label) | symbols_of(answer))
    pairs: list[tuple[Value, Value]] = []
    digits = _MAX_DIGITS
    for point in _points(names):
        try:
            x, y, used = _precise_values(label, answer, point)
        except NoValueError:
            continue
        if x == 0 or y == 0:
            if x != y:
                return False
            continue
        if positive and (not _is_real(x) or not _is_real(y) or (x > 0) != (y > 0)):
            return False
        pairs.append((x, y))
        digits = min(digits, used)
    if len(pairs) < _NEEDED_POINTS:
        return False
    (x, y), *rest = pairs
    if all(isinstance(value, Fraction) for pair in pairs for value in pair):
        return all(x * b == y * a for a, b in rest)
    with mpmath.workdps(digits):
        return all(_close(number(x) * number(b), number(y) * number(a), 0) for a, b in rest)


def _is_real(value: Value) -> bool:
    return isinstance(value, Fraction | mpmath.mpf)


def _infinity(node: Node) -> int:
    if node == Node("constant", ("infinity",)):
        return 1
    if node.kind in ("negative", "quantity"):
        return _infinity(node.args[0]) * (-1 if node.kind == "negative" else 1)
    return 0


def _values(label: Node, answer: Node, point: dict[str, Fraction]) -> tuple[Value, Value] | None:
    """Return the two values, or None if they are equal. Raises ``NoValueError``."""
    with mpmath.workdps(_BASE_DIGITS):
        evaluator = Evaluator(point)
        x, y = evaluator.value(label), evaluator.value(answer)
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return None if x == y else (x, y)
        if not _close(x, y, evaluator.largest):
            return x, y
    # Equal so far: so many digits that what is built from the numbers in these expressions cannot hide behind them.
    with mpmath.workdps(_needed_digits(evaluator)):
        evaluator = Evaluator(point)
        x, y = evaluator.value(label), evaluator.value(answer)
        return None if _close(x, y, evaluator.largest) else (x, y)


def _precise_values(label: Node, answer: Node, point: dict[str, Fraction]) -> tuple[Value, Value, int]:
    """Return the two values and the number of their digits. Raises ``NoValueError``."""
    with mpmath.workdps(_BASE_DIGITS):
        evaluator = Evaluator(point)
        evaluator.value(label), evaluator.value(answer)
    digits = _needed_digits(evaluator)
    with mpmath.workdps(digits):
        return Evaluator(point).value(label), Evaluator(point).value(answer), digits


def _needed_digits(evaluator: Evaluator) -> int:
    digits = _BASE_DIGITS + 2 * evaluator.digits
    if digits > _MAX_DIGITS:
        raise NoValueError("too many digits")
    return digits


def _close(x: Value, y: Value, largest: Any) -> bool:
    x, y = number(x), number(y)
    scale = max(abs(x), abs(y), largest)
    return bool(abs(x - y) <= scale * mpmath.mpf(10) ** (_GUARD - mp.dps))


def _same_everywhere(label: Node, answer: Node, names: list[str]) -> bool:
    found = 0
    for point in _points(names):
        try:
            if _values(label, answer, point) is not None:
                return False
        except NoValueError:
            continue
        found += 1
    return found >= _NEEDED_POINTS


def _points(names: list[str]) -> Iterator[dict[str, Fraction]]:
    """Yield values of the symbols, the same in every process: positive ones, then of any sign; small and large."""
    for index in range(_POINTS):
        yield {name: _coordinate(index, name) for name in names}


@functools.lru_cache(maxsize=4096)
def _coordinate(index: int, name: str) -> Fraction:
    source = random.Random(f"{index}:{name}")
    value = Fraction(source.randrange(40, 240), source.choice((7, 11, 13, 17, 19, 23, 29, 31)))
    value = 1 / value if index % 2 else value
    return value if index < 2 or source.random() < 0.5 else -value


# ------------------------------------------------------------------------------------------------------------ decimals
def _decimal(node: Node) -> tuple[Fraction, int, int] | None:
    """Return (value, significant digits, decimal places) of ``-0.125`` or ``1.25 \\times 10^{-1}``."""
    if node.kind == "number" and node.args[1] is not None:
        return node.args
    if node.kind == "negative":
        inner = _decimal(node.args[0])
        return inner and (-inner[0], *inner[1:])
    if node.kind == "product" and len(node.args) == 2 and node.args[1].kind == "power":
        inner, (base, exponent) = _decimal(node.args[0]), node.args[1].args
        try:
            power = Evaluator().value(exponent)
            if inner is None or Evaluator().value(base) != 10 or not isinstance(power, Fraction):
                return None
        except NoValueError:
            return None
        if power.denominator == 1 and abs(power) < 10_000:
            return inner[0] * Fraction(10) ** int(power), inner[1], inner[2] - int(power)
    return None


def _length(value: int) -> int:
    """Return the number of digits of a positive integer of any size; at most one too many."""
    return int(value.bit_length() * math.log10(2)) + 1


def _rounds(
    decimal: tuple[Fraction, int, int] | None, value: Value, other: tuple[Fraction, int, int] | None, least: int
) -> bool:
    """Return whether the written ``decimal`` is ``value`` rounded or cut off at its last digit.

    An integer is an exact number, which no decimal rounds. A decimal does not round a shorter one (``other``), apart
    from the noise of floating point in its last digits.
    """
    if decimal is None or not _is_real(value):
        return False
    written, digits, places = decimal
    if (isinstance(value, Fraction) and value.denominator == 1 and other is None) or (value < 0) != (written < 0):
        return False
    shift = Fraction(10) ** places
    with mpmath.workdps(_BASE_DIGITS):
        if isinstance(value, Fraction):
            cut, rounded = math.floor(abs(value) * shift), math.floor(abs(value) * shift + Fraction(1, 2))
        else:
            scaled = abs(value) * number(shift)
            if mpmath.mag(scaled) > 3 * _BASE_DIGITS:  # more digits written than are known here
                return False
            cut, rounded = int(mpmath.floor(scaled)), int(mpmath.floor(scaled + mpmath.mpf(0.5)))
        # 0.999999 is 1 - 1/2^60 cut off, but does not say so.
        tells = rounded % 10 ** max(0, _length(rounded) - least + 1) != 0
        is_short = isinstance(value, Fraction) and (value * 10**12).denominator == 1
        difference = abs(number(written) - number(value))
        if digits >= _NOISE_DIGITS and (tells or is_short) and difference <= abs(number(value)) * mpmath.mpf("1e-14"):
            return True
    if digits < least or (other is not None and other[1] < digits):
        return False
    return abs(written) * shift in ((cut, rounded) if tells else (rounded,))
