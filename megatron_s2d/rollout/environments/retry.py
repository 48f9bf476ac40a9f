"""Another attempt after a wrong answer, which the prompt's verifier finds and the model is told of."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from megatron_s2d.records import Prompt
from megatron_s2d.rollout.environments.chat import ChatObservations, PlainObservations
from megatron_s2d.rollout.environments.environment import Step, Turn
from megatron_s2d.verify import Verdict


class Grader(Protocol):
    """The part of a ``RewardManager`` that attempts need."""

    def grade(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]: ...


class AttemptGrader:
    """Grades what several episodes ask for at the same time together, in one thread beside the event loop."""

    def __init__(self, grader: Grader) -> None:
        self._grader = grader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="attempts")
        self._waiting: list[tuple[Prompt, str, asyncio.Future[Verdict]]] = []

    async def grade(self, prompt: Prompt, response: str) -> Verdict:
        """Return the verdict of one response."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Verdict] = loop.create_future()
        self._waiting.append((prompt, response, future))
        await asyncio.sleep(0)  # the others that are ready now
        if self._waiting:
            batch, self._waiting = self._waiting, []
            prompts, responses, futures = zip(*batch, strict=True)
            try:
                verdicts = await loop.run_in_executor(self._thread, self._grader.grade, prompts, responses)
            except BaseException as error:
                for waiting in futures:
                    if not waiting.done():
                        waiting.set_exception(error)
                        waiting.exception()  # read here: the asking episode raises it, the others are cancelled
                raise
            for waiting, verdict in zip(futures, verdicts, strict=True):
                if not waiting.done():
                    waiting.set_result(verdict)
        return await future

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(cancel_futures=True)


class Retry:
    """Ends with the first correct attempt, or with the last one."""

    stop_token_ids: tuple[int, ...] = ()

    def __init__(
        self,
        grader: AttemptGrader,
        observations: ChatObservations | PlainObservations,
        *,
        max_turns: int,
        message: str,
        turn_reward: float,
    ) -> None:
        self._grader, self._observations = grader, observations
        self._max_turns, self._message, self._turn_reward = max_turns, message, turn_reward

    async def reset(self, prompt: Prompt, seed: int) -> None:
        """Begin with the first attempt."""
        self._prompt, self._num_turns = prompt, 0

    async def step(self, turn: Turn) -> Step:
        """Grade the attempt."""
        self._num_turns += 1
        verdict = await self._grader.grade(self._prompt, turn.text)
        if verdict.label == "correct" or self._num_turns == self._max_turns:
            return Step(None, verdict=verdict)
        return Step(self.message_of(verdict), self._turn_reward)

    def message_of(self, verdict: Verdict) -> np.ndarray:
        """Return the observation after a wrong attempt: [o] int64."""
        message = self._message.replace("{label}", verdict.label).replace("{detail}", verdict.detail or "")
        return self._observations.render(message)
