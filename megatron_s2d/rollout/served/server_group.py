"""The servers that hold one model: started or attached to, given the weights of the trainer, and tested.

Every call is collective over all ranks of the job; rank 0 owns the servers. After a push each server must report the
new version and give the trainer's own log-probabilities on fixed probe sequences; one that does not gets no requests
until a later push succeeds. Servers of this run that are gone are started anew. Left out: requests (``engine.py``).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.training import RolloutConfig
from megatron_s2d.errors import UserError
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.rollout.served import weight_checks as probes
from megatron_s2d.rollout.served.server_pool import Server, ServerPool
from megatron_s2d.rollout.sglang.admin import IDLE_SECONDS, ServerControl, WeightUpdateFailed, finish
from megatron_s2d.rollout.sglang.checks import ServerChecks, ServerRequirements
from megatron_s2d.rollout.sglang.protocol import Decoder, InvalidReply
from megatron_s2d.rollout.sglang.server import Router, ServerProcess, is_healthy
from megatron_s2d.rollout.sglang.weight_sync import (
    BroadcastWeightSync,
    Bucket,
    DiskWeightSync,
    TensorWeightSync,
    WeightSync,
    refuse_remote,
)

Score = Callable[[Sequence[Sample]], Sequence[np.ndarray]]
_HEALTH_CHECKS = 3  # of a server in trouble, before it counts as one that hangs
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.5}


@dataclasses.dataclass(frozen=True)
class WeightUpdate:
    """What a push measured."""

    seconds: float
    num_bytes: int  # of the weights, once
    max_log_prob_diff: float  # largest difference of a probe's log-probability, over the servers


class ServerGroup:
    """See the module. ``score`` gives the trainer's log-probabilities of samples at temperature 1; collective."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        spec: ModelSpec,
        layout: Layout,
        score: Score,
        settings: RolloutConfig,
        directory: Path,
        *,
        urls: Sequence[str] = (),
        needs: ServerRequirements = ServerRequirements(),
        tokenizer: Decoder | None = None,
        on_device: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """Start servers with the current weights of ``chunks``, or attach to ``urls``; push the weights to them.

        Then each server shows that it can do what the stage ``needs``, at its temperature and length.

        ``directory`` is for weights and logs; every server must see it under the same path where sync is disk.
        ``tokenizer`` is needed for stop strings. Weights are where they compute inside ``on_device()``. Raises
        ``UserError`` on every rank where one rank cannot go on.
        """
        self.version = 0
        self.directory = directory
        self.spec, self.layout, self.rollout, self.tokenizer = spec, layout, settings, tokenizer
        self.settings = settings.sglang
        self._chunks, self._score, self._on_device = chunks, score, on_device
        self._max_tokens = settings.max_batch_tokens
        self._dtype = next(chunks[0].parameters()).dtype
        self._is_first = dist.get_rank() == 0
        self._tag = broadcast_from_rank0(
            lambda: uuid.uuid4().hex[:12]
        )  # an attached server may hold versions of another run
        self._processes: list[ServerProcess] = []
        self._router: Router | None = None
        self._disk = DiskWeightSync(directory / "weights", spec, tokenizer)
        self._sender: WeightSync = {
            "disk": self._disk,
            "distributed": BroadcastWeightSync(),
            "tensor": TensorWeightSync(),
        }[self.settings.weight_sync]
        self.last_push = WeightUpdate(0.0, 0, 0.0)  # what it measured
        self._resting: frozenset[str] = frozenset()  # servers that have given their memory back
        self._checks = ServerChecks(
            spec,
            needs,
            settings.server,
            dtype=str(self._dtype).removeprefix("torch."),
            tokenizer=tokenizer,
            attached=bool(urls),
        )
        if urls and self.settings.weight_sync == "tensor":
            refuse_remote(urls)
        self.pool = ServerPool(urls or self._start_servers(), settings.server)
        try:
            if self.settings.router:
                self.pool.router = Server(broadcast_from_rank0(self._start_router))
            self._update(self.pool.servers)
            with on_device():
                self._checks.dry_run(self.pool.servers, self.weight_version, score, self._tolerance)
        except UserError:
            self.close()
            raise

    @property
    def weight_version(self) -> str:
        """What servers call the current weights."""
        return f"{self._tag}-{self.version}"

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Bring the weights of ``chunks`` to all servers, which are idle; ``UserError`` where none holds them then."""
        self._chunks, self.version = chunks, version
        self._update(self.pool.servers)

    def recover(self) -> None:
        """Give the current weights to the servers that had a problem.

        Behind a router nobody knows which server a bad reply came from, so all of them are looked at.
        """
        router = self.pool.router
        if router is not None and router.problem:
            self._update(self.pool.servers)
        else:
            self._update([server for server in self.pool.servers if server.problem])

    def metrics(self) -> dict[str, float]:
        """``weight_sync/gb_per_s`` and ``weight_sync/max_log_prob_diff`` (nats) of the last push."""
        last = self.last_push
        return {
            "weight_sync/gb_per_s": last.num_bytes / 1e9 / max(last.seconds, 1e-9),
            "weight_sync/max_log_prob_diff": last.max_log_prob_diff,
        }

    def sleep(self) -> None:
        """With ``release_memory``: the servers, which are idle, give their GPU memory back until the next push."""
        urls = [server.url for server in self.pool.servers if not server.problem]
        if not self.settings.enable_memory_saver or self._resting:
            return

        def release() -> dict[str, str]:
            with ServerControl(urls) as servers:
                return servers.release_memory()

        problems = broadcast_from_rank0(release)
        self.pool.mark_failed(self.pool.problems | problems)
        self._resting = frozenset(urls) - problems.keys()

    def wake_up(self) -> None:
        """End a rest without a push."""
        if self._resting:
            self._update(self.pool.servers)

    def close(self) -> None:
        """End the servers that were started here, and remove the weights that they read."""
        self._sender.reset()
        for process in self._processes:
            process.close()
        self._processes = []
        if self._router is not None:
            self._router.close()
        if self._is_first:
            shutil.rmtree(self.directory / "weights", ignore_errors=True)

    def _start_servers(self) -> list[str]:
        """Addresses of new servers, which begin with the current weights."""
        failure = ""
        with self._on_device():
            for bucket, last in self._buckets():  # to the end on every rank, as in _send
                if self._is_first and not failure:
                    try:
                        self._disk.write(bucket, f"{self._tag}-start", last=last)
                    except UserError as error:
                        failure = str(error)

        def start() -> list[str]:
            if failure:
                raise UserError(failure)
            self._processes = [self._start(number) for number in range(self.settings.num_servers)]
            self._wait(self._processes)
            return [process.url for process in self._processes]

        return broadcast_from_rank0(start)

    def _start_router(self) -> str:
        self._router = Router(self.settings, self.rollout.server.request_timeout_seconds, self.directory / "router.log")
        self._router.wait(time.monotonic() + self.settings.startup_timeout_seconds)
        return self._router.url

    def _start(self, number: int) -> ServerProcess:
        return ServerProcess(
            self.settings,
            self._disk.complete,
            self.directory / f"server-{number}.log",
            number=number,
            weight_version="none",
            positions=self.spec.max_position_embeddings,
            dtype=str(self._dtype).removeprefix("torch."),
            max_tokens=self._max_tokens,
        )

    def _wait(self, processes: Sequence[ServerProcess]) -> None:
        deadline = time.monotonic() + self.settings.startup_timeout_seconds
        try:
            for process in processes:
                process.wait(deadline)
        except UserError:
            for process in processes:
                process.close()
            raise

    def _update(self, servers: Sequence[Server]) -> None:
        """Push the current weights to ``servers``, starting those anew that are gone, until all hold them.

        ``recoveries`` times again; ``UserError`` where no server of the pool holds them then.
        """
        for _ in range(self.rollout.server.max_restarts + 1 if servers else 0):
            reachable = self._reachable(servers)
            if reachable := self._checks.check_compatibility(reachable):
                self._update_weights_of(reachable)
            servers = [server for server in {*servers, *reachable} if server.problem]
            if not servers or not reachable:
                break
        self._route()
        if all(server.problem for server in self.pool.servers) or (self.pool.router and self.pool.router.problem):
            reasons = "; ".join(f"{url}: {problem}" for url, problem in self.pool.problems.items())
            raise UserError(f"no SGLang server holds the current weights ({reasons}); see the logs in {self.directory}")

    def _route(self) -> None:
        """Have the router, if there is one, use exactly the servers without a problem."""
        if self.pool.router is None:
            return

        def route() -> tuple[str, str]:
            urls = [server.url for server in self.pool.servers if not server.problem]
            if problem := self._router.serve(urls):
                print(f"the router is started anew: {problem}; see {self._router.log}", flush=True)
                self._router.close()
                self._start_router()
                problem = self._router.serve(urls)
            return self._router.url, problem

        self.pool.router = Server(*broadcast_from_rank0(route))

    def _reachable(self, servers: Sequence[Server]) -> list[Server]:
        """Those of ``servers`` that answer, and servers of this run that were gone, or hung, and are started anew."""

        def look() -> tuple[list[bool], dict[int, str]]:
            answering = [
                (number >= len(self._processes) or self._processes[number].is_alive)
                and (not server.problem or is_healthy(server.url, checks=_HEALTH_CHECKS))
                for number, server in enumerate(self.pool.servers)
            ]
            fresh = {}
            for number, process in enumerate(self._processes):
                if not answering[number]:
                    print(f"SGLang server {number} is started anew: {self.pool.servers[number].problem}", flush=True)
                    process.close()
                    fresh[number] = self._processes[number] = self._start(number)
            self._wait(list(fresh.values()))
            return answering, {number: process.url for number, process in fresh.items()}

        answering, fresh = broadcast_from_rank0(look)
        for number, url in fresh.items():
            server = self.pool.servers[number]
            server.url, server.problem = url, "it was started anew and has no weights yet"
        return [
            server
            for number, server in enumerate(self.pool.servers)
            if number in fresh or (answering[number] and server in servers)
        ]

    def _buckets(self) -> Iterator[tuple[Bucket, bool]]:
        """Buckets of the current weights, and whether each is the last."""
        held: Bucket | None = None
        for bucket in export_buckets(self._chunks, self.spec, self.layout, bucket_bytes=self.settings.bucket_bytes):
            if held is not None:
                yield held, False
            held = bucket
        yield held, True

    @property
    def _tolerance(self) -> float:
        return self.rollout.server.weight_check_tolerance or _TOLERANCES[self._dtype]

    def _update_weights_of(self, servers: Sequence[Server]) -> None:
        """Push to ``servers`` and test them; those that fail get a problem."""
        samples = probes.weight_check_sequences(self.spec)
        with self._on_device():
            started = time.perf_counter()
            size, failure = self._send_weights([server.url for server in servers])
            seconds = time.perf_counter() - started
            expected = self._score(samples)

        def test() -> tuple[dict[str, tuple[float, str]], int]:
            found = {server.url: self._check_server(server, samples, expected) for server in servers}
            odd, count = _mismatching_checksums([url for url, (_, problem) in found.items() if not problem])
            return found | {url: (found[url][0], problem) for url, problem in odd.items()}, count

        found, num_digests = broadcast_from_rank0(test)
        for server in servers:
            problem = found[server.url][1]
            server.problem = failure if problem and failure.startswith(server.url) else problem
        self.last_push = WeightUpdate(seconds, size, max(gap for gap, _ in found.values()))
        if self._is_first:
            print(
                f"weights {self.weight_version} to {len(servers)} server(s) by {self.settings.weight_sync}: {size / 1e9:.4f} GB in "
                f"{seconds:.2f} s ({size / 1e9 / seconds:.3f} GB/s), largest probe difference "
                f"{self.last_push.max_log_prob_diff:.1e}, {num_digests} digest(s) compared",
                *[f"; {url}: {problem}" for url, (_, problem) in found.items() if problem],
                flush=True,
            )

    def _check_server(
        self, server: Server, samples: Sequence[Sample], expected: Sequence[np.ndarray]
    ) -> tuple[float, str]:
        """Largest difference on the probes, and what is wrong with the server, if anything."""
        try:
            gap = probes.max_log_prob_diff(self.pool, server, self.spec, samples, expected, self.weight_version)
        except (InvalidReply, UserError) as error:
            return float("nan"), str(error)
        if not gap <= self._tolerance:
            allowed = f"(allowed: {self._tolerance:g})"
            return gap, f"its log-probabilities differ from the trainer's by {gap:.1e} nats {allowed}"
        return gap, ""

    def _send_weights(self, urls: list[str]) -> tuple[int, str]:
        """Send the current weights to idle servers; returns their bytes and, where it failed, why."""
        size, failure = 0, ""
        resting, self._resting = self._resting.intersection(urls), self._resting.difference(urls)
        with (
            ServerControl(urls if self._is_first else []) as servers,
            ServerControl(resting if self._is_first else []) as sleepers,
        ):
            try:
                finish(sleepers.post("/resume_memory_occupation", {"tags": ["weights", "cuda_graph"]}))
                finish(servers.post("/pause_generation", {"mode": "abort"}))
                # A request that its sender gave up may still be running, and SGLang ends itself where it is asked to
                # forget the keys and values of old weights then: wait until nothing runs.
                finish(servers.post(f"/flush_cache?timeout={IDLE_SECONDS}", {}))
            except WeightUpdateFailed as error:
                failure = str(error)
            for bucket, last in self._buckets():  # to the end on every rank, because making buckets is collective
                size += sum(tensor.nbytes for _, tensor in bucket)
                if self._is_first and not failure:
                    try:
                        self._sender.send(servers, bucket, self.weight_version, last=last)
                    except (WeightUpdateFailed, UserError) as error:
                        failure = str(error)
                        self._sender.reset()
            try:
                # Keys and values last: the senders need memory of their own.
                finish(sleepers.post("/resume_memory_occupation", {"tags": ["kv_cache"]}))
                finish(servers.post("/continue_generation", {}))
            except WeightUpdateFailed as error:
                failure = failure or str(error)
        return size, broadcast_from_rank0(lambda: failure)


def _mismatching_checksums(urls: Sequence[str]) -> tuple[dict[str, str], int]:
    """Address -> problem of servers whose weights are not bit by bit those of the majority, and how many could tell."""
    if len(urls) < 2:
        return {}, 0
    with ServerControl(urls) as servers:
        digests = servers.digests()
    counts = collections.Counter(digests.values())
    common = max(counts, key=counts.__getitem__, default="")
    if 2 * counts[common] <= len(digests):
        common = ""  # no majority: nobody knows which are right
    problem = "the digest of its weights is not that of the other servers"
    return {url: problem for url, digest in digests.items() if digest != common}, len(digests)
