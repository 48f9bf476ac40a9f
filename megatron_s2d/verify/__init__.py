"""Verifiers: from a response and a label to a reward of 0 or 1 and one word on how it came about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_s2d.data.tasks import check_answer
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.code_verifier import CodeVerifier, isolation, read_label
from megatron_s2d.verify.math_verifier import MathVerifier
from megatron_s2d.verify.verdicts import Verdict, Verifier

__all__ = ["VERIFIERS", "Verifier", "RewardManager", "Verdict", "check_labels"]


class TaskVerifier:
    """The embedded task, which is checked by looking (``data/tasks.py``)."""

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """One verdict a response, in order."""
        pairs = zip(prompts, responses, strict=True)
        return [Verdict(*check_answer(response, prompt.answer)) for prompt, response in pairs]

    def close(self) -> None:
        """Nothing to end."""


# key of Prompt.verifier -> what makes its grader
VERIFIERS: dict[str, Callable[[], Verifier]] = {
    "modular_arithmetic": TaskVerifier,
    "math": MathVerifier,
    "code": CodeVerifier,
}


def check_labels(prompts: Sequence[Prompt]) -> None:
    """Whether the prompts can be graded here, found out before a run rather than in it.

    Raises ``UserError`` for a prompt without a label or with an unknown verifier, for unit tests of no known kind, and
    on a machine that cannot confine the programs under test.
    """
    for prompt in prompts:
        if prompt.verifier is None or prompt.answer is None:
            raise UserError(f"prompt {prompt.id} has no verifier or no answer; it cannot be graded")
        if prompt.verifier not in VERIFIERS:
            raise UserError(f"prompt {prompt.id}: unknown verifier '{prompt.verifier}' (known: {', '.join(VERIFIERS)})")
        if prompt.verifier == "code":
            read_label(prompt)
    if any(prompt.verifier == "code" for prompt in prompts):
        isolation()


class RewardManager:
    """Grades batches of responses, each by its prompt's verifier; a context manager, for there are worker processes.

    Workers start with the first response that needs them, whether or not torch or a process group is there.
    """

    def __init__(self) -> None:
        self._graders: dict[str, Verifier] = {}

    def __enter__(self) -> RewardManager:
        return self

    def __exit__(self, *_: Any) -> None:
        for grader in self._graders.values():
            grader.close()
        self._graders.clear()

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """One verdict a response, in order. Raises ``UserError`` as ``check_labels`` does."""
        places: dict[str, list[int]] = {}
        check_labels(prompts)
        for place, (prompt, _) in enumerate(zip(prompts, responses, strict=True)):
            places.setdefault(prompt.verifier, []).append(place)
        found: dict[int, Verdict] = {}
        for name, own in places.items():
            if name not in self._graders:
                self._graders[name] = VERIFIERS[name]()
            verdicts = self._graders[name].grade([prompts[i] for i in own], [responses[i] for i in own])
            found.update(zip(own, verdicts, strict=True))
        return [found[place] for place in range(len(prompts))]
