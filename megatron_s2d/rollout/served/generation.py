"""Responses from the servers of a pool, on a thread of its own, so that the trainer may work meanwhile.

A request goes to a server by its prompt, so that the responses of a group share the prompt's keys and values there.
Nothing is lost or counted twice: a response is taken once, under the place of its request, and a try that was given up
is aborted. A generation that is interrupted keeps the beginnings of responses, each token with the version of its
weights; later weights go on from them.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import threading
from collections.abc import Mapping, Sequence

from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import ProgressCallback, Request
from megatron_s2d.rollout.served.server_pool import Interrupted, NoHealthyServer, ServerPool, Session, gather_all
from megatron_s2d.rollout.sglang.protocol import (
    ContextLengthExceeded,
    InvalidReply,
    PartialRollout,
    ReplyContract,
    generate_body,
    parse_reply,
    to_partial,
    to_sample,
)


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """By the place of the request: samples, the last reason of each that failed, beginnings of interrupted ones."""

    samples: dict[int, Sample] = dataclasses.field(default_factory=dict)
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    partials: dict[int, PartialRollout] = dataclasses.field(default_factory=dict)


class GenerationTask:
    """Begins at once. One try after the other for each request until it has a sample or ``attempts`` are used up."""

    def __init__(
        self,
        pool: ServerPool,
        requests: Sequence[Request],
        expected: ReplyContract,
        *,
        partials: Mapping[int, PartialRollout] | None = None,
        num_groups: int | None = None,
        progress: ProgressCallback | None = None,
    ):
        """partials: beginnings to go on from, by place. num_groups: interrupt when that many groups are complete."""
        self._pool, self._requests, self._expected, self._progress = pool, list(requests), expected, progress
        self._partials = dict(partials or {})
        # group -> responses without a sample
        self._open = collections.Counter(request.group_id for request in requests)
        self._groups_left = num_groups
        self._outcome, self._error = GenerationResult(), None
        self._interrupted = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: Session | None = None
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def interrupt(self) -> None:
        """Stop; ``result`` has what there is. Nothing happens to a generation that has ended."""
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
        return self._outcome

    def _run(self) -> None:
        try:
            asyncio.run(self._generate())
        except BaseException as error:
            self._error = error

    async def _generate(self) -> None:
        groups = {key: place for place, key in enumerate(dict.fromkeys(map(_prompt_key, self._requests)))}
        room = asyncio.Semaphore(self._pool.concurrency)
        async with self._pool.session() as session:
            self._loop, self._session = asyncio.get_running_loop(), session
            if self._interrupted.is_set():  # before there was a session to stop
                session.stopped.set()
            giving_up = asyncio.create_task(session.abort_all())
            try:
                await gather_all(
                    self._request_sample(session, room, place, groups[_prompt_key(request)])
                    for place, request in enumerate(self._requests)
                )
            finally:
                giving_up.cancel()
                self._session = None

    async def _request_sample(self, session: Session, room: asyncio.Semaphore, place: int, first: int) -> None:
        outcome, request = self._outcome, self._requests[place]
        async with room:
            try:
                outcome.samples[place] = await self._try_sample(session, place, first)
                self._open[request.group_id] -= 1
                if self._groups_left is not None and not self._open[request.group_id]:
                    self._groups_left -= 1
                    if self._groups_left == 0:
                        session.stopped.set()
            except (InvalidReply, NoHealthyServer) as error:
                outcome.failures[place] = str(error)
            except Interrupted:
                if place in self._partials:
                    outcome.partials[place] = self._partials[place]
        if self._progress is not None and not session.stopped.is_set():
            self._progress(len(outcome.samples) + len(outcome.failures), len(self._requests))

    async def _try_sample(self, session: Session, place: int, first: int) -> Sample:
        request, expected = self._requests[place], self._expected
        before = self._partials.get(place)

        def checked(content: bytes) -> Sample:
            reply = parse_reply(content)
            if session.stopped.is_set() and reply.meta_info.finish_reason.type == "abort":
                if (longer := to_partial(request, reply, expected, before)) is not None:
                    self._partials[place] = longer
                raise Interrupted
            return to_sample(request, reply, expected, before)

        bodies = (generate_body(request, before) for _ in range(self._pool.settings.max_attempts))
        try:
            return await session.request(bodies, first, checked)
        except ContextLengthExceeded as error:
            raise UserError(f"the response to prompt {request.prompt.id} was cut at {error}") from None


def _prompt_key(request: Request) -> bytes:
    return request.prompt.token_ids.tobytes()
