"""Equality of two answers, as trees: what may be left out, what may stand for what, and what makes another answer.

The rules that people decide are in ``docs/data.md``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from megatron_s2d.verify.mathematics.nodes import Node, exact, kinds_of, symbols_of
from megatron_s2d.verify.mathematics.numbers import same_number, same_ratio
from megatron_s2d.verify.mathematics.sets import real_set, same_set
from megatron_s2d.verify.mathematics.units import same_units
from megatron_s2d.verify.mathematics.words import CLAUSES, OPTIONAL_CLAUSES, QUANTIFIER_WORDS

_MAX_ITEMS = 60  # of lists whose order does not matter
_MAX_EXPANDED = 1000  # items of 1, 2, ..., n
_DOMAINS = {
    "integer": "Z", "integers": "Z", "mathbbZ": "Z", "real": "R", "reals": "R", "mathbbR": "R", "natural": "N",
    "mathbbN": "N", "complex": "C", "mathbbC": "C", "rational": "Q", "mathbbQ": "Q",
}  # fmt: skip


def same(label: Node, answer: Node) -> bool:
    """Return whether ``answer`` is the answer ``label``; the rules are not symmetric (a unit may be left out)."""
    if label == answer:
        return True
    for rule in (_options, _clauses, _relations, _names):
        verdict = rule(label, answer)
        if verdict is not None:
            return verdict
    label, answer = _listed(label), _listed(answer)
    for rule in (_sets, _sequences, _numerals, _ratios):
        verdict = rule(label, answer)
        if verdict is not None:
            return verdict
    if label.kind == "quantity" or answer.kind == "quantity":
        return same_units(label, answer, same)
    return same_number(label, answer)


# -------------------------------------------------------------------------------------------- letters, clauses, names
def _options(label: Node, answer: Node) -> bool | None:
    if label.kind != "option" and answer.kind != "option":
        return None
    if label.kind == answer.kind:
        texts = (label.args[1], answer.args[1])
        return label.args[0] == answer.args[0] and (None in texts or same(*texts))
    if label.kind == "option":
        letter, text = label.args
        if text is not None:
            return same(text, answer)
        return answer in (Node(kind, (name,)) for kind in ("symbol", "constant") for name in (letter, letter.lower()))
    letter, text = answer.args
    return same(label, Node("symbol", (letter,)) if text is None else text)


def _clauses(label: Node, answer: Node) -> bool | None:
    if label.kind != "clause" and answer.kind != "clause":
        return None
    if label.kind == answer.kind:
        clauses = [_clause(node.args[1]) for node in (label, answer)]
        return clauses[0] == clauses[1] and same(label.args[0], answer.args[0])
    if label.kind == "clause":
        first, *rest = label.args[1].split()
        alone = first in OPTIONAL_CLAUSES and not set(rest) & (CLAUSES | {",", ";", "or"})
        return alone and same(label.args[0], answer)
    return isinstance(_clause(answer.args[1]), frozenset) and same(label, answer.args[0])


def _clause(text: str) -> frozenset[str] | str:
    """Return variables and domains of ``for any integer k``, ``k \\in \\mathbb{Z}``; other clauses as they are."""
    if text.split()[0] not in OPTIONAL_CLAUSES:
        return text
    words = {_DOMAINS.get(word, word) for word in text.split()} - QUANTIFIER_WORDS - {"in", "(", ")"}
    return frozenset(words) if all(len(word) == 1 and word.isalpha() for word in words) else text


def _names(label: Node, answer: Node) -> bool | None:
    """Compare assignments: a name may be left out, another name is another answer."""
    if label.kind == "assign" and answer.kind == "assign":
        names = label.args[0], answer.args[0]
        return _same_name(*names) and same(_value(label), _value(answer))
    if "assign" not in (label.kind, answer.kind):
        return None
    other = answer if label.kind == "assign" else label
    named = label if label.kind == "assign" else answer
    if named.args[0].startswith("(") and other.kind != "bracket":
        return same(named.args[1], other) if named is label else same(other, named.args[1])
    if other.kind in ("list", "bracket", "set") and any(item.kind == "assign" for item in _items(other)):
        return None
    if label.kind == "assign":
        return same(_value(label), answer)
    return same(label, _value(answer))


def _same_name(label: str, answer: str) -> bool:
    functions = [name == "y" or bool(re.fullmatch(r"[A-Za-z]\(\w+\)", name)) for name in (label, answer)]
    spelled = any(len(name) > 2 and name.isalpha() and name.islower() for name in (label, answer))
    return label == answer or all(functions) or spelled


def _value(node: Node, name: str = "") -> Node:
    """Return the value of a chain ``2 + 3 = 5``: its parts must be equal; ``22/7 \\approx 3.14`` is its exact part."""
    if node.kind == "assign":
        return _value(node.args[1], node.args[0])
    if node.kind != "relation" or not set(node.args[1::2]) <= {"=", "~"}:
        return node
    first, *rest = node.args
    value = first
    for operator, part in itertools.batched(rest, 2):
        if same(value, part):
            continue
        if operator == "~" and same_number(value, part, least_digits=2):
            continue
        if symbols_of(value) and not symbols_of(part) and name not in symbols_of(value):
            value = part  # S = \pi r^2 = 25\pi, but not x = 5 \quad x = 6
        else:
            return Node("undefined")
    return value


# ------------------------------------------------------------------------------------------ equations, inequalities
def _relations(label: Node, answer: Node) -> bool | None:
    kinds = {label.kind, answer.kind}
    if "congruence" in kinds:
        return len(kinds) == 1 and _congruent(label, answer)
    if "relation" not in kinds:
        return None
    sets = [real_set(node) for node in (label, answer)]
    if None not in sets:
        return same_set(*sets)
    label, answer = (node.args[2] if _is_member(node) else node for node in (label, answer))
    if "relation" not in (label.kind, answer.kind):
        return same(label, answer)
    equations = [_equation(node) for node in (label, answer)]
    if None not in equations:
        return _same_equation(*equations)
    if label.kind != "relation" and answer.kind == "relation" and label.kind != "assign":
        return _is_value_of(label, answer)
    if answer.kind != "relation" and not symbols_of(label) and set(label.args[1::2]) <= {"=", "~"}:
        return same(_value(label), answer)  # the label 22/7 \approx 3.14
    if label.kind == answer.kind == "relation" and label.args[1::2] == answer.args[1::2]:
        return all(same(a, b) for a, b in zip(label.args[::2], answer.args[::2], strict=True))
    return False


def _is_member(node: Node) -> bool:
    return node.kind == "relation" and len(node.args) == 3 and node.args[1] == "in" and node.args[0].kind == "symbol"


def _is_value_of(label: Node, answer: Node) -> bool:
    """Accept ``2 + 3 = 5`` and ``a + b = 5`` for 5, but not the equations ``2x = 5`` or ``x^2 + y^2 = 5``."""
    left = answer.args[0]
    if not set(answer.args[1::2]) <= {"=", "~"} or (symbols_of(left) and "number" in kinds_of(left)):
        return False
    value = _value(answer)
    return value.kind != "undefined" and not symbols_of(value) - symbols_of(label) and same(label, value)


def _equation(node: Node) -> tuple[Node, str] | None:
    """Return (difference of the sides, operator) of a relation of two sides; greater becomes less."""
    if node.kind == "assign" and re.fullmatch(r"[A-Za-z]\w?", node.args[0]):
        node = Node("relation", (Node("symbol", (node.args[0],)), "=", node.args[1]))
    if node.kind != "relation" or len(node.args) != 3 or node.args[1] not in ("=", "<", "<=", ">", ">=", "!="):
        return None
    left, operator, right = node.args
    if operator in (">", ">="):
        left, operator, right = right, operator.replace(">", "<"), left
    return Node("sum", (left, Node("negative", (right,)))), operator


def _same_equation(label: tuple[Node, str], answer: tuple[Node, str]) -> bool:
    if label[1] != answer[1] or symbols_of(label[0]) != symbols_of(answer[0]) or not symbols_of(label[0]):
        return False
    return same_ratio(label[0], answer[0], positive=label[1] in ("<", "<="))


def _congruent(label: Node, answer: Node) -> bool:
    left = [node.args[0] for node in (label, answer)]
    if None not in left and left[0] != left[1]:
        return False
    difference = Node("sum", (label.args[1], Node("negative", (answer.args[1],))))
    quotient = Node("product", (difference, Node("inverse", (label.args[2],))))
    return same_number(label.args[2], answer.args[2]) and same_number(quotient, Node("floor", (quotient,)))


# ----------------------------------------------------------------------------------------------- sets and sequences
def _listed(node: Node) -> Node:
    """Return ``1 \\pm \\sqrt{2}`` as the list of its values, also inside of lists and sets; expand ``1, 2, ..., 9``."""
    if node.kind in ("list", "set"):
        items = [part for item in node.args for part in (_items(_listed(item)) if _has_choice(item) else [item])]
        if items[0].kind == "assign" and not any(item.kind == "assign" for item in items[1:]):
            items = [_value(items[0]), *items[1:]]  # x = 1, 2
        return Node(node.kind, tuple(_expanded(items)))
    if node.kind == "assign" and _has_choice(node):
        return Node("list", tuple(Node("assign", (node.args[0], item)) for item in _listed(node.args[1]).args))
    if node.kind == "intersection" and real_set(node) is None:
        return Node("list", node.args)  # conditions on several variables
    if node.kind == "quantity" and _has_choice(node):
        return Node("list", tuple(Node("quantity", (item, node.args[1])) for item in _listed(node.args[0]).args))
    if _has_choice(node) and node.kind not in ("bracket", "matrix", "relation", "assign"):
        return Node("list", (_signed(node, 1), _signed(node, -1)))
    return node


def _has_choice(node: Node) -> bool:
    return node.kind == "choice" or any(_has_choice(part) for part in node.args if isinstance(part, Node))


def _signed(node: Node, sign: int) -> Node:
    if node.kind == "choice":
        operand = _signed(node.args[0], sign)
        return operand if node.args[1] == sign else Node("negative", (operand,))
    return Node(node.kind, tuple(_signed(part, sign) if isinstance(part, Node) else part for part in node.args))


def _expanded(items: list[Node]) -> list[Node]:
    dots = [index for index, item in enumerate(items) if item.kind == "ellipsis"]
    if len(dots) != 1 or not 0 < dots[0] == len(items) - 2:
        return items
    numbers = [item.args[0] if item.kind == "number" else None for item in (*items[: dots[0]], items[-1])]
    if None in numbers or any(value.denominator != 1 for value in numbers):
        return items
    *given, last = numbers
    step = given[-1] - given[-2] if len(given) > 1 else 1
    steps = [b - a for a, b in itertools.pairwise(given)]
    if step == 0 or any(value != step for value in steps) or (last - given[0]) % step:
        return items
    count = (last - given[0]) / step + 1
    return [exact(given[0] + k * step) for k in range(int(count))] if len(given) < count <= _MAX_EXPANDED else items


def _items(node: Node) -> Sequence[Node]:
    return node.args[2] if node.kind == "bracket" else node.args if node.kind in ("list", "set") else (node,)


def _sets(label: Node, answer: Node) -> bool | None:
    kinds = {label.kind, answer.kind}
    if "empty" in kinds or "undefined" in kinds or "domain" in kinds or "text" in kinds or "ellipsis" in kinds:
        return label.kind == answer.kind and label == answer and label.kind != "ellipsis"
    if kinds & {"union", "intersection", "difference", "reals"}:
        sets = [real_set(node) for node in (label, answer)]
        if None not in sets:
            return same_set(*sets)
        if label.kind == answer.kind and len(label.args) == len(answer.args):
            return all(same(a, b) for a, b in zip(label.args, answer.args, strict=True))
        return False
    return None


def _sequences(label: Node, answer: Node) -> bool | None:
    """Compare lists, sets, tuples, intervals and matrices, item by item."""
    kinds = label.kind, answer.kind
    if "matrix" in kinds:
        return _same_matrix(label, answer)
    composite = ("list", "set", "bracket")
    if kinds[0] not in composite and kinds[1] not in composite:
        return None
    left, right = _items(label), _items(answer)
    if any(item.kind == "assign" for item in (*left, *right)):
        return _same_assignments(label, answer)
    if len(left) != len(right) or len(left) > _MAX_ITEMS:
        return False
    if len(left) == 1:
        return same(left[0], right[0])
    if kinds[0] == kinds[1] == "bracket":
        long = len(left) > 2
        return (long or label.args[:2] == answer.args[:2]) and _in_order(left, right)
    if "bracket" in kinds:
        bracket = label if kinds[0] == "bracket" else answer
        is_tuple = bracket.args[:2] == ("(", ")") or (bracket.args[:2] == ("[", "]") and len(left) > 2)
        return is_tuple and "set" not in kinds and _in_order(left, right)
    if any(item.kind == "ellipsis" for item in left):
        return _in_order(left, right)
    return _in_any_order(left, right)


def _in_order(left: Sequence[Node], right: Sequence[Node]) -> bool:
    return all(same(a, b) if a.kind != "ellipsis" else b.kind == "ellipsis" for a, b in zip(left, right, strict=True))


def _in_any_order(left: Sequence[Node], right: Sequence[Node]) -> bool:
    remaining = list(right)
    for item in left:
        found = next((index for index, other in enumerate(remaining) if same(item, other)), None)
        if found is None:
            return False
        del remaining[found]
    return True


def _same_assignments(label: Node, answer: Node) -> bool:
    """Compare ``x = 3, y = 4`` with another such list, a point or a list of values."""
    left, right = _items(label), _items(answer)
    if len(left) != len(right) or len(left) > _MAX_ITEMS:
        return False
    named = [all(item.kind == "assign" for item in items) for items in (left, right)]
    if all(named):
        return _in_any_order(left, right)
    if not any(named):
        return False
    assignments, values = (left, right) if named[0] else (right, left)
    names = [item.args[0] for item in assignments]
    if len(set(names)) == 1:
        kind = label.kind if named[1] else answer.kind
        pairs = [_value(item) for item in assignments]
        return kind != "bracket" and _in_any_order(*((pairs, values) if named[0] else (values, pairs)))
    if len(set(names)) != len(names) or (label if named[1] else answer).kind == "set":
        return False
    in_order = [_value(item) for item in sorted(assignments, key=lambda item: item.args[0])]
    return _in_order(*((in_order, values) if named[0] else (values, in_order)))


def _same_matrix(label: Node, answer: Node) -> bool:
    rows = [node.args if node.kind == "matrix" else None for node in (label, answer)]
    if None not in rows:
        shapes = [[len(row) for row in matrix] for matrix in rows]
        entries = [[entry for row in matrix for entry in row] for matrix in rows]
        return shapes[0] == shapes[1] and _in_order(*entries)
    matrix, other = (label, answer) if label.kind == "matrix" else (answer, label)
    is_vector = len(matrix.args) == 1 or all(len(row) == 1 for row in matrix.args)
    entries = [entry for row in matrix.args for entry in row]
    if not is_vector or other.kind not in ("bracket", "list") or len(entries) != len(_items(other)) or len(entries) < 2:
        return False
    if other.kind == "bracket" and len(entries) == 2 and other.args[:2] != ("(", ")"):
        return False
    return _in_order(*((entries, _items(other)) if matrix is label else (_items(other), entries)))


# ---------------------------------------------------------------------------------------------- numerals and ratios
def _numerals(label: Node, answer: Node) -> bool | None:
    """Compare numerals with a base: the label's base may be left out, another base is another answer."""
    if label.kind == answer.kind == "based":
        return label == answer
    if label.kind == "based":
        return answer.kind == "number" and answer.args[1] is None and str(answer.args[0]) == label.args[0]
    if answer.kind == "based":
        return same_number(label, exact(int(*answer.args)))
    return None


def _ratios(label: Node, answer: Node) -> bool | None:
    if label.kind == answer.kind == "ratio":
        if len(label.args) != len(answer.args):
            return False
        if _is_time(label):
            return _in_order(label.args, answer.args)
        products = [
            (Node("product", (a, answer.args[0])), Node("product", (label.args[0], b)))
            for a, b in zip(label.args, answer.args, strict=True)
        ]
        return all(same_number(a, b) for a, b in products) and not same_number(answer.args[0], exact(0))
    if "ratio" not in (label.kind, answer.kind):
        return None
    ratio, other = (label, answer) if label.kind == "ratio" else (answer, label)
    if len(ratio.args) != 2 or (ratio is label and _is_time(ratio)) or other.kind == "quantity":
        return same_units(label, answer, same) if other.kind == "quantity" else False
    quotient = Node("product", (ratio.args[0], Node("inverse", (ratio.args[1],))))
    return same_number(*((quotient, other) if ratio is label else (other, quotient)))


def _is_time(ratio: Node) -> bool:
    """Return whether ``10:30`` is a time of day: as a ratio it would have been reduced."""
    values = [part.args[0] if part.kind == "number" else None for part in ratio.args]
    if None in values or any(value.denominator != 1 for value in values):
        return False
    common = math.gcd(*(value.numerator for value in values))
    return common > 1 and values[0] <= 24 and all(value < 60 for value in values[1:])
