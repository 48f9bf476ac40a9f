"""An engine by request over a table of next-token probabilities, for tests of what uses engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from megatron_s2d.errors import UserError
from megatron_s2d.rollout.engine import SamplingParams, version_spans
from megatron_s2d.rollout.sampling_client import Completion, Episode

Script = Callable[[np.ndarray, int], int | None]


class StandInEngine:
    """Samples token by token and yields to the event loop in between, so that requests interleave.

    The log-probability of a token after another is that of row ``token`` of ``logits``; a weight update adds the
    version to the temperature's scale, so that versions differ. script(token_ids, position): the token at a position of
    the completion, or None to draw it; lets a test decide what the model says. stalls_from: completions of this many
    tokens or more stop at their third one until they are aborted.
    """

    def __init__(
        self,
        vocab_size: int = 27,
        script: Script | None = None,
        max_concurrent: int = 10**6,
        stalls_from: float = float("inf"),
    ):
        self._stalls_from = stalls_from
        self.version = 0
        self.script = script
        self.logits = np.random.default_rng(0).normal(size=(vocab_size, vocab_size)) * 2.0
        self.requests: list[tuple[str, list[int]]] = []  # id and tokens of every request, in the order of their starts
        self.max_concurrent, self.num_active, self.most_active = max_concurrent, 0, 0
        self._aborted: set[str] = set()

    def log_probs(self, version: int, temperature: float = 1.0) -> np.ndarray:
        """Float64 [v, v]: row p is log pi(. | p) of the weights ``version``."""
        logits = self.logits * (1.0 + 0.1 * version) / (temperature or 1.0)
        logits = logits - logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def update_weights(self, chunks, version: int) -> None:
        self.version = version

    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    async def sample(
        self, token_ids: np.ndarray, params: SamplingParams, *, seed: int, request_id: str, priority: int = 0
    ) -> Completion:
        if len(token_ids) == 0:
            raise UserError(f"request {request_id} is empty: there is nothing to continue")
        if max(token_ids) >= len(self.logits):
            raise UserError(f"request {request_id} has tokens outside the vocabulary of {len(self.logits)}")
        while self.num_active >= self.max_concurrent:
            await asyncio.sleep(0)
        self.num_active += 1
        self.most_active = max(self.most_active, self.num_active)
        self.requests.append((request_id, [int(token) for token in token_ids]))
        try:
            return await self._sample(token_ids, params, seed, request_id)
        finally:
            self.num_active -= 1
            self._aborted.discard(request_id)

    async def _sample(self, token_ids, params, seed, request_id) -> Completion:
        tokens: list[int] = []
        log_probs: list[float] = []
        versions: list[int] = []
        reason = "length"
        while len(tokens) < params.max_new_tokens:
            await asyncio.sleep(0)
            if request_id in self._aborted:
                reason = "abort"
                break
            if len(tokens) == 2 and params.max_new_tokens >= self._stalls_from:
                continue
            row = self.log_probs(self.version, params.temperature)[[*token_ids, *tokens][-1]]
            token = None if self.script is None else self.script(token_ids, len(tokens))
            if token is None and params.temperature == 0:
                token = int(row.argmax())
            elif token is None:
                uniform = np.random.default_rng([seed, len(tokens)]).random()
                token = min(int(np.searchsorted(np.exp(row).cumsum(), uniform, side="right")), len(row) - 1)
            tokens.append(token)
            log_probs.append(float(row[token]))
            versions.append(self.version)
            if token in params.stop_token_ids:
                reason = "stop"
                break
        return Completion(
            np.array(tokens, dtype=np.int64),
            np.array(log_probs, dtype=np.float32),
            reason,
            version_spans(np.array(versions, dtype=np.int64)),
        )

    def run[Result](self, episodes: Sequence[Episode[Result]]) -> list[Result]:
        async def everything() -> list[Result]:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(_call(episode, self)) for episode in episodes]
            return [task.result() for task in running]

        try:
            return asyncio.run(everything())
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
        raise first


async def _call(episode, client):
    return await episode(client)
