"""A ``RolloutEngine`` whose responses come from inference servers.

Every call is collective over all ranks of the job. The first rank of each model replica sends the requests of its
replica and broadcasts the samples. When requests fail, servers are repaired (``server_group.py``), and only the
requests that have no sample yet are sent again.

``generate`` answers the requests of one call. ``start`` and ``wait`` run episodes beside the trainer: what is started,
taken and given up, and whether a weight update waits for requests or interrupts them, the rollout buffer decides.
Shapes: s sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
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
from megatron_s2d.rollout.served.episodes import EpisodeTask
from megatron_s2d.rollout.served.generation import generate_all
from megatron_s2d.rollout.served.replies import ReplyContract
from megatron_s2d.rollout.served.server_group import ServerGroup


class ServedEngine:
    """Generates and scores with the servers of a ``ServerGroup``; ``close`` ends them."""

    def __init__(self, group: ServerGroup):
        self._server_group, self._spec, self._layout = group, group.spec, group.layout
        self._rollout, self._tokenizer = group.rollout, group.tokenizer
        self._background: EpisodeTask | None = None  # on ranks that send requests, once something was started

    @property
    def version(self) -> int:
        """Of the weights that the servers hold."""
        return self._server_group.version

    @property
    def urls(self) -> list[str]:
        """Addresses of the servers."""
        return [server.url for server in self._server_group.pool.servers]

    # ------------------------------------------------------------------ RolloutEngine

    def generate(self, requests: Sequence[Request], progress: ProgressCallback | None = None) -> list[Sample]:
        """See ``RolloutEngine``; the same on all ranks of the replica.

        Raises ``UserError`` for a request that the model cannot serve, and if ``max_restarts`` did not help.
        """
        self._check(requests)
        self._server_group.wake_up()
        samples: dict[int, Sample] = {}
        self._with_recovery(lambda: self._attempt_batch(requests, samples, progress))
        own = [samples[index] for index in range(len(requests))] if self._sends_requests else []
        return broadcast_samples(own, self._layout)

    # ------------------------------------------------------------------ EpisodeRunner

    def run[Result](self, episodes: Sequence[Episode[Result]]) -> list[Result]:
        """See ``EpisodeRunner``; collective over all ranks of the job."""
        self._server_group.wake_up()
        task = self._new_task() if self._sends_requests else None
        try:
            if task is not None:
                task.add({str(number): episode for number, episode in enumerate(episodes)})
            results = self._wait(task, lambda ended: len(ended) == len(episodes))
            return [results[str(number)] for number in range(len(episodes))] if task is not None else []
        finally:
            if task is not None:
                task.close()

    # ------------------------------------------------------------------ BackgroundRunner

    def start(self, episodes: Mapping[str, Episode[Any]], priority: int = 0) -> None:
        """See ``BackgroundRunner``."""
        if self._sends_requests:
            self._background = self._background or self._new_task()
            self._background.add(episodes, priority)

    def wait(self, is_enough: Callable[[Set[str]], bool]) -> dict[str, Any]:
        """See ``BackgroundRunner``; collective over all ranks of the job."""
        self._server_group.wake_up()
        return self._wait(self._background, is_enough)

    def cancel(self, names: Sequence[str]) -> None:
        """See ``BackgroundRunner``."""
        if self._background is not None and names:
            self._background.cancel(names)

    def pause(self, *, interrupt: bool) -> None:
        """See ``BackgroundRunner``; collective over all ranks of the job."""
        if self._background is not None:
            self._background.pause(interrupt=interrupt)
        if any_rank(bool(self._server_group.pool.problems)):
            self._mark_failed(all_gather_json(self._server_group.pool.problems))

    def measurements(self) -> dict[str, float]:
        """See ``BackgroundRunner``."""
        if self._background is None:
            return {}
        idle_seconds, num_discarded_tokens = self._background.take_measurements()
        return {
            "rollout/producer_wait_seconds": idle_seconds,
            "rollout/discarded_tokens": float(num_discarded_tokens),
        }

    def _new_task(self) -> EpisodeTask:
        return EpisodeTask(self._server_group.pool, self._reply_contract, self._check_request)

    def _wait(self, task: EpisodeTask | None, is_enough: Callable[[Set[str]], bool]) -> dict[str, Any]:
        """Let the episodes of ``task`` run until ``is_enough``, and take what has ended; {} without a task."""
        try:
            self._with_recovery(lambda: self._attempt_episodes(task, is_enough))
        except UserError:
            if task is not None and task.error is not None:
                raise task.error from None
            raise
        return {} if task is None else task.take()

    def _attempt_episodes(self, task: EpisodeTask | None, is_enough: Callable[[Set[str]], bool]) -> list[str]:
        """Let the episodes run; return reasons why some cannot go on, of all replicas and on all ranks."""
        refusal, reasons = "", []
        if task is not None:
            task.resume(self._reply_contract)
            reasons = task.wait(is_enough)
            if task.error is not None:
                refusal = str(task.error) or type(task.error).__name__
        return self._gather_reasons(refusal, reasons)

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

        def request(asked: Sequence[Sample]) -> tuple[dict[int, np.ndarray], list[str]]:
            sequences = [sample.token_ids for sample in asked]
            return scoring.score(group.pool, sequences, scoring.starts_of(asked), group.weight_version)

        log_probs = self._score_own(samples, layout or self._layout, request, lambda values: [values])
        return [np.where(sample.response_mask, *values, 0.0) for sample, values in zip(samples, log_probs, strict=True)]

    def top_tokens(self, samples: Sequence[Sample], k: int, layout: Layout | None = None) -> list[scoring.TopTokens]:
        """Return the k likeliest tokens at the response tokens of every sample, on all ranks of the replica that asks.

        Samples, layout, temperature and errors as in ``score``.
        """
        group = self._server_group

        def request(asked: Sequence[Sample]) -> tuple[dict[int, scoring.TopTokens], list[str]]:
            sequences, starts = [sample.token_ids for sample in asked], scoring.starts_of(asked)
            return scoring.top_tokens(group.pool, sequences, starts, group.weight_version, self._spec.vocab_size, k)

        arrays = self._score_own(
            samples, layout or self._layout, request, lambda top: [top.ids, top.log_probs, top.log_tail]
        )
        return [scoring.TopTokens(*of_sample) for of_sample in arrays]

    def _score_own[Score](
        self,
        samples: Sequence[Sample],
        layout: Layout,
        request: Callable[[Sequence[Sample]], tuple[dict[int, Score], list[str]]],
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
                    found, reasons = request([samples[index] for index in missing])
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
        if self._background is not None:
            self._background.pause(interrupt=False)  # at once after ``pause``
        self._server_group.update_weights(chunks, version)
        if self._background is not None:
            self._background.resume(self._reply_contract)

    def metrics(self) -> dict[str, float]:
        """Return ``weight_sync/gb_per_s`` and ``weight_sync/max_log_prob_diff`` (nats) of the last weight update."""
        return self._server_group.metrics()

    def close(self) -> None:
        """End the servers that were started here, and remove the weights that they read."""
        if self._background is not None:
            self._background.close()
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

    def _attempt_batch(
        self, requests: Sequence[Request], samples: dict[int, Sample], progress: ProgressCallback | None
    ) -> list[str]:
        """Add to ``samples``, by index; return reasons of failures, of all replicas and on all ranks."""
        refusal, reasons = "", []
        missing = [index for index in range(len(requests)) if index not in samples]
        if self._sends_requests and missing:
            try:
                result = generate_all(
                    self._server_group.pool, [requests[index] for index in missing], self._reply_contract, progress
                )
                samples.update({missing[i]: sample for i, sample in result.samples.items()})
                reasons = sorted(set(result.failures.values()))
            except UserError as error:
                refusal = str(error)
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
