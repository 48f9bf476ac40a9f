"""The servers that hold one model: started or attached to, given the weights of the trainer, and tested.

Every call is collective over all ranks of the job; rank 0 owns the servers, and senders (``senders.py``) push weights
to them and test them. After a weight update each server must report the new version and return the trainer's own
log-probabilities on fixed check sequences; one that does not gets no requests until a later update succeeds. Servers of
this run that are gone are restarted.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.training import RolloutConfig
from megatron_s2d.errors import UserError
from megatron_s2d.models.fused_experts import ExpertJoiner
from megatron_s2d.models.lora import gather_adapters
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.parallel import device
from megatron_s2d.parallel.collectives import (
    all_gather_json,
    any_rank,
    broadcast_from_rank0,
    first_error,
)
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import Decoder
from megatron_s2d.rollout.served.backend import (
    NO_REQUIREMENTS,
    Bucket,
    InvalidReply,
    RouterProcess,
    ServerBackend,
    ServerProcess,
    ServerRequirements,
    WeightTransfer,
    WeightUpdateFailed,
)
from megatron_s2d.rollout.served.server_pool import Server, ServerPool
from megatron_s2d.rollout.served.shared_checks import ServerCheck, mismatching_digests, shared_checks, shared_problems
from megatron_s2d.rollout.served.startup_checks import Score, StartupChecks
from megatron_s2d.rollout.served.weight_checks import max_log_prob_diff, weight_check_sequences

_HEALTH_CHECKS = 3  # of a server with a problem, before it counts as one that hangs
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.5}


@dataclasses.dataclass(frozen=True)
class WeightUpdate:
    """Measurements of a weight update."""

    seconds: float
    num_bytes: int  # of the weights, once
    max_log_prob_diff: float  # largest difference of a check sequence's log-probability, over the servers


class ServerGroup:
    """Servers with the weights of one model; ``score`` returns the trainer's log-probabilities of samples."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        spec: ModelSpec,
        layout: Layout,
        score: Score,
        settings: RolloutConfig,
        directory: Path,
        backend: ServerBackend,
        *,
        urls: Sequence[str] = (),
        requirements: ServerRequirements = NO_REQUIREMENTS,
        tokenizer: Decoder | None = None,
        on_device: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        lora: LoraConfig | None = None,
    ):
        """Start servers with the current weights of ``chunks``, or attach to ``urls``; send the weights to them.

        Then each server answers one test request of every kind that the stage sends, at its temperature and length.

        score: collective. directory: for weights and logs. tokenizer: needed for stop strings. on_device: inside it
        weights are on the device. lora: of the adapter beside the weights, which then is all that an update sends.
        Raises ``UserError`` on every rank if one rank cannot continue.
        """
        self.version = 0
        self.directory = directory
        self.spec, self.layout, self.rollout, self.tokenizer = spec, layout, settings, tokenizer
        self._backend, self.requirements = backend, requirements
        self._chunks, self._score, self._on_device, self._lora = chunks, score, on_device, lora
        self._dtype = next(chunks[0].parameters()).dtype
        self._is_rank_zero = dist.get_rank() == 0
        # An attached server may hold versions of another run.
        self._tag = broadcast_from_rank0(lambda: uuid.uuid4().hex[:12])
        self._processes: list[ServerProcess] = []
        self._router: RouterProcess | None = None
        self.last_update = WeightUpdate(0.0, 0, 0.0)
        self._sleeping: frozenset[str] = frozenset()  # addresses of servers that have released their memory
        self._checks = StartupChecks(backend, spec, requirements, settings.server)
        self.pool = ServerPool(urls or self._start_servers(), settings.server, backend.protocol)
        try:
            if backend.uses_router:
                self.pool.router = Server(broadcast_from_rank0(self._start_router))
            self._update(self.pool.servers)
            with on_device():
                self._checks.dry_run(self.pool.servers, self.weight_version, score, self._tolerance)
        except UserError:
            self.close()
            raise

    @property
    def weight_version(self) -> str:
        """The name of the current weights on the servers."""
        return f"{self._tag}-{self.version}"

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Send the weights of ``chunks`` to all servers, which are idle; ``UserError`` if none holds them then."""
        self._chunks, self.version = chunks, version
        self._update(self.pool.servers)

    def recover(self) -> None:
        """Send the current weights to the servers that had a problem.

        Behind a router it is unknown which server sent an invalid reply, so all of them are checked.
        """
        router = self.pool.router
        if router is not None and router.problem:
            self._update(self.pool.servers)
        else:
            self._update([server for server in self.pool.servers if server.problem])

    def metrics(self) -> dict[str, float]:
        """Return ``weight_sync/gb_per_s`` and ``weight_sync/max_log_prob_diff`` (nats) of the last weight update."""
        last = self.last_update
        return {
            "weight_sync/gb_per_s": last.num_bytes / 1e9 / max(last.seconds, 1e-9),
            "weight_sync/max_log_prob_diff": last.max_log_prob_diff,
        }

    def sleep(self) -> None:
        """Release the GPU memory of the idle servers until the next update, if the backend supports it."""
        urls = [server.url for server in self.pool.servers if not server.problem]
        if not self._backend.can_sleep or self._sleeping:
            return
        own = self._backend.senders.own(urls)
        problems = shared_problems(urls, self._backend.release_memory(own) if own else {})
        self.pool.mark_failed(self.pool.problems | problems)
        self._sleeping = frozenset(urls) - problems.keys()

    def wake_up(self) -> None:
        """End ``sleep`` without new weights."""
        if self._sleeping:
            self._update(self.pool.servers)

    def close(self) -> None:
        """End the servers that were started here, and remove the weights that they read."""
        self._backend.disconnect()
        for process in self._processes:
            process.close()
        self._processes = []
        if self._router is not None:
            self._router.close()
        if self._is_rank_zero:
            self._backend.remove_files()

    # ------------------------------------------------------------------ processes

    def _start_servers(self) -> list[str]:
        """Return the addresses of new servers, which start with the current weights."""
        failure = None
        is_sender = self._backend.senders.index is not None
        with self._on_device():
            for bucket, last in self._buckets(start=True):  # to the end on every rank, as in _send_weights
                if is_sender and failure is None:
                    try:
                        self._backend.write_start_weights(bucket, f"{self._tag}-start", last=last)
                    except UserError as error:
                        failure = str(error)
        self._make_room()
        if (failure := first_error(failure)) is not None:
            raise UserError(failure)
        if is_sender:
            self._backend.commit_start_weights()

        def start() -> list[str]:
            self._processes = [self._backend.start_server(number) for number in range(self._backend.num_servers)]
            self._wait(self._processes)
            return [process.url for process in self._processes]

        return broadcast_from_rank0(start)

    def _make_room(self) -> None:
        """Give back memory that no tensor uses, on every rank, before servers take theirs on the same GPUs."""
        device.release_cached_memory()
        any_rank(False)  # returns when all ranks have

    def _start_router(self) -> str:
        self._router = self._backend.start_router()
        self._router.wait(time.monotonic() + self._backend.startup_timeout_seconds)
        return self._router.url

    def _wait(self, processes: Sequence[ServerProcess]) -> None:
        deadline = time.monotonic() + self._backend.startup_timeout_seconds
        try:
            for process in processes:
                process.wait(deadline)
        except UserError:
            for process in processes:
                process.close()
            raise

    def _route(self) -> None:
        """Make the router, if there is one, use exactly the servers without a problem."""
        if self.pool.router is None:
            return

        def route() -> tuple[str, str]:
            urls = [server.url for server in self.pool.servers if not server.problem]
            if problem := self._router.serve(urls):
                print(f"the router is restarted: {problem}; see {self._router.log}", flush=True)
                self._router.close()
                self._start_router()
                problem = self._router.serve(urls)
            return self._router.url, problem

        self.pool.router = Server(*broadcast_from_rank0(route))

    def _reachable(self, servers: Sequence[Server]) -> list[Server]:
        """Return those of ``servers`` that answer, and servers of this run that were gone, or hung, and restarted."""

        def restart_failed() -> tuple[list[bool], list[tuple[int, str]]]:
            answering = [
                (number >= len(self._processes) or self._processes[number].is_alive)
                and (not server.problem or self._backend.is_healthy(server.url, checks=_HEALTH_CHECKS))
                for number, server in enumerate(self.pool.servers)
            ]
            restarted = {}
            for number, process in enumerate(self._processes):
                if not answering[number]:
                    problem = self.pool.servers[number].problem
                    print(f"{self._backend.name} server {number} is restarted: {problem}", flush=True)
                    process.close()
                    restarted[number] = self._processes[number] = self._backend.start_server(number)
            self._wait(list(restarted.values()))
            return answering, [(number, process.url) for number, process in restarted.items()]

        answering, addresses = broadcast_from_rank0(restart_failed)
        restarted = dict(addresses)
        for number, url in restarted.items():
            server = self.pool.servers[number]
            server.url, server.problem = url, "it was restarted and has no weights yet"
        return [
            server
            for number, server in enumerate(self.pool.servers)
            if number in restarted or (answering[number] and server in servers)
        ]

    # ------------------------------------------------------------------ weights

    def _update(self, servers: Sequence[Server]) -> None:
        """Send the current weights to ``servers``, restarting those that are gone, until all hold them.

        Retries ``max_restarts`` times; ``UserError`` if no server of the pool holds them then.
        """
        self._make_room()
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
            raise UserError(
                f"no {self._backend.name} server holds the current weights ({reasons}); see the logs in "
                f"{self.directory}"
            )

    def _update_weights_of(self, servers: Sequence[Server]) -> None:
        """Send the weights to ``servers`` and test them; those that fail get a problem."""
        samples = weight_check_sequences(self.spec)
        with self._on_device():
            start = time.perf_counter()
            num_bytes, failures = self._send_weights([server.url for server in servers])
            seconds = time.perf_counter() - start
            self._backend.use_weights(self.weight_version)
            expected = self._score(samples)
        results = shared_checks(servers, self._check_own(servers, samples, expected))
        mismatches, num_digests = mismatching_digests(
            [(url, digest) for url, _, problem, digest in results if not problem]
        )
        checks = {url: (difference, mismatches.get(url, problem)) for url, difference, problem, _ in results}
        for server in servers:
            problem = checks[server.url][1]
            reasons = [failure for failure in failures if failure.startswith(server.url)]
            server.problem = reasons[0] if problem and reasons else problem
        self.last_update = WeightUpdate(seconds, num_bytes, max(difference for difference, _ in checks.values()))
        if self._is_rank_zero:
            print(
                f"weights {self.weight_version} to {len(servers)} server(s) by {self._backend.weight_sync} from "
                f"{min(len(servers), self._backend.senders.count)} rank(s): "
                f"{num_bytes / 1e9:.4f} GB in {seconds:.2f} s ({num_bytes / 1e9 / seconds:.3f} GB/s), largest "
                f"difference in log-probability {self.last_update.max_log_prob_diff:.1e}, {num_digests} digest(s) "
                "compared",
                *[f"; {url}: {problem}" for url, (_, problem) in checks.items() if problem],
                flush=True,
            )

    def _buckets(self, *, start: bool = False) -> Iterator[tuple[Bucket, bool]]:
        """Yield buckets of the current weights, and whether each is the last; with ``lora`` the adapter is the bucket.

        start: those that servers are started with; with ``lora`` the weights without the adapter.
        """
        if self._lora is not None and not start:
            yield list(gather_adapters(self._chunks, self.spec, self.layout, self._lora).items()), True
            return
        previous: Bucket | None = None
        joiner = ExpertJoiner(self.spec)
        for tensors in export_buckets(
            self._chunks,
            self.spec,
            self.layout,
            bucket_bytes=self._backend.bucket_bytes,
            merge_adapter=self._lora is None,
        ):
            bucket = [item for name, tensor in tensors for item in joiner.add(name, tensor)]
            if previous and bucket:
                yield previous, False
            previous = bucket or previous
        yield previous, True

    @property
    def _tolerance(self) -> float:
        return self.rollout.server.weight_check_tolerance or _TOLERANCES[self._dtype]

    def _check_own(
        self, servers: Sequence[Server], samples: Sequence[Sample], expected: Sequence[np.ndarray]
    ) -> list[ServerCheck]:
        """Test this sender's servers together, and ask those that pass for the digests of their weights."""
        own = self._backend.senders.own(servers)
        with concurrent.futures.ThreadPoolExecutor(max(1, len(own))) as threads:
            checks = list(threads.map(lambda server: self._check_server(server, samples, expected), own))
        passed = [server.url for server, (_, problem) in zip(own, checks, strict=True) if not problem]
        digests = self._backend.weight_digests(passed) if passed and len(servers) > 1 else {}
        return [(server.url, *check, digests.get(server.url, "")) for server, check in zip(own, checks, strict=True)]

    def _check_server(
        self, server: Server, samples: Sequence[Sample], expected: Sequence[np.ndarray]
    ) -> tuple[float, str]:
        """Return the largest difference on the check sequences, and the server's problem, if any."""
        try:
            difference = max_log_prob_diff(self.pool, server, samples, expected, self.weight_version)
        except (InvalidReply, UserError) as error:
            return float("nan"), str(error)
        if not difference <= self._tolerance:
            allowed = f"(allowed: {self._tolerance:g})"
            return difference, f"its log-probabilities differ from the trainer's by {difference:.1e} nats {allowed}"
        return difference, ""

    def _send_weights(self, urls: list[str]) -> tuple[int, list[str]]:
        """Send the current weights to idle servers; return their bytes and why senders failed, if some did."""
        num_bytes, failure = 0, ""

        def attempt(action: Callable[[], None]) -> str:
            try:
                action()
            except (WeightUpdateFailed, UserError) as error:
                return str(error)
            return ""

        sleeping, self._sleeping = self._sleeping.intersection(urls), self._sleeping.difference(urls)
        with self._transfer(self._backend.senders.own(urls), sleeping) as transfer:
            if transfer is not None:
                failure = attempt(transfer.begin)
            for bucket, last in self._buckets():  # to the end on every rank, because making buckets is collective
                num_bytes += sum(tensor.nbytes for _, tensor in bucket)
                if transfer is not None and not failure:
                    failure = attempt(functools.partial(transfer.send, bucket, self.weight_version, last=last))
            device.release_cached_memory()
            if not any_rank(bool(failure)) and transfer is not None:  # all senders have sent or written everything
                failure = attempt(functools.partial(transfer.commit, self.weight_version))
            is_complete = not any_rank(bool(failure))
            if transfer is not None:
                end_failure = attempt(functools.partial(transfer.end, complete=is_complete))
                failure = failure or end_failure
        if not any_rank(bool(failure)):
            return num_bytes, []
        return num_bytes, [reason for reason in all_gather_json(failure) if reason]

    def _transfer(
        self, urls: Sequence[str], sleeping: frozenset[str]
    ) -> contextlib.AbstractContextManager[WeightTransfer | None]:
        """Return the weight transfer to this sender's servers ``urls``; None on ranks that send nothing."""
        if self._backend.senders.index is None:
            return contextlib.nullcontext()
        return self._backend.transfer_weights(urls, sorted(sleeping.intersection(urls)))
