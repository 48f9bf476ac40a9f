"""A ``RolloutEngine`` whose responses come from inference servers.

Every call is collective over all ranks of the job. The first rank of each model replica sends the requests of its
replica and broadcasts the samples. When requests fail, servers are repaired (``server_group.py``), and only the
requests that have no sample yet are sent again.

With an ``async_mode`` other than ``sync`` the responses of the next step are generated while this one trains. A weight
update waits for them (``one_step_off``), or interrupts them and continues them with the new weights
(``partial_rollout``). Shapes: s sequence length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.data.sample_bytes import decode_arrays, encode_arrays
from megatron_s2d.data.sample_exchange import broadcast_samples
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.collectives import all_gather_json, any_rank, is_same_on_all_ranks
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import ProgressCallback, Request, check_requests, requests_digest
from megatron_s2d.rollout.sampling_client import Episode
from megatron_s2d.rollout.served import scoring
from megatron_s2d.rollout.served.backend import PartialRollout
from megatron_s2d.rollout.served.episodes import EpisodeTask
from megatron_s2d.rollout.served.generation import GenerationResult, GenerationTask
from megatron_s2d.rollout.served.replies import ReplyContract
from megatron_s2d.rollout.served.server_group import ServerGroup
from megatron_s2d.rollout.served.server_pool import ServerPool


class PendingBatch:
    """The requests of one ``generate`` and its samples so far; only ranks that send requests have samples."""

    def __init__(
        self, requests: Sequence[Request], num_groups: int | None, carried: Mapping[str, Sample | PartialRollout]
    ):
        self.requests = list(requests)
        self.generation: GenerationTask | None = None
        self.busy: list[tuple[float, float]] = []  # time.monotonic() of its generations that have ended
        self.num_discarded_tokens = 0  # of interrupted responses that started again
        groups = {request.group_id for request in self.requests}
        self.num_groups = len(groups) if num_groups is None else min(num_groups, len(groups))
        earlier = {index: carried[request.id] for index, request in enumerate(self.requests) if request.id in carried}
        self.samples = {index: response for index, response in earlier.items() if isinstance(response, Sample)}
        self.partials = {index: response for index, response in earlier.items() if isinstance(response, PartialRollout)}
        self._requested: list[int] = []  # indices of the requests that ``generation`` sends

    def complete_groups(self) -> list[str]:
        """Return the groups whose every response has a sample, in order."""
        open_groups = {request.group_id for index, request in enumerate(self.requests) if index not in self.samples}
        return [group for group in dict.fromkeys(r.group_id for r in self.requests) if group not in open_groups]

    def start(
        self,
        pool: ServerPool,
        contract: ReplyContract,
        progress: ProgressCallback | None = None,
        *,
        share: int = 1,
    ) -> None:
        """Request what is missing, if anything. share: batches that are in flight together."""
        missing = [index for index in range(len(self.requests)) if index not in self.samples]
        num_missing_groups = self.num_groups - len(self.complete_groups())
        open_groups = {self.requests[index].group_id for index in missing}
        if num_missing_groups > 0:
            self._requested = missing
            self.generation = GenerationTask(
                pool,
                [self.requests[index] for index in missing],
                contract,
                partials={i: self.partials[index] for i, index in enumerate(missing) if index in self.partials},
                num_groups=num_missing_groups if num_missing_groups < len(open_groups) else None,
                progress=progress,
                concurrency=max(1, pool.concurrency // share),
            )

    def collect(self) -> GenerationResult:
        """Wait for the generation that was started, and take its result; may raise ``UserError``."""
        if self.generation is None:
            return GenerationResult()
        generation, self.generation = self.generation, None
        try:
            result = generation.result()
        finally:
            self.busy.append((generation.started, generation.ended))
            self.num_discarded_tokens += generation.num_discarded_tokens
        self.samples |= {self._requested[i]: sample for i, sample in result.samples.items()}
        self.partials |= {self._requested[i]: partial for i, partial in result.partials.items()}
        return result

    def split(self) -> tuple[list[Sample], dict[str, Sample | PartialRollout]]:
        """Return (samples of ``num_groups`` complete groups, responses of other groups so far by request id)."""
        selected = set(self.complete_groups()[: self.num_groups])
        responses = self.partials | self.samples
        return (
            [self.samples[index] for index, request in enumerate(self.requests) if request.group_id in selected],
            {
                request.id: responses[index]
                for index, request in enumerate(self.requests)
                if request.group_id not in selected and index in responses
            },
        )


def uncovered_seconds(start: float, stop: float, intervals: Sequence[tuple[float, float]]) -> float:
    """Return how much of [start, stop] none of ``intervals`` covers."""
    uncovered, until = 0.0, start
    for first, last in sorted(intervals):
        uncovered += max(0.0, min(first, stop) - until)
        until = min(stop, max(until, last))
    return uncovered + max(0.0, stop - until)


class ServedEngine:
    """Generates and scores with the servers of a ``ServerGroup``; ``close`` ends them."""

    def __init__(self, group: ServerGroup):
        self._server_group, self._spec, self._layout = group, group.spec, group.layout
        self._rollout, self._tokenizer = group.rollout, group.tokenizer
        self._submitted: list[PendingBatch] = []  # in the order of the steps that will take them
        self._measured_from = time.monotonic()  # end of the last ``generate``
        self._refusal = ""  # why the submitted requests can never be answered
        # By request id, of groups that were not complete in time.
        self._asynchrony: dict[str, float] = {}  # metrics
        self._carried: dict[str, Sample | PartialRollout] = {}
        self._episodes: EpisodeTask | None = None  # on ranks that send requests
        self._has_episodes = False  # likewise, on all ranks

    @property
    def version(self) -> int:
        """Of the weights that the servers hold."""
        return self._server_group.version

    @property
    def urls(self) -> list[str]:
        """Addresses of the servers."""
        return [server.url for server in self._server_group.pool.servers]

    # ------------------------------------------------------------------ RolloutEngine

    def submit(self, requests: Sequence[Request], num_groups: int | None = None) -> None:
        """Start to answer ``requests``, unless ``async_mode`` is ``sync``; ``generate`` must ask for them in order."""
        if self._rollout.async_mode == "sync":
            return
        self._check(requests)
        self._submitted.append(PendingBatch(requests, num_groups, self._carried))
        if self._sends_requests:
            self._start(self._submitted[-1])

    def _start(self, batch: PendingBatch) -> None:
        batch.start(self._server_group.pool, self._reply_contract, share=max(1, self._rollout.staleness))

    def generate(
        self,
        requests: Sequence[Request],
        progress: ProgressCallback | None = None,
        *,
        num_groups: int | None = None,
    ) -> list[Sample]:
        """See ``RolloutEngine``; the same on all ranks of the replica.

        Raises ``UserError`` for a request that the model cannot serve, and if ``max_restarts`` did not help.
        """
        if self._submitted:
            batch = self._submitted.pop(0)
            if [request.id for request in batch.requests] != [request.id for request in requests]:
                raise RuntimeError("other requests were submitted")
        else:
            self._check(requests)
            batch = PendingBatch(requests, num_groups, self._carried)
        self._server_group.wake_up()
        self._with_recovery(lambda: self._attempt_batch(batch, progress))
        samples, carried = batch.split() if self._sends_requests else ([], {})
        if num_groups is not None:
            self._carried = carried
        self._measure(batch)
        return broadcast_samples(samples, self._layout)

    # ------------------------------------------------------------------ EpisodeRunner

    def run[Result](self, episodes: Sequence[Episode[Result]]) -> list[Result]:
        """See ``EpisodeRunner``; collective over all ranks of the job."""
        self.start(episodes)
        return self.finish()

    def start(self, episodes: Sequence[Episode[Any]]) -> None:
        """Start ``episodes``, which run beside the trainer until ``finish``; weight updates may come in between.

        An update waits for the requests in flight, or interrupts and continues them (``partial_rollout``).
        """
        self._server_group.wake_up()
        self._has_episodes = True
        if self._sends_requests:
            self._episodes = EpisodeTask(self._server_group.pool, self._reply_contract, episodes, self._check_request)

    def finish(self) -> list[Any]:
        """Wait for the episodes and return their results; see ``run``."""
        task, self._episodes, self._has_episodes = self._episodes, None, False
        try:
            self._with_recovery(lambda: self._attempt_episodes(task))
            return [] if task is None else task.results()
        except UserError:
            if task is not None and task.error is not None:
                raise task.error from None
            raise
        finally:
            if task is not None:
                task.close()

    def _attempt_episodes(self, task: EpisodeTask | None) -> list[str]:
        """Let the episodes run; return reasons why some cannot go on, of all replicas and on all ranks."""
        refusal, reasons = "", []
        if task is not None:
            task.resume(self._reply_contract)
            reasons = task.wait()
            if task.error is not None:
                refusal = str(task.error) or type(task.error).__name__
        return self._gather_reasons(refusal, reasons)

    def _measure(self, batch: PendingBatch) -> None:
        """Set the metrics of asynchronous generation; ``batch`` was just taken."""
        if self._rollout.async_mode == "sync" or not self._sends_requests:
            return
        now = time.monotonic()
        busy = [*batch.busy]
        for other in self._submitted:
            busy += other.busy
            if other.generation is not None:
                busy.append((other.generation.started, min(other.generation.ended, now)))
        self._asynchrony = {
            "rollout/producer_wait_seconds": uncovered_seconds(self._measured_from, now, busy),
            "rollout/discarded_tokens": float(batch.num_discarded_tokens),
        }
        self._measured_from = now

    def _check_request(self, request: Request) -> None:
        self._check_fit([request])

    # ------------------------------------------------------------------ RolloutEngine, continued

    def sleep(self) -> None:
        """Release the servers' GPU memory until the next weight update, if they support it."""
        self._server_group.sleep()

    def score(self, samples: Sequence[Sample], layout: Layout | None = None) -> list[np.ndarray]:
        """Return log pi of every sample's response tokens at temperature 1, [s] float32 each (0 elsewhere).

        Each model replica of ``layout`` (by default that of the served model) brings its own samples, and its ranks get
        their scores. Raises ``UserError`` as ``generate`` does, and for samples of a temperature.
        """
        group = self._server_group

        def request(sequences: Sequence[np.ndarray]) -> tuple[dict[int, np.ndarray], list[str]]:
            return scoring.score(group.pool, sequences, group.weight_version)

        log_probs = self._score_own(samples, layout or self._layout, request, lambda values: [values])
        return [np.where(sample.response_mask, *values, 0.0) for sample, values in zip(samples, log_probs, strict=True)]

    def top_tokens(self, samples: Sequence[Sample], k: int, layout: Layout | None = None) -> list[scoring.TopTokens]:
        """Return the k likeliest tokens at every position of every sample, on all ranks of the replica that asks.

        Samples, layout, temperature and errors as in ``score``.
        """
        group = self._server_group

        def request(sequences: Sequence[np.ndarray]) -> tuple[dict[int, scoring.TopTokens], list[str]]:
            return scoring.top_tokens(group.pool, sequences, group.weight_version, self._spec.vocab_size, k)

        arrays = self._score_own(
            samples, layout or self._layout, request, lambda top: [top.ids, top.log_probs, top.log_tail]
        )
        return [scoring.TopTokens(*of_sample) for of_sample in arrays]

    def _score_own[Score](
        self,
        samples: Sequence[Sample],
        layout: Layout,
        request: Callable[[Sequence[np.ndarray]], tuple[dict[int, Score], list[str]]],
        arrays_of: Callable[[Score], list[np.ndarray]],
    ) -> list[list[np.ndarray]]:
        """Request what is missing until every replica has the arrays of its samples; the same on a replica's ranks."""
        scoring.check_temperature(samples)
        scores: dict[int, Score] = {}

        def attempt() -> list[str]:
            missing = [index for index in range(len(samples)) if index not in scores]
            refusal = ""
            reasons: list[str] = []
            if layout.is_replica_root and missing:
                try:
                    found, reasons = request([samples[index].token_ids for index in missing])
                    scores.update({missing[i]: score for i, score in found.items()})
                except UserError as error:
                    refusal = str(error)
            return self._gather_reasons(refusal, reasons)

        self._with_recovery(attempt)
        own = [arrays_of(scores[index]) for index in range(len(samples))] if layout.is_replica_root else []
        if layout.host_replica.size == 1 or not samples:
            return own
        flat = [array for arrays in own for array in arrays]
        data = layout.host_replica.broadcast(encode_arrays(flat) if layout.is_replica_root else None, 0)
        arrays = decode_arrays(data)
        width = len(arrays) // len(samples)
        return [arrays[start : start + width] for start in range(0, len(arrays), width)]

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Send the weights of ``chunks`` to all servers and prove it; ``UserError`` if none holds them then."""
        self._pause_generation()
        self._server_group.update_weights(chunks, version)
        if self._episodes is not None:
            self._episodes.resume(self._reply_contract)
        if self._sends_requests:
            for batch in self._submitted:
                self._start(batch)

    def metrics(self) -> dict[str, float]:
        """Return ``weight_sync/gb_per_s`` and ``weight_sync/max_log_prob_diff`` (nats) of the last weight update.

        With an ``async_mode``: also how long the servers had no request of this rank between the last two calls of
        ``generate``, and the tokens of interrupted responses that started again.
        """
        return self._server_group.metrics() | self._asynchrony

    def close(self) -> None:
        """End the servers that were started here, and remove the weights that they read."""
        for batch in self._submitted:
            if batch.generation is not None:
                batch.generation.interrupt()
        if self._episodes is not None:
            self._episodes.close()
        self._server_group.close()

    # ------------------------------------------------------------------ requests

    @property
    def _sends_requests(self) -> bool:
        """Whether this rank sends the requests of its replica."""
        return self._layout.is_replica_root

    @property
    def _reply_contract(self) -> ReplyContract:
        routed_spec = self._spec if self._server_group.requirements.routed_experts else None
        weight_version = self._server_group.weight_version
        return ReplyContract(weight_version, self.version, self._spec.vocab_size, self._tokenizer, routed_spec)

    def _with_recovery(self, attempt: Callable[[], list[str]]) -> None:
        """Call ``attempt``, and repair servers, until it returns no reasons of failures; the same on all ranks."""
        max_restarts = self._rollout.server.max_restarts
        for recovery in range(max_restarts + 1):
            reasons = attempt()
            if not reasons:
                return
            if recovery < max_restarts:
                self._server_group.recover()
        raise UserError(
            f"the servers left some requests unanswered, after {max_restarts} recoveries too ({reasons[0]}); see the "
            f"servers' logs in {self._server_group.directory}"
        )

    def _attempt_batch(self, batch: PendingBatch, progress: ProgressCallback | None) -> list[str]:
        """Add samples to ``batch``; return reasons of failures, of all replicas and on all ranks."""
        result, refusal = GenerationResult(), self._refusal
        if self._sends_requests and not refusal:
            try:
                if batch.generation is None:
                    batch.start(self._server_group.pool, self._reply_contract, progress)
                result = batch.collect()
            except UserError as error:
                refusal = str(error)
        is_incomplete = self._sends_requests and len(batch.complete_groups()) < batch.num_groups
        reasons = sorted(set(result.failures.values())) or ["no answer"] if is_incomplete else []
        return self._gather_reasons(refusal, reasons)

    def _gather_reasons(self, refusal: str, reasons: Sequence[str]) -> list[str]:
        """Return all ranks' reasons of failures and share the servers' problems; raise a refusal of any rank on all.

        Without any of them on any rank nothing but that is communicated.
        """
        if not any_rank(bool(refusal or reasons or self._server_group.pool.problems)):
            return []
        everyone = all_gather_json((refusal, self._server_group.pool.problems, reasons))
        for message, _, _ in everyone:
            if message:
                raise UserError(message)
        self._mark_failed([problems for _, problems, _ in everyone])
        return [reason for _, _, reasons in everyone for reason in reasons]

    def _mark_failed(self, problems_by_rank: Sequence[Mapping[str, str]]) -> None:
        self._server_group.pool.mark_failed(
            {url: problem for problems in problems_by_rank for url, problem in problems.items()}
        )

    def _pause_generation(self) -> None:
        """Complete or interrupt requests before a weight update; none is in flight then."""
        if self._episodes is not None:
            self._episodes.pause(interrupt=self._rollout.async_mode == "partial_rollout")
        if not self._submitted and not self._has_episodes:
            return
        running = [batch for batch in self._submitted if batch.generation is not None]
        if self._rollout.async_mode == "partial_rollout":
            for batch in running:
                batch.generation.interrupt()
        for batch in running:
            try:
                batch.collect()  # failed requests are sent again
            except UserError as error:
                self._refusal = str(error)
        if any_rank(bool(self._server_group.pool.problems)):
            self._mark_failed(all_gather_json(self._server_group.pool.problems))

    def _check(self, requests: Sequence[Request]) -> None:
        self._check_fit(requests)
        if not is_same_on_all_ranks(requests_digest(requests), self._layout.groups.mp):
            raise RuntimeError("the ranks of one model replica have different requests")

    def _check_fit(self, requests: Sequence[Request]) -> None:
        check_requests(
            requests,
            vocab_size=self._spec.vocab_size,
            max_positions=self._spec.max_position_embeddings,
            has_tokenizer=self._tokenizer is not None,
        )
