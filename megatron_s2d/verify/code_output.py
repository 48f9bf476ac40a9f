"""Compares what a script printed with what it should print."""

from __future__ import annotations

import re
from decimal import Decimal

# A number that stands alone: not a part of a word, a version or a date such as 1.2.3. Long ones compare as text.
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,40}\.\d{0,40}|\.\d{1,40}|\d{1,40})(?:[eE][-+]?\d{1,3})?(?![\w.])", re.ASCII
)
_RELATIVE, _ABSOLUTE = Decimal("1e-6"), Decimal("1e-9")
_FEW_DIGITS = 6


def same_output(actual: str, expected: str) -> bool:
    """Return whether the texts are equal, ignoring white space at the ends of lines and of the text.

    A number with decimals in ``expected`` stands for any number close to it (1.50 for 1.5), an integer for itself only.
    """
    lines, expected_lines = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (actual, expected))
    return len(lines) == len(expected_lines) and all(
        line == other or _same_numbers(line, other) for line, other in zip(lines, expected_lines, strict=True)
    )


def _same_numbers(line: str, expected: str) -> bool:
    if _NUMBER.sub("0", line) != _NUMBER.sub("0", expected):
        return False
    numbers, others = _NUMBER.findall(line), _NUMBER.findall(expected)
    return len(numbers) == len(others) and all(
        number == other or _close(Decimal(number), Decimal(other))
        for number, other in zip(numbers, others, strict=True)
    )


def _close(actual: Decimal, expected: Decimal) -> bool:
    """Return whether ``actual`` is within 1e-6 of the size of ``expected``, which has decimals.

    If it shows few digits or few decimals, a difference may not change the last of them either.
    """
    _, digits, exponent = expected.as_tuple()
    if exponent >= 0:
        return False
    tolerance = max(abs(expected) * _RELATIVE, _ABSOLUTE)
    if len(digits) <= _FEW_DIGITS or -exponent < _FEW_DIGITS:
        tolerance = min(tolerance, Decimal(5).scaleb(exponent - 1))
    return abs(actual - expected) <= tolerance
