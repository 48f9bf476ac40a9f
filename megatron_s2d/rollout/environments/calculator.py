"""A calculator for the embedded task (``data/tasks.py``): the model writes ``12 + 5 =`` and reads the residue."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_s2d.data.tasks import MAX_OPERAND, OPERATORS
from megatron_s2d.records import Prompt
from megatron_s2d.rollout.environments.environment import Step, Turn
from megatron_s2d.verify import Verdict

_CALL = "="  # ends a turn that is a call


class Calculator:
    """Answers calls; a turn that ends otherwise is the last one. A call that cannot be read ends it as ``bad_call``."""

    def __init__(self, tokenizer: Any, modulus: int):
        vocabulary = tokenizer.get_vocab()
        self._words = {index: word for word, index in vocabulary.items()}
        self._vocabulary, self._modulus = vocabulary, modulus
        self.stop_token_ids = (vocabulary[_CALL],)

    async def reset(self, prompt: Prompt, seed: int) -> None:
        """Do nothing: calls do not depend on each other."""

    async def step(self, turn: Turn) -> Step:
        """Return the result of the call at the end of the turn."""
        words = [self._words[int(token)] for token in turn.token_ids]
        if words[-1] != _CALL:
            return Step(None)
        result = calculate(words[-4:-1], self._modulus)
        if result is None:
            return Step(None, verdict=Verdict(0.0, "bad_call"))
        return Step(np.array([self._vocabulary[str(result)]], dtype=np.int64))


def calculate(words: list[str], modulus: int) -> int | None:
    """Return ``value operator operand`` modulo ``modulus``; None for anything else, and for numbers out of range."""
    if len(words) != 3 or words[1] not in OPERATORS or not (words[0].isdigit() and words[2].isdigit()):
        return None
    value, operand = int(words[0]), int(words[2])
    if value >= modulus or not 1 <= operand <= MAX_OPERAND:
        return None
    results = {"+": value + operand, "-": value - operand, "*": value * operand}
    return results[words[1]] % modulus
