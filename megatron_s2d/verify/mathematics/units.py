"""Units of quantities: ``60 km/h``, ``18 dollars``, ``15 cm^2``, ``50\\%``, ``90^\\circ``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

from megatron_s2d.verify.mathematics.nodes import Node, exact
from megatron_s2d.verify.mathematics.numbers import same_number
from megatron_s2d.verify.mathematics.words import BARE, COMPOUND_UNITS, UNITS

_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


def same_units(label: Node, answer: Node, same: Callable[[Node, Node], bool]) -> bool:
    """Compare quantities: a unit may be left out, the label's unit and the answer's must measure the same.

    ``50\\%`` is 50 and 1/2; ``60^\\circ`` is 60, but not pi/3.
    """
    (x, x_unit), (y, y_unit) = _split(label), _split(answer)
    if x_unit and y_unit:
        factor = _factor(x_unit, y_unit)
        if factor is None:
            return False
        return same(x, y) if factor == 1 else same_number(x, Node("product", (y, exact(factor))))
    if x_unit.endswith(BARE) and not y_unit:
        return same_number(Node("product", (x, *_symbols(x_unit))), y)
    if same(x, y):
        return True
    if "percent" not in (x_unit, y_unit):
        return False
    if x_unit:
        return same_number(Node("product", (x, exact(Fraction(1, 100)))), y)
    return same_number(x, Node("product", (y, exact(Fraction(1, 100)))))


def _symbols(unit: str) -> list[Node]:
    """Return the factors that the letters of ``m``, ``m^2``, ``m/s`` are if they are symbols and no unit."""
    first, *rest = unit.removesuffix(BARE).split()
    if not rest:
        return [Node("symbol", (first,))]
    if rest[0] == "/":
        return [Node("symbol", (first,)), Node("inverse", (Node("symbol", (rest[1],)),))]
    return [Node("power", (Node("symbol", (first,)), exact(int(rest[1]))))]


def _split(node: Node) -> tuple[Node, str]:
    """Return the value and its unit, "" without one; the sign stands before the quantity or inside."""
    if node.kind == "negative" and node.args[0].kind == "quantity":
        value, unit = _split(node.args[0])
        return Node("negative", (value,)), unit
    if node.kind != "quantity":
        return node, ""
    value, inner = _split(node.args[0])
    unit = " ".join(filter(None, (inner, node.args[1])))
    return (value, unit) if measure(unit)[0] or measure(unit)[2] else (value, "")


def _factor(label: str, answer: str) -> Fraction | None:
    """Return what to multiply the answer with; None if the units differ. Nouns: one text may name them more closely."""
    (x_dimensions, x_size, x_nouns), (y_dimensions, y_size, y_nouns) = measure(label), measure(answer)
    if x_dimensions != y_dimensions or not (x_nouns <= y_nouns or y_nouns <= x_nouns):
        return None
    if bool(x_nouns) != bool(y_nouns) and not x_dimensions:
        return None
    return y_size / x_size


@functools.lru_cache(maxsize=1024)
def measure(unit: str) -> tuple[Mapping[str, int], Fraction, frozenset[str]]:
    """Return (dimension -> exponent, size in base units, nouns that are no units) of the words of a unit."""
    words = [part for word in unit.split() for part in COMPOUND_UNITS.get(word.lower(), word).split()]
    dimensions: dict[str, int] = {}
    size, nouns, sign, prefix, last = Fraction(1), set(), 1, 1, None
    index = 0
    while index < len(words):
        word = words[index].lower()
        index += 1
        if word in ("/", "per"):
            sign, last = -1, None
        elif word in ("cdot", "-", ".", BARE.strip()):
            last = None
        elif word in _POWERS and (last is None or word in ("square", "sq", "cubic", "cu")):
            prefix = _POWERS[word]
        elif word in _POWERS or word == "^":
            exponent = _POWERS.get(word) or int(words[index]) if word != "^" or abs(int(words[index])) < 10 else 1
            index += word == "^"
            if last is not None:
                dimension, factor = last
                dimensions[dimension] += sign * (exponent - 1)
                size *= factor ** (sign * (exponent - 1))
        elif word in UNITS:
            dimension, factor = UNITS[word]
            dimensions[dimension] = dimensions.get(dimension, 0) + sign * prefix
            size *= factor ** (sign * prefix)
            last, prefix = (dimension, factor), 1
        else:
            nouns.add(re.sub(r"(?<=[a-z]{2})(?:ies|es|s|y)$", "", word))
            last, prefix = None, 1
    dimensions.pop("square", None)  # "square units": of no length in particular
    return {name: exponent for name, exponent in dimensions.items() if exponent}, size, frozenset(nouns)
