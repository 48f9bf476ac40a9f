"""The interface of verifiers, and the verifier of the embedded task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from megatron_s2d.data.tasks import check_answer
from megatron_s2d.records import Prompt


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The result of verifying one response."""

    reward: float  # 0 or 1 from the verifiers with a name; from functions, judges and sums any finite number
    label: str  # "correct", which is what counts as solved, or else why not: "wrong", "no_answer", "timeout", ...
    detail: str | None = None  # what a function or a judge said about the response


class Verifier(Protocol):
    """Grades responses of one kind. Created for the first response that needs it, closed at the end of the run."""

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order; every prompt has an answer."""
        ...

    def close(self) -> None:
        """Stop all worker processes."""
        ...


class TaskVerifier:
    """Checks answers of the embedded task by comparing text (``data/tasks.py``)."""

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order."""
        pairs = zip(prompts, responses, strict=True)
        return [Verdict(*check_answer(response, prompt.answer)) for prompt, response in pairs]

    def close(self) -> None:
        """Do nothing: there are no worker processes."""
