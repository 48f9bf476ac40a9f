"""A ``RolloutEngine`` whose responses come from SGLang servers, with every push of weights proven before it is used.

Every call is collective over all ranks of the job. Rank 0 owns the servers; the first rank of each model replica sends
the requests of its replica and hands the samples on. After a push each server must report the new version and give the
trainer's own log-probabilities on fixed probe sequences; one that does not gets no requests. When requests fail, rank 0
starts servers anew that are gone, all ranks push the current weights to those in trouble, and only the requests that
have no sample yet are sent again.

With ``ahead`` the responses that the next step needs are generated while this one trains. A push waits for them, or
interrupts them and lets them go on with the new weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.config.base import UserError
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.training import RolloutConfig
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import ProgressCallback, Request, check_requests, requests_digest
from megatron_s2d.rollout.sglang import probes, scoring
from megatron_s2d.rollout.sglang.client import Pool, Server
from megatron_s2d.rollout.sglang.collective import from_all, from_first
from megatron_s2d.rollout.sglang.control import PushFailed, Servers, finish
from megatron_s2d.rollout.sglang.generation import Generation, Outcome
from megatron_s2d.rollout.sglang.protocol import BadReply, Decoder, Expected, Partial
from megatron_s2d.rollout.sglang.senders import (
    BroadcastSender,
    Bucket,
    DiskSender,
    Sender,
    TensorSender,
    refuse_remote,
)
from megatron_s2d.rollout.sglang.server import Router, ServerProcess, is_healthy

Score = Callable[[Sequence[Sample]], Sequence[np.ndarray]]
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.5}


@dataclasses.dataclass(frozen=True)
class Push:
    """What a push measured."""

    seconds: float
    num_bytes: int  # of the weights, once
    gap: float  # largest difference of a probe's log-probability, over the servers


class _Work:
    """What one ``generate`` asks for, and what there is of it. Samples are known on ranks that speak only."""

    def __init__(self, requests: Sequence[Request], num_groups: int | None, carried: Mapping[str, Sample | Partial]):
        self.requests, self.generation = list(requests), None
        groups = {request.group for request in self.requests}
        self.num_groups = len(groups) if num_groups is None else min(num_groups, len(groups))
        known = {place: carried[request.id] for place, request in enumerate(self.requests) if request.id in carried}
        self.samples = {place: found for place, found in known.items() if isinstance(found, Sample)}
        self.partials = {place: found for place, found in known.items() if isinstance(found, Partial)}

    def complete_groups(self) -> list[int]:
        """Groups whose every response has a sample, in order."""
        open_groups = {request.group for place, request in enumerate(self.requests) if place not in self.samples}
        return [group for group in dict.fromkeys(r.group for r in self.requests) if group not in open_groups]

    def start(self, pool: Pool, expected: Expected, progress: ProgressCallback | None = None) -> None:
        """Ask for what is missing, if anything."""
        missing = [place for place in range(len(self.requests)) if place not in self.samples]
        groups_left = self.num_groups - len(self.complete_groups())
        if groups_left > 0:
            self._places = missing
            self.generation = Generation(
                pool,
                [self.requests[place] for place in missing],
                expected,
                partials={i: self.partials[place] for i, place in enumerate(missing) if place in self.partials},
                num_groups=groups_left,
                progress=progress,
            )

    def collect(self) -> Outcome:
        """Wait for what was started, and take it; may raise ``UserError``."""
        if self.generation is None:
            return Outcome()
        generation, self.generation = self.generation, None
        outcome = generation.result()
        self.samples |= {self._places[i]: sample for i, sample in outcome.samples.items()}
        self.partials |= {self._places[i]: partial for i, partial in outcome.partials.items()}
        return outcome

    def split(self) -> tuple[list[Sample], dict[str, Sample | Partial]]:
        """(samples of ``num_groups`` complete groups, what there is of the other groups by the request's id)."""
        chosen = set(self.complete_groups()[: self.num_groups])
        found = self.partials | self.samples
        return (
            [self.samples[place] for place, request in enumerate(self.requests) if request.group in chosen],
            {
                request.id: found[place]
                for place, request in enumerate(self.requests)
                if request.group not in chosen and place in found
            },
        )


class SglangEngine:
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
        tokenizer: Decoder | None = None,
        on_device: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """Start servers with the current weights of ``chunks``, or attach to ``urls``; push the weights to them.

        ``directory`` is for weights and logs; every server must see it under the same path where sync is disk.
        ``tokenizer`` is needed for stop strings. Weights are where they compute inside ``on_device()``. Raises
        ``UserError`` on every rank where one rank cannot go on.
        """
        self.version = 0
        self._chunks, self._spec, self._layout, self._score = chunks, spec, layout, score
        self._settings, self._max_tokens = settings.sglang, settings.max_batch_tokens
        self._directory, self._tokenizer, self._on_device = directory, tokenizer, on_device
        self._dtype = next(chunks[0].parameters()).dtype
        self._is_first = dist.get_rank() == 0
        self._tag = from_first(lambda: uuid.uuid4().hex[:12])  # an attached server may hold versions of another run
        self._processes: list[ServerProcess] = []
        self._router: Router | None = None
        self._disk = DiskSender(directory / "weights", spec, tokenizer)
        self._sender: Sender = {"disk": self._disk, "distributed": BroadcastSender(), "tensor": TensorSender()}[
            self._settings.sync
        ]
        self._last = Push(0.0, 0, 0.0)
        self._begun: _Work | None = None  # by ``begin``
        self._begun_error = ""
        self._carried: dict[str, Sample | Partial] = {}  # by request, of groups that were not complete in time
        self._resting: frozenset[str] = frozenset()  # servers that have given their memory back
        if urls and self._settings.sync != "disk":
            refuse_remote(urls)
        self._pool = Pool(urls or self._start_servers(), self._settings)
        try:
            if self._settings.router:
                self._pool.router = Server(from_first(self._start_router))
            self._update(self._pool.servers)
        except UserError:
            self.close()
            raise

    # ------------------------------------------------------------------ RolloutEngine

    def begin(self, requests: Sequence[Request], num_groups: int | None = None) -> None:
        """With ``ahead``: have the requests answered from now on; the next ``generate`` must ask for the same."""
        if self._settings.ahead == "off":
            return
        self._check(requests)
        self._begun = _Work(requests, num_groups, self._carried)
        if self._speaks:
            self._begun.start(self._pool, self._expected)

    def generate(
        self,
        requests: Sequence[Request],
        progress: ProgressCallback | None = None,
        *,
        num_groups: int | None = None,
    ) -> list[Sample]:
        """See ``RolloutEngine``; the same on all ranks of the replica.

        Raises ``UserError`` for a request that the model cannot serve, and where ``recoveries`` did not help.
        """
        if self._begun is not None:
            work, self._begun = self._begun, None
            if [request.id for request in work.requests] != [request.id for request in requests]:
                raise RuntimeError("other requests were begun")
        else:
            self._check(requests)
            work = _Work(requests, num_groups, self._carried)
        if self._resting:
            self._update(self._pool.servers)
        self._with_recoveries(lambda: self._ask(work, progress))
        samples, carried = work.split() if self._speaks else ([], {})
        if num_groups is not None:
            self._carried = carried
        return self._to_replica(samples)

    def rest(self) -> None:
        """With ``release_memory``: the servers give their GPU memory back until the next push."""
        urls = [server.url for server in self._pool.servers if not server.problem]
        if not self._settings.release_memory or self._resting:
            return

        def release() -> dict[str, str]:
            with Servers(urls) as servers:
                return servers.release_memory()

        problems = from_first(release)
        self._pool.note(self._pool.problems | problems)
        self._resting = frozenset(urls) - problems.keys()

    def score(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """log pi of every sample's response tokens at temperature 1, [length] float32 each (0 elsewhere), on all ranks.

        The same samples on all ranks. Raises ``UserError`` as ``generate`` does, and for samples of a temperature.
        """
        found = self._scored(samples, scoring.score)
        return [np.where(sample.response_mask, found[place], 0.0) for place, sample in enumerate(samples)]

    def top_tokens(self, samples: Sequence[Sample], k: int) -> list[scoring.TopTokens]:
        """The k likeliest tokens at every position of every sample, on all ranks; otherwise as ``score``."""
        found = self._scored(samples, functools.partial(scoring.top_tokens, k=k))
        return [found[place] for place in range(len(samples))]

    def push(self, chunks: Sequence[Any], version: int) -> None:
        """Bring the weights of ``chunks`` to all servers and prove it; ``UserError`` where none holds them then."""
        self._hold()
        self._chunks, self.version = chunks, version
        self._update(self._pool.servers)
        if self._begun is not None and self._speaks:
            self._begun.start(self._pool, self._expected)

    def metrics(self) -> dict[str, float]:
        """``push_gb_per_second`` and ``probe_gap`` (nats) of the last push."""
        last = self._last
        return {"push_gb_per_second": last.num_bytes / 1e9 / max(last.seconds, 1e-9), "probe_gap": last.gap}

    def close(self) -> None:
        """End the servers that were started here, and remove the weights that they read."""
        if self._begun is not None and self._begun.generation is not None:
            self._begun.generation.interrupt()
        self._sender.forget()
        for process in self._processes:
            process.close()
        self._processes = []
        if self._router is not None:
            self._router.close()
        if self._is_first:
            shutil.rmtree(self._directory / "weights", ignore_errors=True)

    # ------------------------------------------------------------------ requests

    def _with_recoveries(self, ask: Callable[[], list[str]]) -> None:
        """Ask, and recover, until ``ask`` returns no reasons of failures; they are the same on all ranks."""
        for recovery in range(self._settings.recoveries + 1):
            reasons = ask()
            if not reasons:
                return
            if recovery < self._settings.recoveries:
                self._recover()
        raise UserError(
            f"the SGLang servers left some requests unanswered, after {self._settings.recoveries} recoveries too "
            f"({reasons[0]}); see the servers' logs in {self._directory}"
        )

    def _scored(self, samples: Sequence[Sample], score: Callable[..., tuple[dict[int, Any], list[str]]]) -> dict:
        """Place -> score; rank 0 asks for all."""
        scoring.check_temperature(samples)
        sequences = [sample.token_ids for sample in samples]
        found: dict[int, Any] = {}

        def ask_missing() -> tuple[dict[int, Any], list[str], dict[str, str]]:
            missing = [place for place in range(len(samples)) if place not in found]
            part = [sequences[place] for place in missing]
            scores, reasons = score(self._pool, part, self._label, self._spec.vocab_size)
            return {missing[place]: value for place, value in scores.items()}, reasons, self._pool.problems

        def ask() -> list[str]:
            scores, reasons, problems = from_first(ask_missing)
            found.update(scores)
            self._pool.note(problems)
            return reasons

        self._with_recoveries(ask)
        return found

    @property
    def _speaks(self) -> bool:
        """Whether this rank sends the requests of its replica."""
        return self._layout.groups.mp.rank() == 0

    @property
    def _expected(self) -> Expected:
        return Expected(self._label, self.version, self._spec.vocab_size, self._tokenizer)

    def _ask(self, work: _Work, progress: ProgressCallback | None) -> list[str]:
        """Add samples to ``work``; returns reasons of failures, of all replicas and on all ranks."""
        outcome, refused = Outcome(), self._begun_error
        if self._speaks and not refused:
            try:
                if work.generation is None:
                    work.start(self._pool, self._expected, progress)
                outcome = work.collect()
            except UserError as error:
                refused = str(error)
        reasons = sorted(set(outcome.failures.values())) or ["no answer"] if self._lacks(work) else []
        everyone = from_all((refused, self._pool.problems, reasons))
        for said, _, _ in everyone:
            if said:
                raise UserError(said)
        self._pool.note({url: problem for _, found, _ in everyone for url, problem in found.items()})
        return [reason for _, _, reasons in everyone for reason in reasons]

    def _lacks(self, work: _Work) -> bool:
        return self._speaks and len(work.complete_groups()) < work.num_groups

    def _hold(self) -> None:
        """Before a push: responses that were begun are complete, or interrupted; no request is in flight."""
        if self._begun is None:
            return
        if self._begun.generation is not None:
            if self._settings.ahead == "continue":
                self._begun.generation.interrupt()
            try:
                self._begun.collect()  # what failed is asked for again
            except UserError as error:
                self._begun_error = str(error)
        self._pool.note({url: problem for found in from_all(self._pool.problems) for url, problem in found.items()})

    def _check(self, requests: Sequence[Request]) -> None:
        check_requests(
            requests,
            vocab_size=self._spec.vocab_size,
            max_positions=self._spec.max_position_embeddings,
            has_tokenizer=self._tokenizer is not None,
        )
        self._check_same_requests(list(requests))

    def _check_same_requests(self, requests: list[Request]) -> None:
        group = self._layout.groups.mp
        if group.size() > 1:
            number = requests_digest(requests)
            extremes = torch.tensor([number, -number], device=device.device())
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
            if extremes.tolist() != [number, -number]:
                raise RuntimeError("the ranks of one model replica were given different requests")

    def _to_replica(self, samples: list[Sample]) -> list[Sample]:
        group = self._layout.groups.mp
        if group.size() == 1:
            return samples
        box = [samples]
        dist.broadcast_object_list(box, group=group, group_src=0)
        return box[0]

    # ------------------------------------------------------------------ servers and weights

    @property
    def _label(self) -> str:
        """What servers call the current weights."""
        return f"{self._tag}-{self.version}"

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
            self._processes = [self._start(number) for number in range(self._settings.replicas)]
            self._wait(self._processes)
            return [process.url for process in self._processes]

        return from_first(start)

    def _start_router(self) -> str:
        self._router = Router(self._settings, self._directory / "router.log")
        self._router.wait(time.monotonic() + self._settings.start_seconds)
        return self._router.url

    def _start(self, number: int) -> ServerProcess:
        return ServerProcess(
            self._settings,
            self._disk.complete,
            self._directory / f"server-{number}.log",
            number=number,
            weight_version="none",
            positions=self._spec.max_position_embeddings,
            dtype=str(self._dtype).removeprefix("torch."),
            max_tokens=self._max_tokens,
        )

    def _wait(self, processes: Sequence[ServerProcess]) -> None:
        deadline = time.monotonic() + self._settings.start_seconds
        try:
            for process in processes:
                process.wait(deadline)
        except UserError:
            for process in processes:
                process.close()
            raise

    def _recover(self) -> None:
        """Give the current weights to the servers that had a problem.

        Behind a router nobody knows which server a bad reply came from, so all of them are looked at.
        """
        router = self._pool.router
        if router is not None and router.problem:
            self._update(self._pool.servers)
        else:
            self._update([server for server in self._pool.servers if server.problem])

    def _update(self, servers: Sequence[Server]) -> None:
        """Push the current weights to ``servers``, starting those anew that are gone, until all hold them.

        ``recoveries`` times again; ``UserError`` where no server of the pool holds them then.
        """
        for _ in range(self._settings.recoveries + 1 if servers else 0):
            reachable = self._reachable(servers)
            if reachable:
                self._push_to(reachable)
            servers = [server for server in {*servers, *reachable} if server.problem]
            if not servers or not reachable:
                break
        self._route()
        if all(server.problem for server in self._pool.servers) or (self._pool.router and self._pool.router.problem):
            reasons = "; ".join(f"{url}: {problem}" for url, problem in self._pool.problems.items())
            raise UserError(
                f"no SGLang server holds the current weights ({reasons}); see the logs in {self._directory}"
            )

    def _route(self) -> None:
        """Have the router, if there is one, use exactly the servers without a problem."""
        if self._pool.router is None:
            return

        def route() -> tuple[str, str]:
            if not self._router.is_alive:
                print(f"the router is started anew; see {self._router.log}", flush=True)
                self._start_router()
            return self._router.url, self._router.serve([s.url for s in self._pool.servers if not s.problem])

        self._pool.router = Server(*from_first(route))

    def _reachable(self, servers: Sequence[Server]) -> list[Server]:
        """Those of ``servers`` that answer, and servers of this run that were gone, or hung, and are started anew."""

        def look() -> tuple[list[bool], dict[int, str]]:
            answering = [
                (number >= len(self._processes) or self._processes[number].is_alive)
                and (not server.problem or is_healthy(server.url))
                for number, server in enumerate(self._pool.servers)
            ]
            fresh = {}
            for number, process in enumerate(self._processes):
                if not answering[number]:
                    print(f"SGLang server {number} is started anew: {self._pool.servers[number].problem}", flush=True)
                    process.close()
                    fresh[number] = self._processes[number] = self._start(number)
            self._wait(list(fresh.values()))
            return answering, {number: process.url for number, process in fresh.items()}

        answering, fresh = from_first(look)
        for number, url in fresh.items():
            server = self._pool.servers[number]
            server.url, server.problem = url, "it was started anew and has no weights yet"
        return [
            server
            for number, server in enumerate(self._pool.servers)
            if number in fresh or (answering[number] and server in servers)
        ]

    def _buckets(self) -> Iterator[tuple[Bucket, bool]]:
        """Buckets of the current weights, and whether each is the last."""
        held: Bucket | None = None
        for bucket in export_buckets(self._chunks, self._spec, self._layout, bucket_bytes=self._settings.bucket_bytes):
            if held is not None:
                yield held, False
            held = bucket
        yield held, True

    def _push_to(self, servers: Sequence[Server]) -> None:
        """Push to ``servers`` and test them; those that fail get a problem."""
        samples = probes.probe_samples(self._spec)
        with self._on_device():
            started = time.perf_counter()
            size, failure = self._send([server.url for server in servers])
            seconds = time.perf_counter() - started
            expected = self._score(samples)

        def test() -> dict[str, tuple[float, str]]:
            return {server.url: self._test(server, samples, expected) for server in servers}

        found = from_first(test)
        for server in servers:
            problem = found[server.url][1]
            server.problem = failure if problem and failure.startswith(server.url) else problem
        self._last = Push(seconds, size, max(gap for gap, _ in found.values()))
        if self._is_first:
            print(
                f"weights {self._label} to {len(servers)} server(s) by {self._settings.sync}: {size / 1e9:.4f} GB in "
                f"{seconds:.2f} s ({size / 1e9 / seconds:.3f} GB/s), largest probe difference {self._last.gap:.1e}",
                *[f"; {url}: {problem}" for url, (_, problem) in found.items() if problem],
                flush=True,
            )

    def _test(self, server: Server, samples: Sequence[Sample], expected: Sequence[np.ndarray]) -> tuple[float, str]:
        """Largest difference on the probes, and what is wrong with the server, if anything."""
        tolerance = self._settings.probe_tolerance or _TOLERANCES[self._dtype]
        try:
            gap = probes.gap(self._pool, server, self._spec, samples, expected, self._label)
        except (BadReply, UserError) as error:
            return float("nan"), str(error)
        if not gap <= tolerance:
            return gap, f"its log-probabilities differ from the trainer's by {gap:.1e} nats (allowed: {tolerance:g})"
        return gap, ""

    def _send(self, urls: list[str]) -> tuple[int, str]:
        """Send the current weights to idle servers; returns their bytes and, where it failed, why."""
        size, failure = 0, ""
        resting, self._resting = self._resting.intersection(urls), self._resting.difference(urls)
        with Servers(urls if self._is_first else []) as servers, Servers(resting if self._is_first else []) as sleepers:
            try:
                finish(sleepers.post("/resume_memory_occupation", {"tags": ["weights", "cuda_graph"]}))
                finish(servers.post("/pause_generation", {"mode": "abort"}))
            except PushFailed as error:
                failure = str(error)
            for bucket, last in self._buckets():  # to the end on every rank, because making buckets is collective
                size += sum(tensor.nbytes for _, tensor in bucket)
                if self._is_first and not failure:
                    try:
                        self._sender.send(servers, bucket, self._label, last=last)
                    except (PushFailed, UserError) as error:
                        failure = str(error)
                        self._sender.forget()
            try:
                # Keys and values last: the senders need memory of their own.
                finish(sleepers.post("/resume_memory_occupation", {"tags": ["kv_cache"]}))
                finish(servers.post("/continue_generation", {}))
            except PushFailed as error:
                failure = failure or str(error)
        return size, from_first(lambda: failure)
