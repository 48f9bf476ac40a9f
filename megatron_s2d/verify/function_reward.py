"""Grades responses with a function of the user, in worker processes that are killed when a call takes too long."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_s2d.config.reward import FunctionReward
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify.reward import Failure, Graded, as_verdicts
from megatron_s2d.verify.verifier import Verdict
from megatron_s2d.verify.worker_pool import WorkerPool

_WORKER = Path(__file__).with_name("function_worker.py")
_MAX_WORKERS = 8
_GRACE_SECONDS = 5.0  # an async call that takes too long is ended by the worker first


class FunctionVerifier:
    """Calls ``function(prompt=, response=, answer=)`` of the user's module.

    Verdict labels: ``correct`` (a reward of at least ``correct_at``), ``wrong``, and for failures ``error`` (it
    raised), ``timeout``, ``crash`` (its process ended), ``not_finite``, ``wrong_shape``.
    """

    def __init__(self, settings: FunctionReward) -> None:
        self._settings = settings
        num_workers = settings.num_workers or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
        path = [os.getcwd(), *(entry for entry in sys.path if entry)]
        greeting = {"function": settings.function, "path": path, "concurrency": settings.concurrency}
        self._pool = WorkerPool(_WORKER, num_workers, greeting)

    def check(self) -> None:
        """Start a worker; raise ``UserError`` if the function cannot be imported."""
        self._pool.run([_request([], [], self._settings)], self._settings.timeout_seconds)

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order. Raises ``UserError`` as ``failure_reward: null`` asks for."""
        size = max(self._settings.batch_size, self._settings.concurrency)
        starts = range(0, len(responses), size)
        parts = [(prompts[start : start + size], responses[start : start + size]) for start in starts]
        graded: list[list[Graded]] = self._call(parts)
        # One response must not spoil its neighbours: those of a call that failed as a whole are graded one by one.
        again = [index for index, part in enumerate(graded) if len(part) > 1 and all(map(_is_failure, part))]
        singles = [([prompt], [text]) for index in again for prompt, text in zip(*parts[index], strict=True)]
        repeated = iter(self._call(singles))
        for index in again:
            graded[index] = [next(repeated)[0] for _ in graded[index]]
        rewards = [reward for part in graded for reward in part]
        return as_verdicts(prompts, rewards, self._settings, f"reward {self._settings.function}")

    def close(self) -> None:
        """Kill the workers."""
        self._pool.close()

    def _call(self, parts: Sequence[tuple[Sequence[Prompt], Sequence[str]]]) -> list[list[Graded]]:
        requests = [_request(prompts, responses, self._settings) for prompts, responses in parts]
        replies = self._pool.run(requests, self._settings.timeout_seconds + _GRACE_SECONDS * self._is_async)
        return [_read(reply, len(part[1]), self._settings) for part, reply in zip(parts, replies, strict=True)]

    @property
    def _is_async(self) -> bool:
        return self._settings.concurrency > 1


def _request(prompts: Sequence[Prompt], responses: Sequence[str], settings: FunctionReward) -> dict:
    return {
        "prompts": [prompt.text for prompt in prompts],
        "responses": list(responses),
        "answers": [prompt.answer for prompt in prompts],
        "batched": settings.batch_size > 1,
        "timeout_seconds": settings.timeout_seconds,
    }


def _read(reply: str, count: int, settings: FunctionReward) -> list[Graded]:
    if reply == "timeout":
        return [Failure("timeout", f"no result after {settings.timeout_seconds:g} s")] * count
    if reply == "crash":
        return [Failure("crash", "its process ended")] * count
    rows = json.loads(reply)
    return [Failure(row[1], row[2]) if row[0] is None else (row[0], row[1]) for row in rows]


def _is_failure(graded: Graded) -> bool:
    return isinstance(graded, Failure)


@functools.cache  # preflight asks for every use of an entry of `data`
def check_function(settings: FunctionReward) -> None:
    """Raise ``UserError`` if the function cannot be imported in a worker process."""
    verifier = FunctionVerifier(settings.model_copy(update={"num_workers": 1}))
    try:
        verifier.check()
    except UserError as error:
        raise UserError(f"verifier {settings.function}: {error}") from None
    finally:
        verifier.close()
