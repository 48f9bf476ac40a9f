"""Grades mathematical answers in worker processes that cannot hang, exhaust or harm training.

``mathematics/extract.py`` finds the answer of a response; ``mathematics/compare.py`` compares it with the label. Only
one answer is compared, so listing guesses earns nothing. The reasoning is not graded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_s2d.records import Prompt
from megatron_s2d.verify.mathematics.compare import label_problem
from megatron_s2d.verify.mathematics.extract import MAX_ANSWER_LENGTH, boxed_content, extract_answer, without_full_stop
from megatron_s2d.verify.verifier import Verdict
from megatron_s2d.verify.worker_pool import WorkerPool

_WORKER = Path(__file__).with_name("math_worker.py")
_MAX_WORKERS = 8
_WALL_PER_CPU_SECOND = 20  # more than the worker allows: only a worker that hangs exceeds it


class MathVerifier:
    """Compares the answer in a response with the prompt's answer.

    Verdict labels: ``correct``, ``wrong``, ``no_answer``, ``unreadable`` (not an expression), ``too_long``,
    ``timeout``, ``crash`` (out of memory, or a bug), ``bad_label`` (nothing can equal the label).
    """

    def __init__(
        self,
        num_workers: int | None = None,
        cpu_seconds: int = 5,
        memory_bytes: int = 2 << 30,
        *,
        last_number: bool = False,
    ) -> None:
        """Limit each comparison to ``cpu_seconds`` and ``memory_bytes``. Default: one worker per core, at most 8.

        last_number: a response that states no answer answers with its last number.
        """
        self._extract = functools.partial(extract_answer, last_number=last_number)
        cores = len(os.sched_getaffinity(0))
        self._pool = WorkerPool(_WORKER, num_workers or min(_MAX_WORKERS, cores))
        self._limits = {"cpu_seconds": cpu_seconds, "memory_bytes": memory_bytes}

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order."""
        answers = [self._extract(response, prompt.text) for prompt, response in zip(prompts, responses, strict=True)]
        # Responses of a group often have the same answer; every distinct pair is compared once.
        pairs = dict.fromkeys(
            (prompt.answer, answer)
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer and len(answer) <= MAX_ANSWER_LENGTH
        )
        requests = [{"label": label_text(label), "answer": answer} | self._limits for label, answer in pairs]
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


def label_text(label: str) -> str:
    """Return the answer that a label holds, which may stand in a box, behind ``####`` or before a full stop."""
    boxed = boxed_content(label)
    return without_full_stop(label.rpartition("####")[2].strip()) if boxed is None else boxed


@functools.lru_cache(maxsize=1 << 17)  # preflight asks for every use of a label
def unread_label(label: str) -> str | None:
    """Return None for a label that is read completely, ``text`` if it is compared as text, ``bad_label`` otherwise."""
    return label_problem(label_text(label)) if len(label) <= MAX_ANSWER_LENGTH else "bad_label"
