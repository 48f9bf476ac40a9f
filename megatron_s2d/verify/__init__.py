"""Verifiers: from a response and a label to a reward of 0 or 1 and one word on how it came about."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from megatron_s2d.config.base import UserError
from megatron_s2d.data.tasks import check_answer
from megatron_s2d.records import Prompt


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one response."""

    reward: float  # 0 or 1
    word: str  # "correct", "wrong", "no_answer", "timeout", ...


# Verifiers that compare short texts run here; those that compute are run by worker processes with a deadline.
VERIFIERS: dict[str, Callable[[str, str], tuple[float, str]]] = {"modular_arithmetic": check_answer}


class Graders:
    """Grades batches of responses; a context manager, because some verifiers hold worker processes."""

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """One verdict a response, in order. Raises ``UserError`` for a prompt without a label."""
        verdicts = []
        for prompt, response in zip(prompts, responses, strict=True):
            if prompt.verifier is None or prompt.answer is None:
                raise UserError(f"prompt {prompt.id} has no verifier or no answer; it cannot be graded")
            verdicts.append(Verdict(*VERIFIERS[prompt.verifier](response, prompt.answer)))
        return verdicts
