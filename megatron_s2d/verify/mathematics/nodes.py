"""Trees of mathematical answers.

| kind of ``Node`` | arguments |
|---|---|
| ``number`` | value (``Fraction``), significant digits (None: exact), decimal places |
| ``symbol``, ``constant`` | name; ``pi``, ``e``, ``i``, ``infinity`` |
| ``sum``, ``product`` | terms, factors |
| ``negative``, ``inverse``, ``factorial``, ``absolute``, ``floor``, ``ceiling`` | operand |
| ``power``, ``root``, ``binomial``, ``mixed`` | two operands |
| ``choice`` | operand, sign: the two values of a plus-minus |
| ``call`` | name of a function, arguments |
| ``quantity`` | value, unit |
| ``based`` | digits, base |
| ``ratio``, ``list``, ``set`` | items |
| ``bracket`` | opening, closing mark, items: a tuple, a point or an interval |
| ``matrix`` | rows |
| ``union``, ``intersection``, ``difference`` | sets |
| ``reals``, ``domain`` | nothing; name of a set of numbers |
| ``assign`` | name, value |
| ``relation`` | first operand, operator, operand, operator, operand, ... |
| ``congruence`` | left side or None, residue, modulus |
| ``clause`` | answer, text of the clause |
| ``option`` | letter, node of its text or None |
| ``text``, ``empty``, ``undefined``, ``ellipsis`` | words; nothing |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from megatron_s2d.verify.mathematics.text import UnreadableError


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A part of an answer; the table above has the kinds."""

    kind: str
    args: tuple[Any, ...] = ()


def parts_of(node: Node) -> Iterator[Node]:
    """Yield the nodes directly below ``node``."""
    for part in node.args:
        if isinstance(part, Node):
            yield part
        elif isinstance(part, tuple):
            yield from parts_of(Node("", part))


def kinds_of(node: Node) -> set[str]:
    """Return the kinds of ``node`` and of everything below it."""
    return {node.kind}.union(*(kinds_of(part) for part in parts_of(node)))


def symbols_of(node: Node) -> set[str]:
    """Return the names of the symbols in ``node``."""
    if node.kind == "symbol":
        return {node.args[0]}
    return {name for part in parts_of(node) for name in symbols_of(part)}


def exact(value: int | Fraction) -> Node:
    """Return the node of an exact number."""
    return Node("number", (Fraction(value), None, 0))


def numeral(text: str) -> Node:
    """Return the node of a number as it is written. Raises ``UnreadableError`` for a huge exponent."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent) > 5:
        raise UnreadableError("exponent")
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    if "." not in mantissa and not exponent:
        return exact(value)
    places = len(mantissa.partition(".")[2]) - int(exponent or 0)
    digits = len(mantissa.replace(".", "").strip("0")) if exponent or "." in mantissa else 0
    return Node("number", (value, max(digits, 1), places))
