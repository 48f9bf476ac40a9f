"""The reward function of own_reward.yaml: partial credit for the steps of the arithmetic task."""

from __future__ import annotations

import operator

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_MODULUS = 17


def steps(prompt: str, response: str, answer: str | None) -> tuple[float, str]:
    """Return half a point for the share of right steps and half for the answer, and a remark that is stored.

    prompt: ``14 * 7 - 7 =``; response: ``13 6 [ 6 ]``: the result of each step, then the answer in brackets.
    """
    expected = _results(prompt)
    written, _, boxed = response.partition("[")
    right = sum(one == other for one, other in zip(written.split(), expected, strict=False))
    has_answer = boxed.split() == [answer, "]"]
    return 0.5 * right / len(expected) + 0.5 * has_answer, f"{right} of {len(expected)} steps"


def _results(prompt: str) -> list[str]:
    words = prompt.split()
    value, results = int(words[0]), []
    for symbol, operand in zip(words[1:-1:2], words[2:-1:2], strict=True):
        value = _OPERATIONS[symbol](value, int(operand)) % _MODULUS
        results.append(str(value))
    return results
