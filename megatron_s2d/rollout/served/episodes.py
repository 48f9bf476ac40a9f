"""Episodes whose completions come from servers, on a thread of their own, so that the trainer can work meanwhile.

Each request is retried on the servers of the pool. One that fails nevertheless is parked: when every episode waits for
parked requests, ``wait`` says so, the owner repairs the servers, and ``resume`` sends them again. A weight update parks
all requests: it waits for those in flight, or interrupts them, which then continue with the new weights. So an episode
sees a completion late, but complete, with the versions that sampled it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import heapq
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
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
    first: int  # server that it goes to, so that an episode stays where its keys and values are
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


class EpisodeTask[Result]:
    """Starts at once. Methods without ``async`` are called by the thread that owns the task."""

    def __init__(
        self,
        pool: ServerPool,
        contract: ReplyContract,
        episodes: Sequence[Episode[Result]],
        check: Callable[[Request], None],
    ):
        """contract: see ``resume``. check: raises ``UserError`` for a request that cannot be served."""
        self._pool, self._contract, self._check = pool, contract, check
        self.error: BaseException | None = None  # of an episode; ends all
        self._slots = PrioritySlots(pool.concurrency)
        self._open, self._changed = asyncio.Event(), asyncio.Event()
        self._calls: dict[str, _Call] = {}  # request id -> request that is not answered
        self._reasons: list[str] = []  # of failures since ``resume``
        self._clients = [_Client(self, number) for number in range(len(episodes))]
        self._stack = contextlib.AsyncExitStack()
        self._session: Session | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="episodes", daemon=True)
        self._thread.start()
        self._on_loop(self._start(episodes))

    def wait(self) -> list[str]:
        """Wait until all episodes have ended, or can not go on: then return reasons why. An error ends the wait."""
        return self._on_loop(self._until_ended_or_stalled())

    def resume(self, contract: ReplyContract) -> None:
        """Send parked requests (again), to servers with the weights of ``contract``."""
        self._on_loop(self._resume(contract))

    def pause(self, *, interrupt: bool) -> None:
        """Return when no request is in flight, until ``resume``. interrupt: end those that are, to be continued."""
        self._on_loop(self._pause(interrupt))

    def results(self) -> list[Result]:
        """Return the results of the episodes, which must have ended."""
        return [client.task.result() for client in self._clients]

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

    async def _start(self, episodes: Sequence[Episode[Result]]) -> None:
        self._session = await self._stack.enter_async_context(self._pool.session())
        self._open.set()
        for client, episode in zip(self._clients, episodes, strict=True):
            client.task = asyncio.create_task(_call_episode(episode, client))
            client.task.add_done_callback(lambda _: self._changed.set())

    async def _until_ended_or_stalled(self) -> list[str]:
        while True:
            self._changed.clear()
            tasks = [client.task for client in self._clients]
            self.error = next(filter(None, map(failure_of, tasks)), None)
            if self.error is not None or all(task.done() for task in tasks):
                return []
            all_wait = all(client.num_waiting or client.task.done() for client in self._clients)
            if self._calls and all_wait and all(call.is_parked for call in self._calls.values()):
                return sorted(set(self._reasons))
            await self._changed.wait()

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
        while any(call.is_in_flight for call in self._calls.values()):
            self._changed.clear()
            await self._changed.wait()
        aborting.cancel()
        session.stopped.clear()

    async def _close(self) -> None:
        tasks = [client.task for client in self._clients]
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
                    self._changed.set()

    async def _attempt(self, call: _Call) -> Sample:
        session, contract, protocol, request = self._session, self._contract, self._pool.protocol, call.request

        def check(content: bytes) -> Sample:
            reply = protocol.parse_reply(content)
            if reply.finish_reason == "abort" and call.is_aborted:
                call.sample = to_aborted(request, reply, contract, call.partial)
                raise Interrupted
            if reply.finish_reason == "abort" and session.stopped.is_set():
                call.partial = to_partial(request, reply, contract, call.partial) or call.partial
                raise Interrupted
            return to_sample(request, reply, contract, call.partial)

        def calls() -> Iterator[ServerCall]:
            for _ in range(self._pool.settings.max_attempts):
                attempt = protocol.generate(request, call.partial)
                call.request_ids = attempt.request_ids
                yield attempt

        try:
            return await session.request(calls(), call.first, check, lambda: call.is_aborted)
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
        call = self._calls[request.id] = _Call(request, client.number, priority)
        client.num_waiting += 1
        call.task = asyncio.create_task(self._until_answered(call))
        try:
            return completion_of(await asyncio.shield(call.task))
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

    def __init__(self, episodes: EpisodeTask, number: int):
        self._episodes, self.number = episodes, number
        self.num_waiting = 0  # requests that are not answered
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
