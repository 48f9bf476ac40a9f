"""The server of a teacher: HTTP on the leader's rank, computation on all ranks, one request after the other.

Requests wait in a bounded queue. Each is a batch of its own, packed into micro-batches, so that a reply is a function
of its request: who else asks changes neither its bits nor its order.

    GET  /info          JSON, ``TeacherInfo``
    GET  /tokenizer     the tokenizer.json of the teacher
    GET  /output/N      block N of the output layer, [rows, h]
    POST /score         ``ScoreRequest`` -> its tensors
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hmac
import queue
import threading
import traceback
from collections.abc import Callable, Iterator

import numpy as np
from aiohttp import web

from megatron_s2d.errors import UserError
from megatron_s2d.teachers.service.info import TeacherInfo
from megatron_s2d.teachers.service.scorer import answer
from megatron_s2d.teachers.service.wire import ScoreRequest, WireError, encode
from megatron_s2d.train.megatron_model import MegatronModel

_KEEP_ALIVE_SECONDS = 20.0  # an idle server's ranks hear from the leader: no collective may wait for hours
_STOP = b"stop"
_BYTES_PER_TOKEN = 16  # of a request without a student's ids, at most


@dataclasses.dataclass(eq=False)
class _Job:
    body: bytes
    request: ScoreRequest
    reply: concurrent.futures.Future[dict[str, np.ndarray]]


class TeacherServer:
    """The leader's side: HTTP in a thread of its own, jobs for ``serve``."""

    def __init__(
        self,
        info: TeacherInfo,
        output_layer: np.ndarray,
        tokenizer_json: str,
        *,
        api_key: str = "",
        max_waiting: int = 1024,
    ):
        """output_layer: [v, h] as ``scorer.to_wire`` gives it. api_key: empty for none."""
        self.info, self._output, self._tokenizer = info, output_layer, tokenizer_json
        self._api_key, self._jobs = api_key, queue.Queue[_Job](max_waiting)
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self.port = 0

    @contextlib.contextmanager
    def listening(self, host: str, port: int) -> Iterator[TeacherServer]:
        """Answer requests within the block. port: 0 for a free one; ``self.port`` is the one that was taken."""
        ready: concurrent.futures.Future[int] = concurrent.futures.Future()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            try:
                runner, taken = self._loop.run_until_complete(self._start(host, port))
            except OSError as error:
                ready.set_exception(UserError(f"cannot listen at {host}:{port} ({error.strerror or error})"))
                return
            ready.set_result(taken)
            self._loop.run_forever()
            self._loop.run_until_complete(runner.cleanup())

        self._thread = threading.Thread(target=run, name="teacher http", daemon=True)
        self._thread.start()
        self.port = ready.result()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)

    def next_job(self, seconds: float) -> _Job | None:
        """Return the next job; None if none came."""
        with contextlib.suppress(queue.Empty):
            return self._jobs.get(timeout=seconds)
        return None

    async def _start(self, host: str, port: int) -> tuple[web.AppRunner, int]:
        limit = self.info.max_request_tokens * (_BYTES_PER_TOKEN + 4 * 256) + 2**20
        app = web.Application(middlewares=[self._authorize], client_max_size=limit)
        app.router.add_get("/info", self._info)
        app.router.add_get("/tokenizer", self._tokenizer_json)
        app.router.add_get("/output/{block}", self._output_block)
        app.router.add_post("/score", self._score)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, host, port)
        await site.start()
        return runner, runner.addresses[0][1]

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if self._api_key and not hmac.compare_digest(given, f"Bearer {self._api_key}".encode()):
            return web.Response(status=401, text="this teacher asks for its API key")
        return await handler(request)

    async def _info(self, request: web.Request) -> web.Response:
        return web.Response(text=self.info.to_json(), content_type="application/json")

    async def _tokenizer_json(self, request: web.Request) -> web.Response:
        return web.Response(text=self._tokenizer, content_type="application/json")

    async def _output_block(self, request: web.Request) -> web.Response:
        text, rows = request.match_info["block"], self.info.output_block_rows
        if not text.isdecimal() or int(text) >= len(self.info.output_digests):
            return web.Response(status=404, text=f"there is no block {text[:20]}")
        block = self._output[int(text) * rows : (int(text) + 1) * rows]
        return web.Response(body=encode({"instance": self.info.instance}, {"rows": block}))

    async def _score(self, request: web.Request) -> web.Response:
        body, info = await request.read(), self.info
        try:
            decoded = ScoreRequest.decode(
                body, vocab_size=info.vocab_size, max_positions=info.max_positions, max_tokens=info.max_request_tokens
            )
        except WireError as error:
            return web.Response(status=400, text=str(error))
        job = _Job(body, decoded, concurrent.futures.Future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return web.Response(status=503, text="too many requests wait")
        try:
            tensors = await asyncio.wrap_future(job.reply)
        except UserError as error:
            return web.Response(status=400, text=str(error))
        except RuntimeError as error:
            return web.Response(status=500, text=str(error))
        meta = {"instance": info.instance, "weights": info.weights}
        return web.Response(body=await asyncio.to_thread(encode, meta, tensors))


def serve(model: MegatronModel, server: TeacherServer | None, stop: Callable[[], bool]) -> None:
    """Compute until ``stop`` (asked on the leader, which has the ``server``); collective over all ranks."""
    group, leader = model.layout.host_replica, model.layout.leader_in_replica
    while True:
        job, message = None, b""
        if server is not None:
            job = server.next_job(0.2 if not stop() else 0.0)
            waited = 0.2
            while job is None and not stop() and waited < _KEEP_ALIVE_SECONDS:
                job = server.next_job(0.2)
                waited += 0.2
            message = _STOP if stop() and job is None else b"" if job is None else job.body
        if group.size > 1:
            sent = np.frombuffer(message, dtype=np.uint8).copy() if server is not None else None
            message = group.broadcast(sent, leader).tobytes()
        if message == _STOP:
            return
        if message:
            _compute(model, message, job)


def _compute(model: MegatronModel, message: bytes, job: _Job | None) -> None:
    spec = model.spec
    request = ScoreRequest.decode(  # the leader has checked it
        message, vocab_size=spec.vocab_size, max_positions=spec.max_position_embeddings, max_tokens=len(message)
    )
    if job is not None and job.reply.cancelled():  # the ranks compute it all the same: they know nothing of clients
        job = None
    try:
        tensors = answer(model, request)
    except UserError as error:  # the same on every rank
        if job is not None and not job.reply.cancelled():
            job.reply.set_exception(error)
        return
    except Exception as error:
        traceback.print_exc()
        if job is not None and not job.reply.cancelled():
            job.reply.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
        if model.layout.host_replica.size > 1:
            raise  # ranks may wait for each other now
        return
    if job is not None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # its client has gone
            job.reply.set_result(tensors)
