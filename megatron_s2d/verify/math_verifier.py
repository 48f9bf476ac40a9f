"""Grades mathematical answers with ``math-verify`` in worker processes that cannot hang, exhaust or harm training.

The answer of a response is the last ``\\boxed{...}``; without one, the text after the last ``####``; without that, the
text after the last "answer is" or "answer:" on its line. Only one answer is compared, so listing guesses earns nothing.
The reasoning is not graded.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_s2d.records import Prompt
from megatron_s2d.verify.verifier import Verdict
from megatron_s2d.verify.worker_pool import WorkerPool

_WORKER = Path(__file__).with_name("math_worker.py")
_MAX_ANSWER_LENGTH = 2000  # characters; longer expressions are not parsed
_MAX_WORKERS = 8
_WALL_PER_CPU_SECOND = 20  # more than the worker allows: only a worker that hangs exceeds it
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_PHRASE = re.compile(r"answer(?:[ \t]+is)?[ \t*]*:?", re.IGNORECASE)


class MathVerifier:
    """Compares the answer in a response with the prompt's answer.

    Verdict labels: ``correct``, ``wrong``, ``no_answer``, ``unreadable`` (not an expression), ``too_long``,
    ``timeout``, ``crash`` (out of memory, or a bug of the expression library), ``bad_label`` (the label
    cannot be parsed).
    """

    def __init__(self, num_workers: int | None = None, cpu_seconds: int = 5, memory_bytes: int = 2 << 30) -> None:
        """Limit each comparison to ``cpu_seconds`` and ``memory_bytes``. Default: one worker per core, at most 8."""
        cores = len(os.sched_getaffinity(0))
        self._pool = WorkerPool(_WORKER, num_workers or min(_MAX_WORKERS, cores))
        self._limits = {"cpu_seconds": cpu_seconds, "memory_bytes": memory_bytes}

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order."""
        answers = [extract_answer(response) for response in responses]
        # Responses of a group often have the same answer; every distinct pair is compared once.
        pairs = dict.fromkeys(
            (prompt.answer, answer)
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer and len(answer) <= _MAX_ANSWER_LENGTH
        )
        requests = [
            {"label": _without_full_stop(label.strip()), "answer": answer} | self._limits for label, answer in pairs
        ]
        results = self._pool.run(requests, _WALL_PER_CPU_SECOND * self._limits["cpu_seconds"])
        statuses = dict(zip(pairs, results, strict=True))
        verdicts = []
        for prompt, answer in zip(prompts, answers, strict=True):
            status = statuses.get((prompt.answer, answer), "too_long" if answer else "no_answer")
            verdicts.append(Verdict(float(status == "correct"), status))
        return verdicts

    def close(self) -> None:
        """Stop the workers."""
        self._pool.close()


def extract_answer(response: str) -> str | None:
    """Return the answer that a response commits to, or None; linear in the length of the response."""
    text = response.rpartition("</think>")[2]
    last_box = _last_match(_BOX, text)
    if last_box is not None:
        return _boxed(text, last_box.end())
    if "####" in text:
        return _clean(text.rpartition("####")[2].lstrip().partition("\n")[0])
    last_phrase = _last_match(_PHRASE, text)
    return None if last_phrase is None else _clean(text[last_phrase.end() :].lstrip(" \t\n").partition("\n")[0])


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = collections.deque(pattern.finditer(text), maxlen=1)
    return matches[0] if matches else None


def _boxed(text: str, start: int) -> str | None:
    """Return the text in the braces at ``start`` (or the one word there); None if they are not closed."""
    remaining = text[start : start + 2 * _MAX_ANSWER_LENGTH + 2]
    stripped = remaining.lstrip()
    if not stripped.startswith("{"):
        return _clean(re.split(r"[\s$]", stripped, maxsplit=1)[0])
    end = _closing_brace(stripped)
    if end is not None:
        return _without_full_stop(stripped[1:end].strip()) or None
    return stripped[1:] if len(remaining) > 2 * _MAX_ANSWER_LENGTH else None


def _closing_brace(text: str) -> int | None:
    """Return the index that closes the brace at the start of ``text``; escaped braces do not count."""
    depth, index = 0, 0
    while index < len(text):
        character = text[index]
        if character == "\\":
            index += 1
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return index
        index += 1
    return None


def _clean(answer: str) -> str | None:
    """Strip emphasis, math delimiters and the full stop from around an answer.

    Return None for unbalanced braces, because math-verify would parse pieces of such a text.
    """
    answer, before = answer[: 2 * _MAX_ANSWER_LENGTH], None
    while answer != before:
        before = answer
        answer = _without_full_stop(answer.strip().strip("*"))
        for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if len(answer) > len(opening) and answer.startswith(opening) and answer.endswith(closing):
                answer = answer[len(opening) : len(answer) - len(closing)]
    if len(answer) <= _MAX_ANSWER_LENGTH and _closing_brace(f"{{{answer}}}") != len(answer) + 1:
        return None
    return answer or None


def _without_full_stop(answer: str) -> str:
    return answer if answer.endswith("\\right.") else answer.removesuffix(".")
