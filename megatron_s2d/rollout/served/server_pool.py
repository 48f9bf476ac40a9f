"""Requests to several servers at once: bounded tries with back-off, every reply checked.

A try that fails goes to the next server. A server that is gone, or that answers with other weights than the current
ones, gets nothing more: ``ServerPool.problems`` says why, and whoever owns the servers mends them. Responses are generated in
``generation.py``; here are the single request and scores.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import resource
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np

from megatron_s2d.config.training import ServerConfig
from megatron_s2d.errors import UserError
from megatron_s2d.rollout.sglang.protocol import (
    GenerateReply,
    InvalidReply,
    StaleWeights,
    parse_replies,
    score_body,
)

_FIRST_PAUSE_SECONDS = 0.25  # before the second try; doubled before each further one
_ABORT_SECONDS = 5.0
_CONNECT_SECONDS = 30.0
_OTHER_FILES = 512  # that the process may have open beside its connections
_KEEP_SECONDS = 2.0  # an idle connection; servers close theirs after 5 s, which must not meet a request


class NoHealthyServer(Exception):
    """No server is left that may be asked."""


class Interrupted(Exception):
    """The session was stopped before the request had a good reply."""


@dataclasses.dataclass(eq=False)
class Server:
    """A server and why it may not be asked; an empty ``problem`` means that it may."""

    url: str
    problem: str = ""


class ServerPool:
    """The servers that hold one model. With a ``router`` requests go through that, and aborts to all servers."""

    def __init__(self, urls: Sequence[str], settings: ServerConfig):
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.router: Server | None = None
        self.settings = settings
        self.concurrency = _connections(settings.max_concurrent_requests * len(urls))  # requests in flight at most

    @property
    def problems(self) -> dict[str, str]:
        """Address -> why it gets no requests."""
        found = self.servers if self.router is None else [*self.servers, self.router]
        return {server.url: server.problem for server in found if server.problem}

    def mark_failed(self, problems: Mapping[str, str]) -> None:
        """Take over what is known of the servers elsewhere: those without a problem there have none."""
        for server in self.servers if self.router is None else [*self.servers, self.router]:
            server.problem = problems.get(server.url, "")

    def next_server(self, place: int) -> Server:
        """Where a request goes: servers without a problem in turn; ``NoHealthyServer`` where there is none."""
        usable = [server for server in self.servers if not server.problem]
        if usable and self.router is not None:
            usable = [] if self.router.problem else [self.router]
        if not usable:
            raise NoHealthyServer("; ".join(f"{url}: {problem}" for url, problem in self.problems.items()))
        return usable[place % len(usable)]

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A ``Session`` in the running event loop."""
        # aiohttp's work for a request does not grow with the number of connections, unlike httpx's.
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(self.settings.request_timeout_seconds, sock_connect=_CONNECT_SECONDS),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS),
            trust_env=False,  # a proxy of the environment is not for servers of the run
        ) as client:
            yield Session(self, client)

    def score_all[Result](
        self, sequences: Sequence[np.ndarray], checked: Callable[[int, GenerateReply], Result], *, top_k: int = 0
    ) -> tuple[dict[int, Result], list[str]]:
        """``checked`` replies by the place of their sequence, over all servers, and the reasons of those that failed.

        Tries are bounded as for responses; ``checked`` raises ``InvalidReply`` for a reply that it does not take.
        """
        found: dict[int, Result] = {}
        reasons: list[str] = []

        async def work(session: Session, room: asyncio.Semaphore, place: int) -> None:
            def one(content: bytes) -> Result:
                return checked(place, _replies(content, 1)[0])

            async with room:
                try:
                    bodies = (score_body([sequences[place]], top_k) for _ in range(self.settings.max_attempts))
                    found[place] = await session.request(bodies, place, one)
                except (InvalidReply, NoHealthyServer) as error:
                    reasons.append(str(error))

        async def ask() -> None:
            room = asyncio.Semaphore(self.concurrency)
            async with self.session() as session:
                await gather_all(work(session, room, place) for place in range(len(sequences)))

        asyncio.run(ask())
        return found, sorted(set(reasons))

    def score(self, server: Server, sequences: Sequence[np.ndarray]) -> list[GenerateReply]:
        """The parsed replies of ``server`` to a request that scores ``sequences``; ``InvalidReply`` where it has none."""

        async def ask() -> list[GenerateReply]:
            async with self.session() as session:
                return _replies(await session.post(server, score_body(sequences)), len(sequences))

        return asyncio.run(ask())


class Session:
    """The requests of one event loop to the servers of a pool."""

    def __init__(self, pool: ServerPool, client: aiohttp.ClientSession):
        self.stopped = asyncio.Event()  # set: no further tries, and what is in flight is given up
        self._pool, self._client = pool, client
        self._in_flight: dict[str, Server] = {}

    async def request[Result](
        self, bodies: Iterable[dict[str, Any]], first: int, checked: Callable[[bytes], Result]
    ) -> Result:
        """Send one body after the other, each to the next server, until ``checked`` takes a reply.

        Raises ``InvalidReply`` of the last try, ``NoHealthyServer``, ``Interrupted``, and ``UserError`` for a request that the
        servers refuse, which no other try would change.
        """
        last = InvalidReply("it was not sent")
        for attempt, body in enumerate(bodies):
            if attempt:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopped.wait(), _FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            if self.stopped.is_set():
                raise Interrupted
            server = self._pool.next_server(first + attempt)
            try:
                return checked(await self.post(server, body))
            except StaleWeights as error:
                server.problem = f"it answered with {error}"
                last = InvalidReply(f"{server.url}: {server.problem}")
            except InvalidReply as error:
                last = InvalidReply(f"{server.url}: {error}")
            except UserError:
                if self.stopped.is_set():  # a request that is given up before it was queued is refused
                    raise Interrupted from None
                raise
        if self.stopped.is_set():
            raise Interrupted
        raise last

    async def post(self, server: Server, body: dict[str, Any]) -> bytes:
        """The content of a reply of status 200; everything else is ``InvalidReply``, or ``UserError`` where it is 4xx."""
        rids = [body["rid"]] if isinstance(body["rid"], str) else body["rid"]
        self._in_flight |= dict.fromkeys(rids, server)
        try:
            async with self._client.post(f"{server.url}/generate", json=body) as reply:
                status, content = reply.status, await reply.read()
        except TimeoutError:
            await self._abort(server, rids, "it hangs")
            raise InvalidReply(f"no answer within {self._pool.settings.request_timeout_seconds:g} seconds") from None
        except aiohttp.ClientError as error:
            reason = f"the connection failed ({type(error).__name__})"
            await self._abort(server, rids, reason)
            raise InvalidReply(reason) from None
        finally:
            for rid in rids:
                del self._in_flight[rid]
        if 400 <= status < 500:
            raise UserError(f"{server.url} refused a request: {_text(content)[:300]}")
        if status != 200:
            raise InvalidReply(f"status {status}: {_text(content)[:200]}")
        return content

    async def abort_all(self) -> None:
        """Once ``stopped``: have everything in flight end, whose replies then come with the tokens so far.

        Runs until it is cancelled: a request that has not reached its server yet is not known there.
        """
        await self.stopped.wait()
        while True:
            for rid, server in list(self._in_flight.items()):
                await self._abort(server, [rid], "it hangs")
            await asyncio.sleep(0.1)

    async def _abort(self, server: Server, rids: Sequence[str], reason: str) -> None:
        """Have tries forgotten whose answers nobody waits for; a server that does not even do that has a problem."""
        # A router passes no aborts on, and does not say where a request went.
        holders = self._pool.servers if server is self._pool.router else [server]
        timeout = aiohttp.ClientTimeout(_ABORT_SECONDS)
        for holder in holders:
            try:
                for rid in rids:
                    async with self._client.post(f"{holder.url}/abort_request", json={"rid": rid}, timeout=timeout):
                        pass
            except (aiohttp.ClientError, TimeoutError):
                holder.problem = reason


def _connections(wanted: int) -> int:
    """How many of ``wanted`` connections this process may have, after raising its limit of open files if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < files:
        soft = files if hard == resource.RLIM_INFINITY else min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < files:
            fitting = max(1, soft - _OTHER_FILES)
            print(
                f"{fitting} instead of {wanted} requests in flight: this process may not open more than {hard} files; "
                "raise its hard limit (ulimit -Hn) or lower rollout.server.max_concurrent_requests",
                flush=True,
            )
            return min(wanted, fitting)
    return wanted


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _replies(content: bytes, count: int) -> list[GenerateReply]:
    replies = parse_replies(content)
    if len(replies) != count:
        raise InvalidReply(f"{len(replies)} replies to {count} sequences")
    return replies


async def gather_all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
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
