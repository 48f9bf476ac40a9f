"""Verifiers: grade responses against reference answers or unit tests, with a reward of 0 or 1 and a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.code_verifier import CodeVerifier, parse_unit_tests, sandbox_layers
from megatron_s2d.verify.math_verifier import MathVerifier
from megatron_s2d.verify.verifier import TaskVerifier, Verdict, Verifier

__all__ = ["VERIFIERS", "RewardManager", "Verdict", "Verifier", "check_labels"]


# value of Prompt.verifier -> its constructor
VERIFIERS: dict[str, Callable[[], Verifier]] = {
    "modular_arithmetic": TaskVerifier,
    "math": MathVerifier,
    "code": CodeVerifier,
}


def check_labels(prompts: Sequence[Prompt]) -> None:
    """Check before a run that the prompts can be graded on this machine.

    Raises ``UserError`` for a prompt without a label or with an unknown verifier, for malformed unit tests, and if
    programs cannot be sandboxed here.
    """
    for prompt in prompts:
        if prompt.verifier is None or prompt.answer is None:
            raise UserError(f"prompt {prompt.id} has no verifier or no answer; set both to grade it")
        if prompt.verifier not in VERIFIERS:
            raise UserError(
                f"prompt {prompt.id}: unknown verifier '{prompt.verifier}'; choose one of {', '.join(VERIFIERS)}"
            )
        if prompt.verifier == "code":
            parse_unit_tests(prompt)
    if any(prompt.verifier == "code" for prompt in prompts):
        sandbox_layers()


class RewardManager:
    """Grades batches of responses, each with the verifier of its prompt. A context manager: it owns worker processes.

    Workers start with the first response that needs them and inherit neither torch nor a process group.
    """

    def __init__(self) -> None:
        self._verifiers: dict[str, Verifier] = {}

    def __enter__(self) -> RewardManager:
        return self

    def __exit__(self, *_: Any) -> None:
        for verifier in self._verifiers.values():
            verifier.close()
        self._verifiers.clear()

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order. Raises ``UserError`` like ``check_labels``."""
        indices_by_verifier: dict[str, list[int]] = {}
        check_labels(prompts)
        for index, (prompt, _) in enumerate(zip(prompts, responses, strict=True)):
            indices_by_verifier.setdefault(prompt.verifier, []).append(index)
        verdicts: dict[int, Verdict] = {}
        for name, indices in indices_by_verifier.items():
            if name not in self._verifiers:
                self._verifiers[name] = VERIFIERS[name]()
            graded = self._verifiers[name].grade([prompts[i] for i in indices], [responses[i] for i in indices])
            verdicts.update(zip(indices, graded, strict=True))
        return [verdicts[index] for index in range(len(prompts))]
