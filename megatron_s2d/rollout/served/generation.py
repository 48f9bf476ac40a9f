"""Generates responses with the servers of a pool, on a thread of its own, so that the trainer can work meanwhile.

A request goes to a server by its prompt, so that the responses of a group share the prompt's keys and values there.
No response is lost or counted twice: a response is taken once, under the index of its request, and an attempt that
timed out is aborted. An interrupted generation keeps the beginnings of responses, each token with the version of its
weights; they are continued with later weights.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import math
import threading
import time
from collections.abc import Mapping, Sequence

from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import ProgressCallback, Request
from megatron_s2d.rollout.served.backend import ContextLengthExceeded, InvalidReply, PartialRollout
from megatron_s2d.rollout.served.replies import ReplyContract, to_partial, to_sample
from megatron_s2d.rollout.served.server_pool import Interrupted, NoHealthyServer, ServerPool, Session, gather_all


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """By the index of the request: samples, the last reason of each that failed, beginnings of interrupted ones."""

    samples: dict[int, Sample] = dataclasses.field(default_factory=dict)
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    partials: dict[int, PartialRollout] = dataclasses.field(default_factory=dict)


class GenerationTask:
    """Starts at once. Each request is retried until it has a sample or ``max_attempts`` are used up."""

    def __init__(
        self,
        pool: ServerPool,
        requests: Sequence[Request],
        contract: ReplyContract,
        *,
        partials: Mapping[int, PartialRollout] | None = None,
        num_groups: int | None = None,
        progress: ProgressCallback | None = None,
        concurrency: int | None = None,
    ):
        """partials: beginnings to continue, by index. num_groups: interrupt when that many groups are complete.

        concurrency: requests in flight at most, by default the pool's.
        """
        self._concurrency = pool.concurrency if concurrency is None else concurrency
        self.num_discarded_tokens = 0  # of interrupted responses that start again
        self.started, self.ended = time.monotonic(), math.inf
        self._pool, self._requests, self._contract, self._progress = pool, list(requests), contract, progress
        self._partials = dict(partials or {})
        # group -> responses without a sample
        self._num_open = collections.Counter(request.group_id for request in requests)
        self._num_missing_groups = num_groups
        self._result, self._error = GenerationResult(), None
        self._interrupted = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: Session | None = None
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def interrupt(self) -> None:
        """Stop; ``result`` returns what is complete. Does nothing if the generation has ended."""
        self._interrupted.set()
        loop, session = self._loop, self._session
        if session is not None:
            try:
                loop.call_soon_threadsafe(session.stopped.set)
            except RuntimeError:  # the loop is closed: the generation has ended
                return

    def result(self) -> GenerationResult:
        """Wait for the end. Raises ``UserError`` for a request that is refused or that a context is too short for."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            asyncio.run(self._generate())
        except BaseException as error:
            self._error = error
        finally:
            self.ended = time.monotonic()

    async def _generate(self) -> None:
        prompt_index = {key: index for index, key in enumerate(dict.fromkeys(map(_prompt_key, self._requests)))}
        semaphore = asyncio.Semaphore(self._concurrency)
        async with self._pool.session() as session:
            self._loop, self._session = asyncio.get_running_loop(), session
            if self._interrupted.is_set():  # before there was a session to stop
                session.stopped.set()
            aborting = asyncio.create_task(session.abort_all())
            try:
                await gather_all(
                    self._request_sample(session, semaphore, index, prompt_index[_prompt_key(request)])
                    for index, request in enumerate(self._requests)
                )
            finally:
                aborting.cancel()
                self._session = None

    async def _request_sample(self, session: Session, semaphore: asyncio.Semaphore, index: int, first: int) -> None:
        result, request = self._result, self._requests[index]
        async with semaphore:
            try:
                result.samples[index] = await self._attempt_sample(session, index, first)
                self._num_open[request.group_id] -= 1
                if self._num_missing_groups is not None and not self._num_open[request.group_id]:
                    self._num_missing_groups -= 1
                    if self._num_missing_groups == 0:
                        session.stopped.set()
            except (InvalidReply, NoHealthyServer) as error:
                result.failures[index] = str(error)
            except Interrupted:
                if index in self._partials:
                    result.partials[index] = self._partials[index]
        if self._progress is not None and not session.stopped.is_set():
            self._progress(len(result.samples) + len(result.failures), len(self._requests))

    async def _attempt_sample(self, session: Session, index: int, first: int) -> Sample:
        request, contract, protocol = self._requests[index], self._contract, self._pool.protocol
        partial = self._partials.get(index)

        def check(content: bytes) -> Sample:
            reply = protocol.parse_reply(content)
            if session.stopped.is_set() and reply.finish_reason == "abort":
                if (longer := to_partial(request, reply, contract, partial)) is not None:
                    self._partials[index] = longer
                else:
                    self.num_discarded_tokens += len(reply.output_ids)
                raise Interrupted
            return to_sample(request, reply, contract, partial)

        calls = (protocol.generate(request, partial) for _ in range(self._pool.settings.max_attempts))
        try:
            return await session.request(calls, first, check)
        except ContextLengthExceeded as error:
            raise UserError(f"the response to prompt {request.prompt.id} was cut at {error}") from None


def _prompt_key(request: Request) -> bytes:
    return request.prompt.token_ids.tobytes()
