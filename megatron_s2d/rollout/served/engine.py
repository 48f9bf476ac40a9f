"""A ``RolloutEngine`` whose responses come from inference servers.

Every call is collective over all ranks of the job. The first rank of each model replica sends the requests of its
replica and broadcasts the samples. When requests fail, servers are repaired (``server_group.py``), and only the
requests that have no sample yet are sent again.

With an ``async_mode`` other than ``sync`` the responses of the next step are generated while this one trains. A weight
update waits for them (``one_step_off``), or interrupts them and continues them with the new weights
(``partial_rollout``). Shapes: s sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.errors import UserError
from megatron_s2d.parallel.collectives import (
    all_gather_object,
    broadcast_from_rank0,
    broadcast_in_group,
    is_same_on_all_ranks,
)
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import ProgressCallback, Request, check_requests, requests_digest
from megatron_s2d.rollout.served import scoring
from megatron_s2d.rollout.served.backend import PartialRollout
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

    def start(self, pool: ServerPool, contract: ReplyContract, progress: ProgressCallback | None = None) -> None:
        """Request what is missing, if anything."""
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
            )

    def collect(self) -> GenerationResult:
        """Wait for the generation that was started, and take its result; may raise ``UserError``."""
        if self.generation is None:
            return GenerationResult()
        generation, self.generation = self.generation, None
        result = generation.result()
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


class ServedEngine:
    """Generates and scores with the servers of a ``ServerGroup``; ``close`` ends them."""

    def __init__(self, group: ServerGroup):
        self._server_group, self._spec, self._layout = group, group.spec, group.layout
        self._rollout, self._tokenizer = group.rollout, group.tokenizer
        self._submitted: PendingBatch | None = None
        self._refusal = ""  # why the submitted requests can never be answered
        # By request id, of groups that were not complete in time.
        self._carried: dict[str, Sample | PartialRollout] = {}

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
        """Start to answer ``requests``, unless ``async_mode`` is ``sync``; the next ``generate`` must ask for them."""
        if self._rollout.async_mode == "sync":
            return
        self._check(requests)
        self._submitted = PendingBatch(requests, num_groups, self._carried)
        if self._sends_requests:
            self._submitted.start(self._server_group.pool, self._reply_contract)

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
        if self._submitted is not None:
            batch, self._submitted = self._submitted, None
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
        return broadcast_in_group(samples, self._layout.groups.mp)

    def sleep(self) -> None:
        """Release the servers' GPU memory until the next weight update, if they support it."""
        self._server_group.sleep()

    def score(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Return log pi of every sample's response tokens at temperature 1, [s] float32 each (0 elsewhere).

        The same samples on all ranks. Raises ``UserError`` as ``generate`` does, and for samples of a temperature.
        """
        scoring.check_temperature(samples)
        group = self._server_group
        log_probs: dict[int, np.ndarray] = {}

        def score_missing() -> tuple[dict[int, np.ndarray], list[str], dict[str, str]]:
            missing = [index for index in range(len(samples)) if index not in log_probs]
            sequences = [samples[index].token_ids for index in missing]
            scores, reasons = scoring.score(group.pool, sequences, group.weight_version)
            return {missing[i]: values for i, values in scores.items()}, reasons, group.pool.problems

        def attempt() -> list[str]:
            scores, reasons, problems = broadcast_from_rank0(score_missing)
            log_probs.update(scores)
            group.pool.mark_failed(problems)
            return reasons

        self._with_recovery(attempt)
        return [np.where(sample.response_mask, log_probs[index], 0.0) for index, sample in enumerate(samples)]

    def top_tokens(self, samples: Sequence[Sample], k: int, layout: Layout | None = None) -> list[scoring.TopTokens]:
        """Return the k likeliest tokens at every position of every sample, on all ranks of the replica that asks.

        Each model replica of ``layout`` (by default that of the served model) brings its own samples. Temperature and
        errors as in ``score``.
        """
        scoring.check_temperature(samples)
        mp_group, servers = (layout or self._layout).groups.mp, self._server_group
        top: dict[int, scoring.TopTokens] = {}

        def attempt() -> list[str]:
            missing = [index for index in range(len(samples)) if index not in top]
            refusal = ""
            reasons: list[str] = []
            if mp_group.rank() == 0 and missing:
                sequences = [samples[index].token_ids for index in missing]
                try:
                    tokens, reasons = scoring.top_tokens(
                        servers.pool, sequences, servers.weight_version, self._spec.vocab_size, k
                    )
                    top.update({missing[i]: value for i, value in tokens.items()})
                except UserError as error:
                    refusal = str(error)
            return self._gather_reasons(refusal, reasons)

        self._with_recovery(attempt)
        is_first = mp_group.rank() == 0
        return broadcast_in_group([top[index] for index in range(len(samples))] if is_first else [], mp_group)

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Send the weights of ``chunks`` to all servers and prove it; ``UserError`` if none holds them then."""
        self._pause_generation()
        self._server_group.update_weights(chunks, version)
        if self._submitted is not None and self._sends_requests:
            self._submitted.start(self._server_group.pool, self._reply_contract)

    def metrics(self) -> dict[str, float]:
        """Return ``weight_sync/gb_per_s`` and ``weight_sync/max_log_prob_diff`` (nats) of the last weight update."""
        return self._server_group.metrics()

    def close(self) -> None:
        """End the servers that were started here, and remove the weights that they read."""
        if self._submitted is not None and self._submitted.generation is not None:
            self._submitted.generation.interrupt()
        self._server_group.close()

    # ------------------------------------------------------------------ requests

    @property
    def _sends_requests(self) -> bool:
        """Whether this rank sends the requests of its replica."""
        return self._layout.groups.mp.rank() == 0

    @property
    def _reply_contract(self) -> ReplyContract:
        return ReplyContract(self._server_group.weight_version, self.version, self._spec.vocab_size, self._tokenizer)

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
        """Return all ranks' reasons of failures and share the servers' problems; raise a refusal of any rank on all."""
        everyone = all_gather_object((refusal, self._server_group.pool.problems, reasons))
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
        """Complete or interrupt submitted responses before a weight update; no request is in flight then."""
        if self._submitted is None:
            return
        if self._submitted.generation is not None:
            if self._rollout.async_mode == "partial_rollout":
                self._submitted.generation.interrupt()
            try:
                self._submitted.collect()  # failed requests are sent again
            except UserError as error:
                self._refusal = str(error)
        self._mark_failed(all_gather_object(self._server_group.pool.problems))

    def _check(self, requests: Sequence[Request]) -> None:
        check_requests(
            requests,
            vocab_size=self._spec.vocab_size,
            max_positions=self._spec.max_position_embeddings,
            has_tokenizer=self._tokenizer is not None,
        )
        if not is_same_on_all_ranks(requests_digest(requests), self._layout.groups.mp):
            raise RuntimeError("the ranks of one model replica have different requests")
