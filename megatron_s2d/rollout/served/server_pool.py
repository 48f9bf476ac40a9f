"""HTTP requests to several servers: bounded attempts with back-off, every reply checked.

A failed attempt is retried on the next server. A server that is gone, or that answers with other weights than the
current ones, gets no further requests: ``ServerPool.problems`` says why, and the owner of the servers repairs them.
``generation.py`` generates responses; this file has the single request, and scores.
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
from megatron_s2d.rollout.served.backend import (
    NEEDS_KEY,
    UNAUTHORIZED,
    InvalidReply,
    ServerCall,
    ServerProtocol,
    ServerReply,
    StaleWeights,
)

_FIRST_PAUSE_SECONDS = 0.25  # before the second attempt; doubled before each further one
_ABORT_SECONDS = 5.0
_CONNECT_SECONDS = 30.0
_OTHER_FILES = 512  # that the process may have open beside its connections
_KEEP_SECONDS = 2.0  # of an idle connection; servers close theirs after 5 s, which must not hit a request


class NoHealthyServer(Exception):
    """No server is left that may get requests."""


class Interrupted(Exception):
    """The session was stopped before the request had a good reply."""


@dataclasses.dataclass(eq=False)
class Server:
    """A server and why it may not get requests; an empty ``problem`` means that it may."""

    url: str
    problem: str = ""


class ServerPool:
    """The servers that hold one model. With a ``router`` requests go through that, and aborts to all servers."""

    def __init__(self, urls: Sequence[str], settings: ServerConfig, protocol: ServerProtocol):
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.router: Server | None = None
        self.settings, self.protocol = settings, protocol
        self.concurrency = _max_connections(settings.max_concurrent_requests * len(urls))  # requests in flight at most

    @property
    def problems(self) -> dict[str, str]:
        """Address -> why it gets no requests."""
        return {server.url: server.problem for server in self._all() if server.problem}

    def mark_failed(self, problems: Mapping[str, str]) -> None:
        """Set the problems of all servers: address -> problem; a server without an entry has none."""
        for server in self._all():
            server.problem = problems.get(server.url, "")

    def next_server(self, index: int) -> Server:
        """Return where request ``index`` goes: healthy servers in turn; ``NoHealthyServer`` if none is left."""
        healthy = [server for server in self.servers if not server.problem]
        if healthy and self.router is not None:
            healthy = [] if self.router.problem else [self.router]
        if not healthy:
            raise NoHealthyServer("; ".join(f"{url}: {problem}" for url, problem in self.problems.items()))
        return healthy[index % len(healthy)]

    def _all(self) -> list[Server]:
        return self.servers if self.router is None else [*self.servers, self.router]

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Open a ``Session`` in the running event loop."""
        # aiohttp's work for a request does not grow with the number of connections, unlike httpx's.
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(self.settings.request_timeout_seconds, sock_connect=_CONNECT_SECONDS),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS),
            trust_env=False,  # a proxy of the environment is not for servers of the run
            headers=self.protocol.headers,
        ) as client:
            yield Session(self, client)

    def score_all[Result](
        self,
        sequences: Sequence[np.ndarray],
        starts: Sequence[int],
        check: Callable[[int, ServerReply], Result],
        *,
        top_k: int = 0,
    ) -> tuple[dict[int, Result], list[str]]:
        """Score over all servers; return index -> result of ``check``, and the reasons of sequences that failed.

        starts: see ``ServerProtocol.score``; a reply is that of the sequence from there on. Attempts are bounded as for
        responses; ``check`` raises ``InvalidReply`` for a reply that it rejects.
        """
        results: dict[int, Result] = {}
        reasons: list[str] = []

        async def score_one(session: Session, semaphore: asyncio.Semaphore, index: int) -> None:
            sequence, start = sequences[index], starts[index]
            async with semaphore:
                try:
                    attempts = range(self.settings.max_attempts)
                    calls = (self.protocol.score([sequence], top_k, [start]) for _ in attempts)
                    results[index] = await session.request(
                        calls, index, lambda content: check(index, self._parse_scores(content, [sequence[start:]])[0])
                    )
                except (InvalidReply, NoHealthyServer) as error:
                    reasons.append(str(error))

        async def score_each() -> None:
            semaphore = asyncio.Semaphore(self.concurrency)
            async with self.session() as session:
                await gather_all(score_one(session, semaphore, index) for index in range(len(sequences)))

        asyncio.run(score_each())
        return results, sorted(set(reasons))

    def score(self, server: Server, sequences: Sequence[np.ndarray]) -> list[ServerReply]:
        """Score ``sequences`` with one request to ``server``; ``InvalidReply`` if there is no good reply."""

        async def score_batch() -> list[ServerReply]:
            async with self.session() as session:
                return self._parse_scores(await session.post(server, self.protocol.score(sequences)), sequences)

        return asyncio.run(score_batch())

    def _parse_scores(self, content: bytes, sequences: Sequence[np.ndarray]) -> list[ServerReply]:
        replies = self.protocol.parse_scores(content, sequences)
        if len(replies) != len(sequences):
            raise InvalidReply(f"{len(replies)} replies to {len(sequences)} sequences")
        return replies


class Session:
    """The requests of one event loop to the servers of a pool."""

    def __init__(self, pool: ServerPool, client: aiohttp.ClientSession):
        self.stopped = asyncio.Event()  # set: no further attempts, and requests in flight are aborted
        self._pool, self._client = pool, client
        self._in_flight: dict[str, Server] = {}  # request id -> server

    async def request[Result](
        self,
        calls: Iterable[ServerCall],
        first: int,
        check: Callable[[bytes], Result],
        is_ended: Callable[[], bool] = lambda: False,
    ) -> Result:
        """Send one call after the other, each to the next server, until ``check`` accepts a reply.

        is_ended: whether the caller has ended this request, as ``stopped`` does for all of them.
        Raises ``InvalidReply`` of the last attempt, ``NoHealthyServer``, ``Interrupted``, and ``UserError`` for a
        request that the servers refuse, which no other attempt would change.
        """
        # A loop rather than tenacity: the wait ends at once when the session is stopped, each attempt goes to another
        # server with a request id of its own, and a stale reply takes its server out of the pool.
        last = InvalidReply("it was not sent")
        for attempt, call in enumerate(calls):
            if attempt:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopped.wait(), _FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            if self.stopped.is_set() or is_ended():
                raise Interrupted
            server = self._pool.next_server(first + attempt)
            try:
                return check(await self.post(server, call))
            except StaleWeights as error:
                server.problem = f"it answered with {error}"
                last = InvalidReply(f"{server.url}: {server.problem}")
            except InvalidReply as error:
                last = InvalidReply(f"{server.url}: {error}")
            except UserError:
                if self.stopped.is_set() or is_ended():  # a request that is aborted before it was queued is refused
                    raise Interrupted from None
                raise
        if self.stopped.is_set() or is_ended():
            raise Interrupted
        raise last

    async def post(self, server: Server, call: ServerCall) -> bytes:
        """Return the content of a reply of status 200; raise ``UserError`` for 4xx and ``InvalidReply`` otherwise."""
        self._in_flight |= dict.fromkeys(call.request_ids, server)
        try:
            async with self._client.post(server.url + call.path, json=call.body) as reply:
                status, content = reply.status, await reply.read()
        except TimeoutError:
            await self._abort(server, call.request_ids, "it hangs")
            raise InvalidReply(f"no answer within {self._pool.settings.request_timeout_seconds:g} seconds") from None
        except aiohttp.ClientError as error:
            reason = f"the connection failed ({type(error).__name__})"
            await self._abort(server, call.request_ids, reason)
            raise InvalidReply(reason) from None
        finally:
            for request_id in call.request_ids:
                del self._in_flight[request_id]
        if status in UNAUTHORIZED:
            raise UserError(f"{server.url} {NEEDS_KEY}")
        if 400 <= status < 500:
            raise UserError(f"{server.url} refused a request: {_decode(content)[:300]}")
        if status != 200:
            raise InvalidReply(f"status {status}: {_decode(content)[:200]}")
        return content

    async def abort_all(self) -> None:
        """Once ``stopped``: abort everything in flight, so that replies come with the tokens so far.

        Runs until it is cancelled: a server does not know a request that has not reached it yet.
        """
        await self.stopped.wait()
        while True:
            for request_id, server in list(self._in_flight.items()):
                await self._abort(server, [request_id], "it hangs")
            await asyncio.sleep(0.1)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort those of ``request_ids`` that are in flight."""
        for request_id in request_ids:
            if request_id in self._in_flight:
                await self._abort(self._in_flight[request_id], [request_id], "it hangs")

    async def _abort(self, server: Server, request_ids: Sequence[str], reason: str) -> None:
        """Abort requests whose replies are no longer needed; a server that fails to do so is marked with a problem."""
        # A router does not forward aborts, and does not say where a request went.
        targets = self._pool.servers if server is self._pool.router else [server]
        timeout = aiohttp.ClientTimeout(_ABORT_SECONDS)
        for target in targets:
            try:
                for call in map(self._pool.protocol.abort, request_ids):
                    async with self._client.post(target.url + call.path, json=call.body, timeout=timeout):
                        pass
            except (aiohttp.ClientError, TimeoutError):
                target.problem = reason


def _max_connections(wanted: int) -> int:
    """Return how many of ``wanted`` connections this process may open, after raising its limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < files:
        soft = files if hard == resource.RLIM_INFINITY else min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < files:
            allowed = max(1, soft - _OTHER_FILES)
            print(
                f"{allowed} instead of {wanted} requests in flight: this process may not open more than {hard} files; "
                "raise its hard limit (ulimit -Hn) or lower rollout.server.max_concurrent_requests",
                flush=True,
            )
            return min(wanted, allowed)
    return wanted


def _decode(content: bytes) -> str:
    return content.decode("utf-8", "replace")


async def gather_all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first ``UserError`` ends the others and is raised."""
    refusal: UserError | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            for coroutine in coroutines:
                tasks.create_task(coroutine)
    except* UserError as errors:
        refusal = errors.exceptions[0]
    if refusal is not None:
        raise refusal
