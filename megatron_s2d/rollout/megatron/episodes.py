"""Episodes of a model replica on the event loop of its producer, which runs while the model does not.

The producer (the replica's first rank) resumes the episodes whose completions are ready and lets all of them run until
each waits for the model or has ended. Their requests come in the order of the episodes. So which requests meet in a
batch, and in which rows, depends on the episodes, not on how long their tools take, and a repeated run gives the same
samples. It then tells the other ranks of the replica what was asked for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_s2d.errors import UserError
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.sampling_client import Completion, Episode, completion_of, failure_of, token_request


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the episodes have asked for since the last time; the same on all ranks of a replica."""

    requests: Sequence[tuple[int, Request]] = ()  # with their priorities
    aborted: Sequence[str] = ()  # ids of requests, of earlier ones too
    has_ended: bool = False  # all episodes have, or one has failed
    error: str = ""  # of the episode that failed

    def encode(self) -> np.ndarray:
        """Return bytes, uint8 [n]."""
        requests = [
            [priority, request.id, request.prompt.token_ids.tolist(), request.seed, dataclasses.astuple(request.params)]
            for priority, request in self.requests
        ]
        text = json.dumps([requests, list(self.aborted), self.has_ended, self.error])
        return np.frombuffer(text.encode(), dtype=np.uint8).copy()

    @classmethod
    def decode(cls, data: np.ndarray) -> Asked:
        """Invert ``encode``."""
        requests, aborted, has_ended, error = json.loads(data.tobytes())
        return cls(
            [
                (priority, token_request(name, np.array(token_ids, dtype=np.int64), _params(params), seed))
                for priority, name, token_ids, seed, params in requests
            ],
            aborted,
            has_ended,
            error,
        )


def _params(values: Sequence[Any]) -> SamplingParams:
    return SamplingParams(*(tuple(value) if isinstance(value, list) else value for value in values))


class EpisodeLoop[Result]:
    """Runs episodes in turn with the model. Ranks without episodes (None) follow those that have them."""

    def __init__(
        self,
        episodes: Sequence[Episode[Result]] | None,
        replica: HostGroup,
        version: Callable[[], int],
        check: Callable[[Request], None],
    ):
        """replica: its ranks, the producer first. check: raises ``UserError`` for a request that cannot be served."""
        self.version, self.check = version, check
        self._replica = replica
        self._changed = asyncio.Event()
        self._waiting: dict[str, _Waiting] = {}  # request id -> its call
        self._new: list[tuple[_Client, int, Request]] = []  # in the order in which tools ended
        self._aborted: list[str] = []
        self._clients: list[_Client] = []
        self._tasks: list[asyncio.Task[Result]] = []
        self.failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        if episodes is not None:
            self._loop = asyncio.new_event_loop()
            self._loop.run_until_complete(self._start(episodes))

    async def _start(self, episodes: Sequence[Episode[Result]]) -> None:
        for episode in episodes:
            client = _Client(self, len(self._clients))
            self._clients.append(client)
            task = asyncio.create_task(_call(episode, client))
            task.add_done_callback(lambda _: self._changed.set())
            client.task = task
            self._tasks.append(task)

    def exchange(self) -> Asked:
        """Resume the episodes until each of them waits or has ended; return what they ask for. Collective."""
        asked = Asked()
        if self._loop is not None:
            self._loop.run_until_complete(self._until_all_wait())
            self.failure = next(filter(None, map(failure_of, self._tasks)), None)
            error = "" if self.failure is None else str(self.failure) or type(self.failure).__name__
            has_ended = self.failure is not None or all(task.done() for task in self._tasks)
            new = sorted(self._new, key=lambda item: (item[0].number, item[2].id))
            asked = Asked([(priority, request) for _, priority, request in new], self._aborted, has_ended, error)
            self._new, self._aborted = [], []
        if self._replica.size > 1:
            asked = Asked.decode(self._replica.broadcast(None if self._loop is None else asked.encode(), 0))
        return asked

    async def _until_all_wait(self) -> None:
        await asyncio.sleep(0)  # time limits that have passed
        while any(client.is_working for client in self._clients):
            self._changed.clear()
            if any(client.is_working for client in self._clients):
                await self._changed.wait()
            await asyncio.sleep(0)  # calls of an episode that come together

    def deliver(self, samples: Sequence[Sample]) -> None:
        """Hand completions to the calls that wait for them; nothing to do on ranks without episodes."""
        if self._loop is None:
            return
        for sample in samples:
            waiting = self._waiting.pop(sample.id, None)
            if waiting is not None:
                waiting.client.num_waiting -= 1
                if not waiting.future.done():
                    waiting.future.set_result(completion_of(sample))

    def results(self) -> list[Result]:
        """Return the episodes' results, or raise the exception of one that failed."""
        if self.failure is not None:
            raise self.failure
        return [task.result() for task in self._tasks]

    def close(self) -> None:
        """Cancel episodes that still run."""
        if self._loop is None:
            return
        unfinished = [task for task in self._tasks if not task.done()]
        for task in unfinished:
            task.cancel()
        if unfinished:
            self._loop.run_until_complete(asyncio.wait(unfinished))
        for task in self._tasks:
            if not task.cancelled():
                task.exception()  # of several that failed, one is raised
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    # ------------------------------------------------------------------ called by the clients

    def ask(self, client: _Client, priority: int, request: Request) -> asyncio.Future[Completion]:
        """Queue a request; the model takes it at the next ``exchange``."""
        if request.id in self._waiting:
            raise UserError(f"two requests in flight have the id {request.id}: request ids must be unique")
        self.check(request)
        future = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = _Waiting(client, future)
        self._new.append((client, priority, request))
        client.num_waiting += 1
        self._changed.set()
        return future

    def abort(self, request_id: str) -> None:
        """End a request that is in flight."""
        if request_id in self._waiting:
            self._aborted.append(request_id)

    def cancel(self, request_id: str) -> None:
        """End a request whose caller does not wait any more."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting.client.num_waiting -= 1
            self._aborted.append(request_id)


@dataclasses.dataclass(frozen=True, eq=False)
class _Waiting:
    client: _Client
    future: asyncio.Future[Completion]


class _Client:
    """The ``SamplingClient`` of one episode."""

    def __init__(self, loop: EpisodeLoop, number: int):
        self._loop, self.number = loop, number  # number: of the episode
        self.num_waiting = 0  # requests that were not answered yet
        self.task: asyncio.Task | None = None

    @property
    def is_working(self) -> bool:
        """Whether the episode has something to do before it needs the model again."""
        return self.num_waiting == 0 and not self.task.done()

    @property
    def version(self) -> int:
        return self._loop.version()

    async def sample(
        self, token_ids: np.ndarray, params: SamplingParams, *, seed: int, request_id: str, priority: int = 0
    ) -> Completion:
        """See ``SamplingClient``."""
        future = self._loop.ask(self, priority, token_request(request_id, np.asarray(token_ids), params, seed))
        try:
            return await future
        except asyncio.CancelledError:
            self._loop.cancel(request_id)
            raise

    def abort(self, request_id: str) -> None:
        """See ``SamplingClient``."""
        self._loop.abort(request_id)


async def _call[Result](episode: Episode[Result], client: _Client) -> Result:
    return await episode(client)
