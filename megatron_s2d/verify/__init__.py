"""Verifiers: grade responses against reference answers, unit tests, functions and judges: a reward and a reason."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_s2d.artifacts.files import file_digest, json_digest
from megatron_s2d.config.reward import (
    CodeReward,
    FunctionReward,
    HttpReward,
    MathReward,
    RewardConfig,
    SumReward,
    needs_label,
    parts_of,
    read_verifier,
    runs_unit_tests,
)
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.code_labels import check_unit_tests
from megatron_s2d.verify.code_verifier import CodeVerifier, sandbox_layers
from megatron_s2d.verify.function_reward import FunctionVerifier, check_function
from megatron_s2d.verify.http_reward import HttpVerifier, check_endpoint
from megatron_s2d.verify.math_verifier import MathVerifier, unread_label
from megatron_s2d.verify.reward import verdict_of
from megatron_s2d.verify.verifier import TaskVerifier, Verdict, Verifier

__all__ = ["VERIFIERS", "RewardManager", "Verdict", "Verifier", "check_labels", "labels_as_text"]

_EXAMPLES = 3  # of labels in a message
_TEXT_LABEL, _BAD_LABEL = 1, 2
_LABELS_AT_ONCE = 1 << 14

# value of Prompt.verifier -> its constructor
VERIFIERS: dict[str, Callable[[], Verifier]] = {
    "modular_arithmetic": TaskVerifier,
    "math": MathVerifier,
    "code": CodeVerifier,
}


def check_labels(prompts: Sequence[Prompt]) -> None:
    """Check before a run that the prompts can be graded on this machine.

    Raises ``UserError`` for a prompt without a label or with an unknown verifier, for labels that no answer can equal,
    for unit tests that cannot be run, and if programs cannot be sandboxed here.
    """
    table = PromptTable.of(prompts)
    texts = [text for text in table.distinct("verifier") if text is not None]
    parts = {part for text in texts for part in parts_of(read_verifier(text))}
    unknown = {part for part in parts if isinstance(part, str)} - set(VERIFIERS)
    if table.is_null("verifier").any() or table.is_null("answer").any() or unknown:
        _check_verifiers(table)
    _check_math_labels(table)
    if any(runs_unit_tests(read_verifier(text)) for text in texts):
        _check_unit_tests(table)
        sandbox_layers()
    for part in parts:
        if isinstance(part, FunctionReward):
            check_function(part)
        elif isinstance(part, HttpReward):
            check_endpoint(part, next(prompt for prompt in table if _is_graded_by(prompt, part)))


def _is_graded_by(prompt: Prompt, part: HttpReward) -> bool:
    return prompt.verifier is not None and part in parts_of(read_verifier(prompt.verifier))


def _check_verifiers(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        verifier = None if prompt.verifier is None else read_verifier(prompt.verifier)
        if verifier is None or (prompt.answer is None and needs_label(verifier)):
            raise UserError(f"prompt {prompt.id} has no verifier or no answer; set both to grade it")
        for part in parts_of(verifier):
            if isinstance(part, str) and part not in VERIFIERS:
                raise UserError(
                    f"prompt {prompt.id}: unknown verifier '{part}'; choose one of {', '.join(VERIFIERS)}, or write "
                    "module:function or http://... (docs/rewards.md)"
                )


def _check_math_labels(prompts: PromptTable) -> None:
    """Refuse ``\\boxed{}``, ``Infinity``, unbalanced braces: what grading would call ``bad_label``."""
    bad = prompts.select(_label_states(prompts) == _BAD_LABEL)
    if bad:
        raise UserError(
            f"{len(bad)} of {len(prompts)} labels are no answers ({_label_examples(bad)}); correct or remove these rows"
        )


def _check_unit_tests(prompts: PromptTable) -> None:
    """Refuse unit tests that cannot be run; those of a table on disk are read once."""
    for prompt in prompts.select(prompts.remember(f"unit-tests-{_tests_digest()}", _refused_tests)):
        check_unit_tests(prompt)


def _refused_tests(prompts: PromptTable) -> np.ndarray:
    refused = np.zeros(len(prompts), dtype=bool)
    for index, prompt in enumerate(prompts):
        if prompt.verifier is not None and runs_unit_tests(read_verifier(prompt.verifier)):
            try:
                check_unit_tests(prompt)
            except UserError:
                refused[index] = True
    return refused


def labels_as_text(prompts: Sequence[Prompt]) -> str | None:
    """Return how many labels are compared as text, because they are no expressions, with examples; None if none are."""
    table = PromptTable.of(prompts)
    texts = table.select(_label_states(table) == _TEXT_LABEL)
    if not texts:
        return None
    return (
        f"{len(texts)} of {len(prompts)} labels cannot be read as mathematics, so only the same text is right "
        f"({_label_examples(texts)})"
    )


def _label_states(prompts: PromptTable) -> np.ndarray:
    """Return how the label of each prompt is read, uint8 [n]; computed once for a table on disk."""
    return prompts.remember(f"labels-{_code_digest()}", _read_labels)


def _read_labels(prompts: PromptTable) -> np.ndarray:
    values = {None: 0, "text": _TEXT_LABEL, "bad_label": _BAD_LABEL}
    result = np.zeros(len(prompts), dtype=np.uint8)

    @functools.lru_cache(maxsize=_LABELS_AT_ONCE)  # few labels are the answer of one problem alone
    def state(answer: str) -> int:
        return values[unread_label(answer)]

    is_math = {text: _is_math(text) for text in prompts.distinct("verifier")}
    for start in range(0, len(prompts) if any(is_math.values()) else 0, _LABELS_AT_ONCE):
        part = prompts[start : start + _LABELS_AT_ONCE]
        verifiers, positions = part.encoded("verifier")
        graded = np.array([is_math[verifier] for verifier in verifiers])[positions]
        answers, positions = part.select(graded).encoded("answer")
        states = np.array([0 if answer is None else state(answer) for answer in answers], dtype=np.uint8)
        result[start + np.flatnonzero(graded)] = states[positions]
    return result


def _is_math(verifier: str | None) -> bool:
    if verifier is None:
        return False
    return any(part == "math" or isinstance(part, MathReward) for part in parts_of(read_verifier(verifier)))


@functools.cache
def _code_digest() -> str:
    """Return the digest of what reads labels: what was computed before it changed is computed again."""
    folder = Path(__file__).parent
    paths = [folder / "math_verifier.py", *sorted((folder / "mathematics").glob("*.py"))]
    return json_digest([file_digest(path) for path in paths])


@functools.cache
def _tests_digest() -> str:
    """Return the digest of what reads unit tests."""
    return json_digest([file_digest(path) for path in sorted(Path(__file__).parent.glob("code_*.py"))])


def _label_examples(prompts: Sequence[Prompt]) -> str:
    shown = [f"{prompt.id}: {prompt.answer[:60]!r}" for prompt in prompts[:_EXAMPLES]]
    return ", ".join(shown) + (", ..." if len(prompts) > _EXAMPLES else "")


class SumVerifier:
    """A weighted sum of the rewards of other verifiers, whose own rewards and remarks are the verdict's detail."""

    def __init__(self, settings: SumReward) -> None:
        self._settings = settings
        self._verifiers = [create_verifier(term.verifier) for term in settings.terms]

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order."""
        graded = [verifier.grade(prompts, responses) for verifier in self._verifiers]
        verdicts = []
        for parts in zip(*graded, strict=True):
            weighted = zip(self._settings.terms, parts, strict=True)
            reward = math.fsum(term.weight * part.reward for term, part in weighted)
            detail = json.dumps([[part.reward, part.label, part.detail] for part in parts], ensure_ascii=False)
            verdicts.append(verdict_of(reward, self._settings.correct_at, detail))
        return verdicts

    def close(self) -> None:
        """Close all verifiers."""
        for verifier in self._verifiers:
            verifier.close()


def create_verifier(verifier: str | RewardConfig) -> Verifier:
    """Return the verifier of ``Prompt.verifier``."""
    match verifier:
        case FunctionReward():
            return FunctionVerifier(verifier)
        case HttpReward():
            return HttpVerifier(verifier)
        case MathReward():
            return MathVerifier(last_number=verifier.last_number)
        case CodeReward():
            return CodeVerifier(partial_credit=verifier.partial_credit, correct_at=verifier.correct_at)
        case SumReward():
            return SumVerifier(verifier)
        case _:
            return VERIFIERS[verifier]()


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
        """Return one verdict per response, in order. Raises ``UserError`` for prompts that ``check_labels`` refuses."""
        indices_by_verifier: dict[str, list[int]] = {}
        _check_verifiers(prompts)
        for index, (prompt, _) in enumerate(zip(prompts, responses, strict=True)):
            indices_by_verifier.setdefault(prompt.verifier, []).append(index)
        verdicts: dict[int, Verdict] = {}
        for name, indices in indices_by_verifier.items():
            if name not in self._verifiers:
                self._verifiers[name] = create_verifier(read_verifier(name))
            graded = self._verifiers[name].grade([prompts[i] for i in indices], [responses[i] for i in indices])
            verdicts.update(zip(indices, graded, strict=True))
        return [verdicts[index] for index in range(len(prompts))]
