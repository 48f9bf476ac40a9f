"""Episodes whose completions come from servers, on a thread of their own, so that the trainer can work meanwhile.

Each request is retried on the servers of the pool. One that fails nevertheless is parked: when every episode waits for
parked requests, ``wait`` says so, the owner repairs the servers, and ``resume`` sends them again. A weight update parks
all requests: it waits for those in flight, or interrupts them, which then continue with the new weights. So an episode
sees a completion late, but complete, with the versions that sampled it. Which episodes there are, and when they are
added, taken or given up, is the caller's decision (``rollout/buffer.py``).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import heapq
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.sampling_client import Completion, Episode, completion_of, failure_of, token_request
from megatron_s2d.rollout.served.backend import ContextLengthExceeded, InvalidReply, PartialRollout, ServerCall
from megatron_s2d.rollout.served.replies import ReplyContract, to_aborted, to_partial, to_sample
from megatron_s2d.rollout.served.server_pool import Interrupted, NoHealthyServer, ServerPool, Session

_ABORT_PAUSE_SECONDS = 0.1  # a server does not know a request that has not reached it yet


class PrioritySlots:
    """A semaphore that admits the waiting task of the smallest priority first, of equal ones the first that came."""

    def __init__(self, count: int):
        self._num_free = count
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def slot(self, priority: int) -> AsyncIterator[None]:
        """Hold a slot within the block."""
        if self._num_free:
            self._num_free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (priority, next(self._numbers), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._release()
                raise
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1


@dataclasses.dataclass(eq=False)
class _Call:
    """A request of an episode until it is answered."""

    request: Request
    client: _Client
    priority: int
    partial: PartialRollout | None = None
    request_ids: tuple[str, ...] = ()  # of the attempt in flight
    is_in_flight: bool = False
    is_aborted: bool = False
    is_parked: bool = False
    sample: Sample | None = None  # of an aborted request
    task: asyncio.Task[Sample] | None = None
    aborting: asyncio.Task[None] | None = None
    unparked: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class _Activity:
    """Counts the requests in flight, and the time without one."""

    def __init__(self) -> None:
        self.num_in_flight = 0
        self._idle_since, self._idle_seconds = time.monotonic(), 0.0

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count one request within the block."""
        if not self.num_in_flight:
            self._idle_seconds += time.monotonic() - self._idle_since
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._idle_since = time.monotonic()

    def take_idle_seconds(self) -> float:
        """Return the time without a request since the last call."""
        now = time.monotonic()
        if not self.num_in_flight:
            self._idle_seconds += now - self._idle_since
            self._idle_since = now
        seconds, self._idle_seconds = self._idle_seconds, 0.0
        return seconds


class EpisodeTask:
    """Episodes by name, added and taken while others run. Methods without ``async`` are of the thread that owns it."""

    def __init__(self, pool: ServerPool, contract: ReplyContract, check: Callable[[Request], None]):
        """contract: see ``resume``. check: raises ``UserError`` for a request that cannot be served."""
        self._pool, self._contract, self._check = pool, contract, check
        self.error: BaseException | None = None  # of an episode; ends all
        self._slots = PrioritySlots(pool.concurrency)
        self._open, self._changed = asyncio.Event(), asyncio.Event()
        self._calls: dict[str, _Call] = {}  # request id -> request that is not answered
        self._reasons: list[str] = []  # of failures since ``resume``
        self._clients: dict[str, _Client] = {}
        self._num_added = 0
        self._activity = _Activity()
        self._num_discarded_tokens = 0
        self._stack = contextlib.AsyncExitStack()
        self._session: Session | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="episodes", daemon=True)
        self._thread.start()
        self._on_loop(self._open_session())

    def add(self, episodes: Mapping[str, Episode[Any]], priority: int = 0) -> None:
        """Start ``episodes``; requests of smaller ``priority`` go first, whatever episode they are of."""
        self._on_loop(self._add(episodes, priority))

    def wait(self, is_enough: Callable[[Set[str]], bool]) -> list[str]:
        """Wait until ``is_enough`` of the names that have ended, or none can go on: then return reasons why.

        An error ends the wait.
        """
        return self._on_loop(self._until_enough_or_stalled(is_enough))

    def take(self) -> dict[str, Any]:
        """Return the results of the episodes that have ended, and forget these."""
        return self._on_loop(self._take())

    def cancel(self, names: Sequence[str]) -> None:
        """End episodes; their tokens so far are discarded."""
        self._on_loop(self._cancel(names))

    def resume(self, contract: ReplyContract) -> None:
        """Send parked requests (again), to servers with the weights of ``contract``."""
        self._on_loop(self._resume(contract))

    def pause(self, *, interrupt: bool) -> None:
        """Return when no request is in flight, until ``resume``. interrupt: end those that are, to be continued."""
        self._on_loop(self._pause(interrupt))

    def take_measurements(self) -> tuple[float, int]:
        """Return (seconds without a request in flight, discarded tokens) since the last time."""
        return self._on_loop(self._take_measurements())

    def close(self) -> None:
        """End episodes that still run, and the thread."""
        self._on_loop(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _on_loop[Value](self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        future: concurrent.futures.Future[Value] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result()

    # ------------------------------------------------------------------ on the event loop

    async def _open_session(self) -> None:
        self._session = await self._stack.enter_async_context(self._pool.session())
        self._open.set()

    async def _add(self, episodes: Mapping[str, Episode[Any]], priority: int) -> None:
        for name, episode in episodes.items():
            if name in self._clients:
                raise ValueError(f"an episode {name} runs")
            client = self._clients[name] = _Client(self, self._num_added, priority)
            self._num_added += 1
            client.task = asyncio.create_task(_call_episode(episode, client))
            client.task.add_done_callback(lambda _: self._changed.set())

    async def _until_enough_or_stalled(self, is_enough: Callable[[Set[str]], bool]) -> list[str]:
        while True:
            self._changed.clear()
            clients = self._clients.values()
            self.error = next(filter(None, (failure_of(client.task) for client in clients)), None)
            if self.error is not None or is_enough({n for n, client in self._clients.items() if client.task.done()}):
                return []
            # A call that is parked waits for servers; whoever has none may still ask for something.
            all_wait = all(client.num_waiting or client.task.done() for client in clients)
            if self._calls and all_wait and all(call.is_parked for call in self._calls.values()):
                return sorted(set(self._reasons))
            await self._changed.wait()

    async def _take(self) -> dict[str, Any]:
        ended = {name: client.task.result() for name, client in self._clients.items() if client.task.done()}
        for name in ended:
            del self._clients[name]
        return ended

    async def _cancel(self, names: Sequence[str]) -> None:
        clients = [self._clients.pop(name) for name in names if name in self._clients]
        for call in self._calls.values():
            if call.client in clients and call.partial is not None:
                self._num_discarded_tokens += len(call.partial.token_ids)
        for client in clients:
            self._num_discarded_tokens += client.num_tokens
            client.task.cancel()
        await asyncio.gather(*(client.task for client in clients), return_exceptions=True)

    async def _take_measurements(self) -> tuple[float, int]:
        num_discarded, self._num_discarded_tokens = self._num_discarded_tokens, 0
        return self._activity.take_idle_seconds(), num_discarded

    async def _resume(self, contract: ReplyContract) -> None:
        self._contract, self._reasons = contract, []
        for call in self._calls.values():
            call.is_parked = False
            call.unparked.set()
        self._open.set()
        self._changed.set()

    async def _pause(self, interrupt: bool) -> None:
        self._open.clear()
        session = self._session
        if interrupt:
            session.stopped.set()
        aborting = asyncio.create_task(session.abort_all())
        while self._activity.num_in_flight:
            self._changed.clear()
            await self._changed.wait()
        aborting.cancel()
        session.stopped.clear()

    async def _close(self) -> None:
        tasks = [client.task for client in self._clients.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()

    async def _until_answered(self, call: _Call) -> Sample:
        while True:
            if call.is_parked:
                await call.unparked.wait()
            await self._open.wait()
            async with self._slots.slot(call.priority):
                if not self._open.is_set():
                    continue
                call.is_in_flight = True
                try:
                    with self._activity.request():
                        return await self._attempt(call)
                except (InvalidReply, NoHealthyServer) as error:
                    self._reasons.append(str(error))
                    call.is_parked = True
                    call.unparked.clear()
                except Interrupted:
                    if call.is_aborted:
                        return call.sample or to_aborted(call.request, None, self._contract, call.partial)
                finally:
                    call.is_in_flight, call.request_ids = False, ()
                    if call.is_parked or not self._activity.num_in_flight:
                        self._changed.set()

    async def _attempt(self, call: _Call) -> Sample:
        session, contract, protocol, request = self._session, self._contract, self._pool.protocol, call.request

        def check(content: bytes) -> Sample:
            reply = protocol.parse_reply(content)
            if reply.finish_reason == "abort" and call.is_aborted:
                call.sample = to_aborted(request, reply, contract, call.partial)
                raise Interrupted
            if reply.finish_reason == "abort" and session.stopped.is_set():
                longer = to_partial(request, reply, contract, call.partial)
                if longer is None:
                    self._num_discarded_tokens += len(reply.output_ids)
                else:
                    call.partial = longer
                raise Interrupted
            return to_sample(request, reply, contract, call.partial)

        def calls() -> Iterator[ServerCall]:
            for _ in range(self._pool.settings.max_attempts):
                attempt = protocol.generate(request, call.partial)
                call.request_ids = attempt.request_ids
                yield attempt

        try:
            return await session.request(calls(), call.client.number, check, lambda: call.is_aborted)
        except ContextLengthExceeded as error:
            raise UserError(f"the completion of request {request.id} was cut at {error}") from None

    # ------------------------------------------------------------------ called by the clients

    @property
    def version(self) -> int:
        """Of the weights that the servers hold."""
        return self._contract.version

    async def sample(self, client: _Client, request: Request, priority: int) -> Completion:
        """See ``SamplingClient``."""
        if request.id in self._calls:
            raise UserError(f"two requests in flight have the id {request.id}: request ids must be unique")
        self._check(request)
        call = self._calls[request.id] = _Call(request, client, client.priority + priority)
        client.num_waiting += 1
        call.task = asyncio.create_task(self._until_answered(call))
        try:
            completion = completion_of(await asyncio.shield(call.task))
            client.num_tokens += len(completion.token_ids)
            return completion
        except asyncio.CancelledError:
            if call.is_aborted and not asyncio.current_task().cancelling():
                return completion_of(to_aborted(request, None, self._contract, call.partial))
            call.is_aborted = True
            await self._session.abort(call.request_ids)
            call.task.cancel()
            raise
        finally:
            client.num_waiting -= 1
            del self._calls[request.id]
            if self._reasons:  # all that are left may be parked
                self._changed.set()

    def abort(self, request_id: str) -> None:
        """See ``SamplingClient``."""
        call = self._calls.get(request_id)
        if call is None or call.is_aborted:
            return
        call.is_aborted = True
        if call.is_in_flight:
            call.aborting = asyncio.create_task(self._abort_until_answered(call))
        else:
            call.task.cancel()

    async def _abort_until_answered(self, call: _Call) -> None:
        while call.is_in_flight:
            await self._session.abort(call.request_ids)
            await asyncio.sleep(_ABORT_PAUSE_SECONDS)


class _Client:
    """The ``SamplingClient`` of one episode."""

    def __init__(self, episodes: EpisodeTask, number: int, priority: int):
        """number: of the server that its requests go to, so that they stay where their keys and values are."""
        self._episodes, self.number, self.priority = episodes, number, priority
        self.num_waiting = 0  # requests that are not answered
        self.num_tokens = 0  # of its completions
        self.task: asyncio.Task | None = None

    @property
    def version(self) -> int:
        return self._episodes.version

    async def sample(
        self, token_ids: np.ndarray, params: SamplingParams, *, seed: int, request_id: str, priority: int = 0
    ) -> Completion:
        """See ``SamplingClient``."""
        request = token_request(request_id, np.asarray(token_ids, dtype=np.int64), params, seed)
        return await self._episodes.sample(self, request, priority)

    def abort(self, request_id: str) -> None:
        """See ``SamplingClient``."""
        self._episodes.abort(request_id)


async def _call_episode[Result](episode: Episode[Result], client: _Client) -> Result:
    return await episode(client)
