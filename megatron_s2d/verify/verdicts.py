"""What a verifier says, and what it is asked through."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from megatron_s2d.records import Prompt


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one response."""

    reward: float  # 0 or 1
    label: str  # "correct", "wrong", "no_answer", "timeout", ...


class Verifier(Protocol):
    """One way to verify. Made when the first response needs it, closed with the run."""

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """One verdict a response, in order; every prompt has an answer."""
        ...

    def close(self) -> None:
        """End whatever processes there are."""
        ...
