"""Equality of two mathematical answers: ``compare`` returns the status of a comparison.

Both texts are read completely (``parser.py``) or compared as text. Exact numbers are equal if they are the same
number. A decimal of at least six significant digits equals what it rounds or cuts off. Expressions with symbols are
equal if they have the same values at points of both signs and different size (Schwartz-Zippel; rational functions are
evaluated exactly). The rules that people decide are in ``docs/data.md``.
"""

from __future__ import annotations

import re

from megatron_s2d.verify.mathematics.equality import same
from megatron_s2d.verify.mathematics.nodes import Node, exact, kinds_of
from megatron_s2d.verify.mathematics.parser import parse, plain_text
from megatron_s2d.verify.mathematics.text import UnreadableError

_QUICK_LENGTH = 200  # characters
_QUICK_KINDS = {
    "number", "sum", "product", "negative", "inverse", "mixed", "quantity", "based", "ratio", "list", "set", "bracket",
    "assign", "option", "text", "empty", "undefined", "ellipsis",
}  # fmt: skip
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+")
_NOT_FINITE = re.compile(r"[+-]?(?:inf|infinity|nan)", re.IGNORECASE)


def label_problem(label: str) -> str | None:
    """Return None for a label that is read completely, ``text`` if it is compared as text, ``bad_label`` otherwise."""
    if _NOT_FINITE.fullmatch(label.strip()):  # what programs write for a missing number; an infinity is \infty
        return "bad_label"
    try:
        return "bad_label" if parse(label).kind == "ellipsis" else None
    except UnreadableError:
        pass
    try:
        return "text" if any(character.isalnum() for character in plain_text(label)) else "bad_label"
    except UnreadableError:
        return "bad_label"


def compare(label: str, answer: str) -> str:
    """Return ``correct``, ``wrong``, ``unreadable`` (the answer is no expression) or ``bad_label``."""
    if label_problem(label) == "bad_label":
        return "bad_label"
    try:
        if plain_text(label) == plain_text(answer):
            return "correct"
        given = parse(answer)
    except UnreadableError:
        return "unreadable"
    try:
        expected = parse(label)
    except UnreadableError:
        return "wrong"
    if expected.kind == "based" and re.sub(r"\s", "", answer).upper() == expected.args[0]:
        return "correct"  # hexadecimal digits without their base are no number
    if same(expected, given) or ("text" in (expected.kind, given.kind) and _letters(label) == _letters(answer)):
        return "correct"
    # "7,168" may be two numbers: it is, beside a list.
    lists = [_ungrouped(text) if _GROUPED.fullmatch(text.strip()) else None for text in (label, answer)]
    if lists[0] is not None and given.kind == "list":
        return "correct" if same(lists[0], given) else "wrong"
    if lists[1] is not None and expected.kind == "list":
        return "correct" if same(expected, lists[1]) else "wrong"
    return "wrong"


def _letters(text: str) -> str:
    return plain_text(text).replace(" ", "").lower()


def _ungrouped(text: str) -> Node:
    return Node("list", tuple(exact(int(part)) for part in text.split(",")))


def is_quick(label: str, answer: str) -> bool:
    """Return whether comparing takes microseconds: short texts without powers, roots, symbols and functions."""
    if len(label) + len(answer) > _QUICK_LENGTH:
        return False
    try:
        if plain_text(label) == plain_text(answer):
            return True
        return all(kinds_of(parse(text)) <= _QUICK_KINDS for text in (label, answer))
    except UnreadableError:
        return True  # compared as text
