"""Values of expression trees: exact fractions where possible, else numbers of many digits.

A tree evaluates to a ``Fraction``, or to a number of mpmath where roots, constants and functions occur. Sizes are
limited before they are computed (``9^{9^9}`` raises ``NoValueError``), so evaluation cannot exhaust time or memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath
from mpmath import mp

from megatron_s2d.verify.mathematics.nodes import Node

_MAX_BITS = 100_000  # of numerator and denominator of an exact number: 30,000 digits
_MAX_FACTORIAL = 3_000
_MAX_LOG2 = 200_000  # of a number that is not exact
type Value = Fraction | Any  # Any: mpmath.mpf or mpmath.mpc


class NoValueError(ArithmeticError):
    """The tree has no number as its value: an infinity, a division by zero, something too large, or no expression."""


class Evaluator:
    """Evaluates trees at the precision of ``mp``; ``symbols`` has the values of the free symbols.

    ``largest`` records the largest operand of a sum, and ``digits`` the decimal digits of the longest exact number or
    the largest or smallest magnitude so far: they say how many digits a comparison needs.
    """

    def __init__(self, symbols: Mapping[str, Fraction] | None = None) -> None:
        self._symbols = symbols or {}
        self.largest, self.digits = mpmath.mpf(0), 0

    def value(self, node: Node) -> Value:
        """Return the value of ``node``. Raises ``NoValueError``."""
        rule = _RULES.get(node.kind)
        if rule is None:
            raise NoValueError(f"a {node.kind} is no number")
        try:
            value = rule(self, *node.args)
        except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
            raise NoValueError(str(error)) from error
        return self._checked(value)

    def _checked(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            if bits > _MAX_BITS:
                raise NoValueError("too large")
            self.digits = max(self.digits, bits // 3)
        elif not mpmath.isfinite(value):
            raise NoValueError("too large")
        elif value != 0:
            self._use(abs(mpmath.mag(value)))
        return value

    def _use(self, bits: int) -> None:
        """Record a magnitude of ``bits``; raise ``NoValueError`` beyond the limit."""
        if bits > _MAX_LOG2:
            raise NoValueError("too large")
        self.digits = max(self.digits, bits // 3)

    def _symbol(self, name: str) -> Value:
        if name not in self._symbols:
            raise NoValueError(f"the value of {name} is not known")
        return self._symbols[name]

    def _sum(self, *terms: Node) -> Value:
        values = [self.value(term) for term in terms]
        if all(isinstance(value, Fraction) for value in values):
            return self._checked(sum(values, Fraction(0)))
        numbers = [number(value) for value in values]
        self.largest = max(self.largest, *(abs(value) for value in numbers))
        return mpmath.fsum(numbers)

    def _product(self, *factors: Node) -> Value:
        result: Value = Fraction(1)
        for factor in factors:
            value = self.value(factor)
            if isinstance(result, Fraction) and isinstance(value, Fraction):
                result = self._checked(result * value)
            else:
                result = Fraction(0) if value == 0 or result == 0 else number(result) * number(value)
        return result

    def _inverse(self, node: Node) -> Value:
        value = self.value(node)
        return 1 / value if isinstance(value, Fraction) else 1 / _nonzero(value)

    def _power(self, base_node: Node, exponent_node: Node) -> Value:
        exponent = self.value(exponent_node)
        if base_node == Node("constant", ("e",)):
            return mpmath.exp(_bounded(number(exponent), 100_000))
        return self._raise(self.value(base_node), exponent)

    def _raise(self, base: Value, exponent: Value) -> Value:
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            if exponent.denominator == 1:
                return self._integer_power(base, exponent.numerator)
            root = _exact_root(base, exponent.denominator)
            if root is not None:
                return self._integer_power(root, exponent.numerator)
        if base == 0:
            raise NoValueError("a power of zero")
        base_number, exponent_number = number(base), number(exponent)
        if abs(mpmath.mag(exponent_number)) > 40 or abs(exponent_number) * abs(mpmath.mag(base_number)) > _MAX_LOG2:
            raise NoValueError("too large")
        return mpmath.power(base_number, exponent_number)

    def _integer_power(self, base: Fraction, exponent: int) -> Fraction:
        if base in (0, 1, -1):
            if base == 0 and exponent <= 0:
                raise NoValueError("a power of zero")
            return base ** (exponent % 2 if base == -1 else min(exponent, 1))
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * (bits - 1) > _MAX_BITS:
            raise NoValueError("too large")
        return base**exponent

    def _root(self, node: Node, degree_node: Node) -> Value:
        value, degree = self.value(node), self.value(degree_node)
        if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 < degree <= 1000:
            raise NoValueError("degree of a root")
        if isinstance(value, Fraction):
            sign = -1 if value < 0 and degree.numerator % 2 else 1  # the real root, as is written in school
            root = _exact_root(abs(value) if sign < 0 else value, degree.numerator)
            if root is not None:
                return sign * root
            return sign * mpmath.power(number(sign * value), 1 / number(degree))
        if value == 0:
            return Fraction(0)
        negative = isinstance(value, mpmath.mpf) and value < 0 and degree.numerator % 2
        return -mpmath.power(-value, 1 / number(degree)) if negative else mpmath.power(value, 1 / number(degree))

    def _factorial(self, node: Node) -> Value:
        value = self.value(node)
        if not isinstance(value, Fraction) or abs(value) > _MAX_FACTORIAL:
            raise NoValueError("factorial")
        if value.denominator == 1 and value >= 0:
            return Fraction(math.factorial(value.numerator))
        return mpmath.gamma(number(value) + 1)

    def _binomial(self, upper: Node, lower: Node) -> Value:
        n, k = self.value(upper), self.value(lower)
        if not (isinstance(n, Fraction) and isinstance(k, Fraction)):
            raise NoValueError("binomial")
        if n.denominator == k.denominator == 1 and 0 <= n <= 10 * _MAX_FACTORIAL and k >= 0:
            return Fraction(math.comb(n.numerator, k.numerator))
        return mpmath.binomial(number(n), number(k))

    def _absolute(self, node: Node) -> Value:
        return abs(self.value(node))

    def _rounded(self, node: Node, of_fraction: Callable[[Any], int], of_number: Callable[[Any], Any]) -> Fraction:
        value = self.value(node)
        if isinstance(value, Fraction):
            return Fraction(of_fraction(value))
        if mpmath.im(value) != 0 or mpmath.mag(value) > 1000:
            raise NoValueError("rounding")
        return Fraction(int(of_number(value)))

    def _constant(self, name: str) -> Value:
        if name == "infinity":
            raise NoValueError("infinity")
        return {"pi": mpmath.mpf(mp.pi), "e": mpmath.mpf(mp.e), "i": mpmath.mpc(0, 1)}[name]

    def _quantity(self, node: Node, unit: str) -> Value:
        if unit == "percent":
            return self._checked(self._product(node, Node("number", (Fraction(1, 100), None, 0))))
        if unit == "degree":
            return number(self.value(node)) * mp.pi / 180
        raise NoValueError("a unit inside of an expression")

    def _call(self, name: str, *arguments: Node) -> Value:
        values = [self.value(argument) for argument in arguments]
        if name in ("gcd", "lcm"):
            if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
                raise NoValueError(name)
            return Fraction(getattr(math, name)(*(value.numerator for value in values)))
        if name in ("max", "min"):
            return {"max": max, "min": min}[name](values)
        if name == "log_base":
            return self._logarithm(*values)
        (value,) = values
        if isinstance(value, Fraction) and value == 0 and name in ("sin", "tan", "asin", "atan", "sinh", "tanh"):
            return value
        if name in ("ln", "log", "log10"):
            return self._logarithm(value, Fraction(10)) if name == "log10" else mpmath.log(_nonzero(number(value)))
        argument = _bounded(number(value), 100_000)
        result = getattr(mpmath, name)(argument)
        if name in ("sinh", "cosh", "tanh"):
            self._use(int(3 * abs(argument)))  # tanh(100) is 1 up to a number of this magnitude
        # sin(pi) is not exactly zero at any precision.
        self.largest = max(self.largest, mpmath.mpf(1), abs(argument))
        if name in ("tan", "cot", "sec", "csc") and abs(mpmath.mag(result)) > mp.prec // 2:
            raise NoValueError(f"{name} at a pole")
        return result

    def _logarithm(self, value: Value, base: Value) -> Value:
        if isinstance(value, Fraction) and isinstance(base, Fraction) and value > 0 and base > 0 and base != 1:
            power = round(math.log2(value) / math.log2(base)) if base.denominator == 1 else None
            if power is not None and abs(power) < 10_000 and self._integer_power(base, power) == value:
                return Fraction(power)
        return mpmath.log(_nonzero(number(value))) / _nonzero(mpmath.log(_nonzero(number(base))))


def number(value: Value) -> Any:
    """Return ``value`` as a number of mpmath, at its present precision."""
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    return value


def _nonzero(value: Any) -> Any:
    if value == 0:
        raise NoValueError("division by zero")
    return value


def _bounded(value: Any, limit: int) -> Any:
    if abs(value) > limit:
        raise NoValueError("too large")
    return value


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """Return the non-negative rational root of ``value``, None if there is none."""
    if value < 0 or degree > 1000:
        return None
    parts = []
    for part in (value.numerator, value.denominator):
        if part.bit_length() > 4 * _MAX_BITS:
            return None
        root = math.isqrt(part) if degree == 2 else _integer_root(part, degree)
        if root**degree != part:
            return None
        parts.append(root)
    return Fraction(*parts)


def _integer_root(value: int, degree: int) -> int:
    """Return the largest integer whose power is at most ``value``, by bisection."""
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low


_RULES: dict[str, Callable[..., Value]] = {
    "number": lambda self, value, digits, places: value,
    "symbol": Evaluator._symbol,
    "constant": Evaluator._constant,
    "sum": Evaluator._sum,
    "product": Evaluator._product,
    "negative": lambda self, node: -self.value(node),
    "inverse": Evaluator._inverse,
    "power": Evaluator._power,
    "root": Evaluator._root,
    "factorial": Evaluator._factorial,
    "binomial": Evaluator._binomial,
    "absolute": Evaluator._absolute,
    "floor": lambda self, node: self._rounded(node, math.floor, mpmath.floor),
    "ceiling": lambda self, node: self._rounded(node, math.ceil, mpmath.ceil),
    "call": Evaluator._call,
    "quantity": Evaluator._quantity,
}
