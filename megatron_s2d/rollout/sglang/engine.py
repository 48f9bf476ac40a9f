"""A ``RolloutEngine`` whose responses come from SGLang servers, with every push of weights proven before it is used.

Every call is collective over all ranks of the job. Rank 0 owns the servers; the first rank of each model replica sends
the requests of its replica and hands the samples on. After a push each server must report the new version and give the
trainer's own log-probabilities on fixed probe sequences; one that does not gets no requests. When requests fail, rank 0
starts servers anew that are gone, all ranks push the current weights to those in trouble, and only the requests that
have no sample yet are sent again.

Left out: responses that go on over an update (a push waits for an idle server), and generation beside training.
"""

from __future__ import annotations

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

from megatron_s2d.config.base import UserError
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.training import RolloutConfig
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import ProgressCallback, Request, check_requests, requests_digest
from megatron_s2d.rollout.sglang import probes, scoring
from megatron_s2d.rollout.sglang.checks import Checks, Needs
from megatron_s2d.rollout.sglang.client import Expected, Outcome, Pool, Server
from megatron_s2d.rollout.sglang.collective import from_all, from_first, to_group
from megatron_s2d.rollout.sglang.control import PushFailed, Servers, finish
from megatron_s2d.rollout.sglang.protocol import BadReply, Decoder
from megatron_s2d.rollout.sglang.senders import (
    BroadcastSender,
    Bucket,
    DiskSender,
    Sender,
    TensorSender,
    refuse_remote,
)
from megatron_s2d.rollout.sglang.server import ServerProcess, is_healthy

Score = Callable[[Sequence[Sample]], Sequence[np.ndarray]]
_HEALTH_CHECKS = 3  # of a server in trouble, before it counts as one that hangs
_IDLE_SECONDS = 120  # for the last steps of requests that were aborted
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.5}


@dataclasses.dataclass(frozen=True)
class Push:
    """What a push measured."""

    seconds: float
    num_bytes: int  # of the weights, once
    gap: float  # largest difference of a probe's log-probability, over the servers


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
        needs: Needs = Needs(),
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
        self._chunks, self._spec, self._layout, self._score = chunks, spec, layout, score
        self._settings, self._max_tokens = settings.sglang, settings.max_batch_tokens
        self._directory, self._tokenizer, self._on_device = directory, tokenizer, on_device
        self._dtype = next(chunks[0].parameters()).dtype
        self._is_first = dist.get_rank() == 0
        self._tag = from_first(lambda: uuid.uuid4().hex[:12])  # an attached server may hold versions of another run
        self._processes: list[ServerProcess] = []
        self._disk = DiskSender(directory / "weights", spec, tokenizer)
        self._sender: Sender = {"disk": self._disk, "distributed": BroadcastSender(), "tensor": TensorSender()}[
            self._settings.sync
        ]
        self._last = Push(0.0, 0, 0.0)
        self._checks = Checks(
            spec,
            needs,
            self._settings,
            dtype=str(self._dtype).removeprefix("torch."),
            tokenizer=tokenizer,
            attached=bool(urls),
        )
        if urls and self._settings.sync != "disk":
            refuse_remote(urls)
        self._pool = Pool(urls or self._start_servers(), self._settings)
        try:
            self._update(self._pool.servers)
            with on_device():
                self._checks.rehearse(self._pool.servers, self._label, score, self._tolerance)
        except UserError:
            self.close()
            raise

    # ------------------------------------------------------------------ RolloutEngine

    def generate(self, requests: Sequence[Request], progress: ProgressCallback | None = None) -> list[Sample]:
        """One sample per request, in order, the same on all ranks of the replica.

        Raises ``UserError`` for a request that the model cannot serve, and where ``recoveries`` did not help.
        """
        requests = list(requests)
        check_requests(
            requests,
            vocab_size=self._spec.vocab_size,
            max_positions=self._spec.max_position_embeddings,
            has_tokenizer=self._tokenizer is not None,
        )
        self._check_same_requests(requests)
        samples: dict[int, Sample] = {}
        self._with_recoveries(lambda: self._ask(requests, samples, progress))
        answered = [samples[place] for place in range(len(requests))] if self._speaks else []
        return to_group(answered, self._layout.groups.mp)

    def score(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """log pi of every sample's response tokens at temperature 1, [length] float32 each (0 elsewhere), on all ranks.

        The same samples on all ranks. Raises ``UserError`` as ``generate`` does, and for samples of a temperature.
        """
        found = self._scored(samples, scoring.score)
        return [np.where(sample.response_mask, found[place], 0.0) for place, sample in enumerate(samples)]

    def top_tokens(
        self, samples: Sequence[Sample], k: int, layout: Layout | None = None
    ) -> list[scoring.TopTokens]:
        """The k likeliest tokens at every position of every sample, on all ranks of the replica that asks.

        Each model replica of ``layout`` (by default that of the served model) brings its own samples. Temperature and
        errors as in ``score``.
        """
        scoring.check_temperature(samples)
        group = (layout or self._layout).groups.mp
        found: dict[int, scoring.TopTokens] = {}

        def ask() -> list[str]:
            missing = [place for place in range(len(samples)) if place not in found]
            reasons, refused = [], ""
            if group.rank() == 0 and missing:
                part = [samples[place].token_ids for place in missing]
                try:
                    tokens, reasons = scoring.top_tokens(self._pool, part, self._label, self._spec.vocab_size, k)
                    found.update({missing[place]: value for place, value in tokens.items()})
                except UserError as error:
                    refused = str(error)
            return self._agree(refused, reasons)

        self._with_recoveries(ask)
        return to_group([found[place] for place in range(len(samples))] if group.rank() == 0 else [], group)

    def push(self, chunks: Sequence[Any], version: int) -> None:
        """Bring the weights of ``chunks`` to all servers and prove it; ``UserError`` where none holds them then."""
        self._chunks, self.version = chunks, version
        self._update(self._pool.servers)

    def metrics(self) -> dict[str, float]:
        """``push_gb_per_second`` and ``probe_gap`` (nats) of the last push."""
        last = self._last
        return {"push_gb_per_second": last.num_bytes / 1e9 / max(last.seconds, 1e-9), "probe_gap": last.gap}

    def close(self) -> None:
        """End the servers that were started here, and remove the weights that they read."""
        self._sender.forget()
        for process in self._processes:
            process.close()
        self._processes = []
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
            for server in self._pool.servers:
                server.problem = problems.get(server.url, "")
            return reasons

        self._with_recoveries(ask)
        return found

    @property
    def _speaks(self) -> bool:
        """Whether this rank sends the requests of its replica."""
        return self._layout.groups.mp.rank() == 0

    def _ask(self, requests: list[Request], samples: dict[int, Sample], progress: ProgressCallback | None) -> list[str]:
        """Add samples of requests that have none; returns reasons of failures, of all replicas and on all ranks."""
        outcome, refused = Outcome({}, {}), ""
        missing = [place for place in range(len(requests)) if place not in samples]
        if self._speaks and missing:
            expected = Expected(self._label, self.version, self._spec.vocab_size, self._tokenizer)
            try:
                outcome = self._pool.generate([requests[place] for place in missing], expected, progress)
            except UserError as error:
                refused = str(error)
        samples.update({missing[place]: sample for place, sample in outcome.samples.items()})
        return self._agree(refused, sorted(set(outcome.failures.values())))

    def _agree(self, refused: str, reasons: Sequence[str]) -> list[str]:
        """The reasons of all ranks for what failed, and the servers' problems; the refusal of one is that of all."""
        everyone = from_all((refused, self._pool.problems, reasons))
        for said, _, _ in everyone:
            if said:
                raise UserError(said)
        problems = {url: problem for _, found, _ in everyone for url, problem in found.items()}
        for server in self._pool.servers:
            server.problem = problems.get(server.url, "")
        return [reason for _, _, reasons in everyone for reason in reasons]

    def _check_same_requests(self, requests: list[Request]) -> None:
        group = self._layout.groups.mp
        if group.size() > 1:
            number = requests_digest(requests)
            extremes = torch.tensor([number, -number], device=device.device())
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
            if extremes.tolist() != [number, -number]:
                raise RuntimeError("the ranks of one model replica were given different requests")

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
        """Give the current weights to the servers that had a problem."""
        troubled = [server for server in self._pool.servers if server.problem]
        if troubled:
            self._update(troubled)

    def _update(self, servers: Sequence[Server]) -> None:
        """Push the current weights to ``servers``, starting those anew that are gone, until all hold them.

        ``recoveries`` times again; ``UserError`` where no server of the pool holds them then.
        """
        for _ in range(self._settings.recoveries + 1):
            reachable = self._reachable(servers)
            if reachable := self._checks.comparable(reachable):
                self._push_to(reachable)
            servers = [server for server in {*servers, *reachable} if server.problem]
            if not servers or not reachable:
                break
        if len(self._pool.problems) == len(self._pool.servers):
            reasons = "; ".join(f"{url}: {problem}" for url, problem in self._pool.problems.items())
            raise UserError(
                f"no SGLang server holds the current weights ({reasons}); see the logs in {self._directory}"
            )

    def _reachable(self, servers: Sequence[Server]) -> list[Server]:
        """Those of ``servers`` that answer, and servers of this run that were gone, or hung, and are started anew."""

        def look() -> tuple[list[bool], dict[int, str]]:
            answering = [
                (number >= len(self._processes) or self._processes[number].is_alive)
                and (not server.problem or is_healthy(server.url, checks=_HEALTH_CHECKS))
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

    @property
    def _tolerance(self) -> float:
        return self._settings.probe_tolerance or _TOLERANCES[self._dtype]

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
        try:
            gap = probes.gap(self._pool, server, self._spec, samples, expected, self._label)
        except (BadReply, UserError) as error:
            return float("nan"), str(error)
        if not gap <= self._tolerance:
            allowed = f"(allowed: {self._tolerance:g})"
            return gap, f"its log-probabilities differ from the trainer's by {gap:.1e} nats {allowed}"
        return gap, ""

    def _send(self, urls: list[str]) -> tuple[int, str]:
        """Send the current weights to idle servers; returns their bytes and, where it failed, why."""
        size, failure = 0, ""
        with Servers(urls if self._is_first else []) as servers:
            try:
                finish(servers.post("/pause_generation", {"mode": "abort"}))
                # A request that its sender gave up may still be running, and SGLang ends itself where it is asked to
                # forget the keys and values of old weights then: wait until nothing runs.
                finish(servers.post(f"/flush_cache?timeout={_IDLE_SECONDS}", {}))
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
                finish(servers.post("/continue_generation", {}))
            except PushFailed as error:
                failure = failure or str(error)
        return size, from_first(lambda: failure)
