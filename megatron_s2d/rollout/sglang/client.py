"""Requests to several servers at once: bounded concurrency, bounded tries with back-off, every reply checked.

A request goes to a server by its prompt, so that the responses of a group share the prompt's keys and values there; a
try that fails goes to the next server. A server that is gone, or that answers with other weights than the current
ones, gets nothing more: ``Pool.problems`` says why, and whoever owns the servers mends them. Nothing is lost or counted
twice: a response is taken once, under the place of its request, and a try that was given up is aborted.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import httpx
import numpy as np

from megatron_s2d.config.base import UserError
from megatron_s2d.config.training import SglangConfig
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import ProgressCallback, Request
from megatron_s2d.rollout.sglang.protocol import (
    BadReply,
    Decoder,
    GenerateReply,
    ShortContext,
    StaleWeights,
    generate_body,
    parse_replies,
    parse_reply,
    score_body,
    to_sample,
)

_FIRST_PAUSE_SECONDS = 0.25  # before the second try; doubled before each further one
_ABORT_SECONDS = 5.0


class _Unavailable(Exception):
    """No server is left that may be asked."""


@dataclasses.dataclass(eq=False)
class Server:
    """A server and why it may not be asked; an empty ``problem`` means that it may."""

    url: str
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a good reply agrees with."""

    weight_version: str  # that the server reports
    version: int  # that samples are credited to
    vocab_size: int
    tokenizer: Decoder | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Samples by the place of their request, and the last reason of each request that failed; disjoint."""

    samples: dict[int, Sample]
    failures: dict[int, str]


class Pool:
    """The servers that hold one model."""

    def __init__(self, urls: Sequence[str], settings: SglangConfig):
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self._settings = settings

    @property
    def problems(self) -> dict[str, str]:
        """Address -> why the server gets no requests."""
        return {server.url: server.problem for server in self.servers if server.problem}

    def generate(
        self, requests: Sequence[Request], expected: Expected, progress: ProgressCallback | None = None
    ) -> Outcome:
        """One try after the other for each request until it has a sample or ``attempts`` are used up.

        Raises ``UserError`` for a request that the servers refuse, which no other try would change.
        """
        return asyncio.run(self._generate(requests, expected, progress))

    async def _generate(
        self, requests: Sequence[Request], expected: Expected, progress: ProgressCallback | None
    ) -> Outcome:
        outcome = Outcome({}, {})
        groups = {key: place for place, key in enumerate(dict.fromkeys(r.prompt.token_ids.tobytes() for r in requests))}
        room = asyncio.Semaphore(self._settings.concurrency * len(self.servers))

        async def work(client: httpx.AsyncClient, place: int, request: Request) -> None:
            async with room:
                try:
                    first = groups[request.prompt.token_ids.tobytes()]
                    outcome.samples[place] = await self._sample(client, request, first, expected)
                except (BadReply, _Unavailable) as error:
                    outcome.failures[place] = str(error)
            if progress is not None:
                progress(len(outcome.samples) + len(outcome.failures), len(requests))

        async with self._client() as client:
            await _together(work(client, place, request) for place, request in enumerate(requests))
        return outcome

    async def _sample(self, client: httpx.AsyncClient, request: Request, first: int, expected: Expected) -> Sample:
        def checked(content: bytes) -> Sample:
            return to_sample(
                request,
                parse_reply(content),
                weight_version=expected.weight_version,
                version=expected.version,
                vocab_size=expected.vocab_size,
                tokenizer=expected.tokenizer,
            )

        bodies = (generate_body(request) for _ in range(self._settings.attempts))
        try:
            return await self._try(client, bodies, first, checked)
        except ShortContext as error:
            raise UserError(f"the response to prompt {request.prompt.id} was cut at {error}") from None

    async def _try[Result](self, client, bodies, first: int, checked: Callable[[bytes], Result]) -> Result:
        """Send one body after the other, each to the next server, until ``checked`` takes a reply."""
        last = BadReply("it was not sent")
        for attempt, body in enumerate(bodies):
            if attempt:
                await asyncio.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            server = self._next_server(first + attempt)
            try:
                return checked(await self._post(client, server, body))
            except StaleWeights as error:
                server.problem = f"it answered with {error}"
                last = BadReply(f"{server.url}: {server.problem}")
            except BadReply as error:
                last = BadReply(f"{server.url}: {error}")
        raise last

    def _next_server(self, place: int) -> Server:
        usable = [server for server in self.servers if not server.problem]
        if not usable:
            raise _Unavailable("; ".join(f"{url}: {problem}" for url, problem in self.problems.items()))
        return usable[place % len(usable)]

    async def _post(self, client: httpx.AsyncClient, server: Server, body: dict) -> bytes:
        """The content of a reply of status 200; everything else is ``BadReply``, or ``UserError`` where it is 4xx."""
        try:
            reply = await client.post(f"{server.url}/generate", json=body)
        except httpx.TimeoutException:
            await self._abort(client, server, body["rid"], "it hangs")
            raise BadReply(f"no answer within {self._settings.request_seconds:g} seconds") from None
        except httpx.HTTPError as error:
            reason = f"the connection failed ({type(error).__name__})"
            await self._abort(client, server, body["rid"], reason)
            raise BadReply(reason) from None
        if 400 <= reply.status_code < 500:
            raise UserError(f"{server.url} refused a request: {reply.text[:300]}")
        if reply.status_code != 200:
            raise BadReply(f"status {reply.status_code}: {reply.text[:200]}")
        return reply.content

    async def _abort(self, client: httpx.AsyncClient, server: Server, rids: str | list[str], reason: str) -> None:
        """Have the try forgotten whose answer nobody waits for; a server that does not even do that has a problem."""
        try:
            for rid in [rids] if isinstance(rids, str) else rids:
                await client.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=_ABORT_SECONDS)
        except httpx.HTTPError:
            server.problem = reason

    def score_all[Result](
        self, sequences: Sequence[np.ndarray], checked: Callable[[int, GenerateReply], Result], *, top_k: int = 0
    ) -> tuple[dict[int, Result], list[str]]:
        """``checked`` replies by the place of their sequence, over all servers, and the reasons of those that failed.

        Tries are bounded as in ``generate``; ``checked`` raises ``BadReply`` for a reply that it does not take.
        """
        found: dict[int, Result] = {}
        reasons: list[str] = []

        async def work(client: httpx.AsyncClient, room: asyncio.Semaphore, place: int) -> None:
            def one(content: bytes) -> Result:
                return checked(place, _replies(content, 1)[0])

            async with room:
                try:
                    bodies = (score_body([sequences[place]], top_k) for _ in range(self._settings.attempts))
                    found[place] = await self._try(client, bodies, place, one)
                except (BadReply, _Unavailable) as error:
                    reasons.append(str(error))

        async def ask() -> None:
            room = asyncio.Semaphore(self._settings.concurrency * len(self.servers))
            async with self._client() as client:
                await _together(work(client, room, place) for place in range(len(sequences)))

        asyncio.run(ask())
        return found, sorted(set(reasons))

    def score(self, server: Server, sequences: Sequence[np.ndarray]) -> list[GenerateReply]:
        """The parsed replies of ``server`` to a request that scores ``sequences``; ``BadReply`` where it has none."""

        async def ask() -> list[GenerateReply]:
            async with self._client() as client:
                return _replies(await self._post(client, server, score_body(sequences)), len(sequences))

        return asyncio.run(ask())

    def _client(self) -> httpx.AsyncClient:
        connections = self._settings.concurrency * len(self.servers)
        return httpx.AsyncClient(
            timeout=httpx.Timeout(self._settings.request_seconds, connect=30.0, pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,  # a proxy of the environment is not for servers of the run
        )


def _replies(content: bytes, count: int) -> list[GenerateReply]:
    replies = parse_replies(content)
    if len(replies) != count:
        raise BadReply(f"{len(replies)} replies to {count} sequences")
    return replies


async def _together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first ``UserError`` ends the others and is raised."""
    refused: UserError | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            for work in works:
                tasks.create_task(work)
    except* UserError as errors:
        refused = errors.exceptions[0]
    if refused is not None:
        raise refused
