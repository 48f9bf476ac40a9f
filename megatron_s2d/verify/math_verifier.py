"""Mathematical answers, compared with ``math-verify`` in worker processes that cannot hang, exhaust or harm training.

What counts as the answer of a response: the last ``\\boxed{...}``; without one what follows the last ``####``; without
that what follows the last "answer is" or "answer:" on its line. Only one answer is compared, so listing guesses earns
nothing. Left out: judging the reasoning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_s2d.records import Prompt
from megatron_s2d.verify.verdicts import Verdict
from megatron_s2d.verify.worker_pool import WorkerPool

_WORKER = Path(__file__).with_name("math_worker.py")
_LONGEST_ANSWER = 2000  # characters; expressions beyond it are refused unread
_MOST_WORKERS = 8
_WALL_PER_CPU_SECOND = 20  # beyond what the worker allows: for a worker that is itself in trouble
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_PHRASE = re.compile(r"answer(?:[ \t]+is)?[ \t*]*:?", re.IGNORECASE)


class MathVerifier:
    """Compares the answer in a response with the prompt's answer.

    Verdict words: ``correct``, ``wrong``, ``no_answer``, ``unreadable`` (not an expression), ``too_long``, ``timeout``,
    ``crash`` (memory, or a fault of the expression library), ``bad_label`` (the prompt's answer is no expression).
    """

    def __init__(self, num_workers: int | None = None, cpu_seconds: int = 5, memory_bytes: int = 2 << 30) -> None:
        """``cpu_seconds`` and ``memory_bytes`` bound each comparison; None: a worker per core, 8 at most."""
        cores = len(os.sched_getaffinity(0))
        self._pool = WorkerPool(_WORKER, num_workers or min(_MOST_WORKERS, cores))
        self._limits = {"cpu_seconds": cpu_seconds, "memory_bytes": memory_bytes}

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """One verdict a response, in order."""
        answers = [extract_answer(response) for response in responses]
        # Responses of a group mostly agree; every pair is compared once.
        pairs = dict.fromkeys(
            (prompt.answer, answer)
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer and len(answer) <= _LONGEST_ANSWER
        )
        requests = [
            {"label": _without_full_stop(label.strip()), "answer": answer} | self._limits for label, answer in pairs
        ]
        words = self._pool.ask(requests, _WALL_PER_CPU_SECOND * self._limits["cpu_seconds"])
        found = dict(zip(pairs, words, strict=True))
        verdicts = []
        for prompt, answer in zip(prompts, answers, strict=True):
            word = found.get((prompt.answer, answer), "too_long" if answer else "no_answer")
            verdicts.append(Verdict(float(word == "correct"), word))
        return verdicts

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


def extract_answer(response: str) -> str | None:
    """The answer that a response commits to, or None; linear in the length of the response."""
    text = response.rpartition("</think>")[2]
    last_box = None
    for last_box in _BOX.finditer(text):
        pass
    if last_box is not None:
        return _boxed(text, last_box.end())
    if "####" in text:
        return _clean(text.rpartition("####")[2].lstrip().partition("\n")[0])
    last_phrase = None
    for last_phrase in _PHRASE.finditer(text):
        pass
    return None if last_phrase is None else _clean(text[last_phrase.end() :].lstrip(" \t\n").partition("\n")[0])


def _boxed(text: str, start: int) -> str | None:
    """What is between the braces at ``start`` (or the one word there), None if they are not closed."""
    rest = text[start : start + 2 * _LONGEST_ANSWER + 2]
    stripped = rest.lstrip()
    if not stripped.startswith("{"):
        return _clean(re.split(r"[\s$]", stripped, maxsplit=1)[0])
    end = _closing_brace(stripped)
    if end is not None:
        return _without_full_stop(stripped[1:end].strip()) or None
    return stripped[1:] if len(rest) > 2 * _LONGEST_ANSWER else None


def _closing_brace(text: str) -> int | None:
    """Where the brace at the start of ``text`` is closed; an escaped brace is text."""
    depth, place = 0, 0
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 1
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return place
        place += 1
    return None


def _clean(answer: str) -> str | None:
    """Without what surrounds an answer in running text: emphasis, mathematical delimiters, the full stop.

    None for braces that do not pair up: math-verify would find pieces of such a text.
    """
    answer, before = answer[: 2 * _LONGEST_ANSWER], None
    while answer != before:
        before = answer
        answer = _without_full_stop(answer.strip().strip("*"))
        for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if len(answer) > len(opening) and answer.startswith(opening) and answer.endswith(closing):
                answer = answer[len(opening) : len(answer) - len(closing)]
    if len(answer) <= _LONGEST_ANSWER and _closing_brace(f"{{{answer}}}") != len(answer) + 1:
        return None
    return answer or None


def _without_full_stop(answer: str) -> str:
    return answer if answer.endswith("\\right.") else answer.removesuffix(".")
