"""Sets of real numbers as disjoint intervals: ``(0,8)``, ``0 < x < 8``, ``x \\ne 3``, unions, complements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import mpmath

from megatron_s2d.verify.mathematics.nodes import Node, symbols_of
from megatron_s2d.verify.mathematics.numbers import same_number
from megatron_s2d.verify.mathematics.values import Evaluator, NoValueError, number

_INFINITY = Node("constant", ("infinity",))
_MINUS_INFINITY = Node("negative", (_INFINITY,))
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!=", "=": "="}


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """An interval; a point is closed at both ends. The keys order the ends."""

    low: Node
    low_open: bool
    high: Node
    high_open: bool

    @property
    def low_key(self) -> tuple:
        return _key(self.low), self.low_open

    @property
    def high_key(self) -> tuple:
        return _key(self.high), not self.high_open

    @property
    def is_empty(self) -> bool:
        low, high = _key(self.low), _key(self.high)
        return low > high or (low == high and (self.low_open or self.high_open))


type RealSet = tuple[_Piece, ...]
_REALS = (_Piece(_MINUS_INFINITY, True, _INFINITY, True),)


def real_set(node: Node) -> RealSet | None:
    """Return the set of reals that ``node`` is or describes, None if it is none; ``(2,3)`` is an interval here."""
    try:
        return _read(node)
    except NoValueError:
        return None


def same_set(label: RealSet, answer: RealSet) -> bool:
    """Return whether two sets are equal; ends are compared like answers."""
    return len(label) == len(answer) and all(
        a.low_open == b.low_open
        and a.high_open == b.high_open
        and same_number(a.low, b.low)
        and same_number(a.high, b.high)
        for a, b in zip(label, answer, strict=True)
    )


def _read(node: Node) -> RealSet | None:
    if node.kind == "reals":
        return _REALS
    if node.kind == "empty":
        return ()
    if node.kind == "bracket" and len(node.args[2]) == 2:
        (low, high), (opening, closing) = node.args[2], node.args[:2]
        # An infinite end is open, however it is written.
        return _normal([_Piece(low, opening == "(" or _is_infinite(low), high, closing == ")" or _is_infinite(high))])
    if node.kind == "set":
        return _normal([_Piece(item, False, item, False) for item in node.args])
    if node.kind == "relation":
        return _relation(node.args)
    if node.kind in ("union", "intersection", "difference", "list"):
        parts = [_read(part) for part in node.args]
        relations = [part for part in node.args if part.kind == "relation"]
        if None in parts or not parts or len(_variables(relations)) > 1:
            return None
        if node.kind == "list":
            if len(relations) < len(parts):
                return None
            return _fold(parts, _intersect) or _fold(parts, _unite)
        if node.kind == "difference":
            return _intersect(parts[0], _complement(parts[1]))
        return _fold(parts, _unite if node.kind == "union" else _intersect)
    return None


def _variables(relations: Sequence[Node]) -> set[str]:
    return {name for relation in relations for name in symbols_of(relation)}


def _relation(args: tuple) -> RealSet | None:
    """Return the solutions of ``x < 3``, ``2 \\le x < 3``, ``x \\ne 3``, ``x \\in S``; one side is a symbol alone."""
    if len(args) == 3 and args[1] in ("in", "notin") and args[0].kind == "symbol":
        members = _read(args[2])
        return members if members is None or args[1] == "in" else _complement(members)
    parts, operators = args[::2], args[1::2]
    places = [index for index, part in enumerate(parts) if part.kind == "symbol"]
    if len(places) != 1 or len(parts) > 3 or any(operator not in _FLIPPED for operator in operators):
        return None
    result = _REALS
    for index, operator in enumerate(operators):
        left, right = parts[index], parts[index + 1]
        if index + 1 == places[0]:
            left, operator, right = right, _FLIPPED[operator], left
        elif index != places[0]:
            return None
        result = _intersect(result, _half_line(operator, right))
    return result


def _half_line(operator: str, bound: Node) -> RealSet:
    point = (_Piece(bound, False, bound, False),)
    if operator in ("=", "!="):
        return point if operator == "=" else _complement(point)
    is_open = operator in ("<", ">") or _is_infinite(bound)
    below = operator.startswith("<")
    return _normal(
        [_Piece(_MINUS_INFINITY, True, bound, is_open) if below else _Piece(bound, is_open, _INFINITY, True)]
    )


def _is_infinite(node: Node) -> bool:
    return node in (_INFINITY, _MINUS_INFINITY)


def _key(node: Node) -> mpmath.mpf:
    """Return a number that orders ends. Raises ``NoValueError`` for symbols and complex numbers."""
    if _is_infinite(node):
        return mpmath.mpf(math.inf if node == _INFINITY else -math.inf)
    with mpmath.workdps(40):
        value = number(Evaluator().value(node))
        if not isinstance(value, mpmath.mpf):
            raise NoValueError("a complex number")
        return value


def _normal(pieces: Sequence[_Piece]) -> RealSet:
    """Return the union of ``pieces`` as ordered intervals that do not touch."""
    result: list[_Piece] = []
    for piece in sorted((piece for piece in pieces if not piece.is_empty), key=lambda piece: piece.low_key):
        last = result[-1] if result else None
        touches = last is not None and (
            _key(piece.low) < _key(last.high)
            or (_key(piece.low) == _key(last.high) and not (piece.low_open and last.high_open))
        )
        if not touches:
            result.append(piece)
        elif piece.high_key > last.high_key:
            result[-1] = _Piece(last.low, last.low_open, piece.high, piece.high_open)
    return tuple(result)


def _fold(parts: Sequence[RealSet], combine) -> RealSet:
    result, *rest = parts
    for part in rest:
        result = combine(result, part)
    return result


def _unite(a: RealSet, b: RealSet) -> RealSet:
    return _normal([*a, *b])


def _intersect(a: RealSet, b: RealSet) -> RealSet:
    pieces = []
    for x in a:
        for y in b:
            low = max(x, y, key=lambda piece: piece.low_key)
            high = min(x, y, key=lambda piece: piece.high_key)
            pieces.append(_Piece(low.low, low.low_open, high.high, high.high_open))
    return _normal(pieces)


def _complement(pieces: RealSet) -> RealSet:
    result, low, low_open = [], _MINUS_INFINITY, True
    for piece in pieces:
        result.append(_Piece(low, low_open, piece.low, not piece.low_open or _is_infinite(piece.low)))
        low, low_open = piece.high, not piece.high_open or _is_infinite(piece.high)
    return _normal([*result, _Piece(low, low_open, _INFINITY, True)])
