"""A ``RolloutEngine`` whose responses come from SGLang servers.

Every call is collective over all ranks of the job. The first rank of each model replica sends the requests of its
replica and hands the samples on. When requests fail, servers are mended (``fleet.py``), and only the requests that have
no sample yet are sent again.

With ``ahead`` the responses that the next step needs are generated while this one trains. A push waits for them, or
interrupts them and lets them go on with the new weights.
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
from megatron_s2d.rollout.served.generation import GenerationResult, GenerationTask
from megatron_s2d.rollout.served.server_group import ServerGroup
from megatron_s2d.rollout.served.server_pool import ServerPool
from megatron_s2d.rollout.sglang.protocol import PartialRollout, ReplyContract


class PendingBatch:
    """What one ``generate`` asks for, and what there is of it. Samples are known on ranks that speak only."""

    def __init__(
        self, requests: Sequence[Request], num_groups: int | None, carried: Mapping[str, Sample | PartialRollout]
    ):
        self.requests, self.generation = list(requests), None
        groups = {request.group_id for request in self.requests}
        self.num_groups = len(groups) if num_groups is None else min(num_groups, len(groups))
        known = {place: carried[request.id] for place, request in enumerate(self.requests) if request.id in carried}
        self.samples = {place: found for place, found in known.items() if isinstance(found, Sample)}
        self.partials = {place: found for place, found in known.items() if isinstance(found, PartialRollout)}

    def complete_groups(self) -> list[int]:
        """Groups whose every response has a sample, in order."""
        open_groups = {request.group_id for place, request in enumerate(self.requests) if place not in self.samples}
        return [group for group in dict.fromkeys(r.group_id for r in self.requests) if group not in open_groups]

    def start(self, pool: ServerPool, expected: ReplyContract, progress: ProgressCallback | None = None) -> None:
        """Ask for what is missing, if anything."""
        missing = [place for place in range(len(self.requests)) if place not in self.samples]
        groups_left = self.num_groups - len(self.complete_groups())
        open_groups = {self.requests[place].group_id for place in missing}
        if groups_left > 0:
            self._places = missing
            self.generation = GenerationTask(
                pool,
                [self.requests[place] for place in missing],
                expected,
                partials={i: self.partials[place] for i, place in enumerate(missing) if place in self.partials},
                num_groups=groups_left if groups_left < len(open_groups) else None,
                progress=progress,
            )

    def collect(self) -> GenerationResult:
        """Wait for what was started, and take it; may raise ``UserError``."""
        if self.generation is None:
            return GenerationResult()
        generation, self.generation = self.generation, None
        outcome = generation.result()
        self.samples |= {self._places[i]: sample for i, sample in outcome.samples.items()}
        self.partials |= {self._places[i]: partial for i, partial in outcome.partials.items()}
        return outcome

    def split(self) -> tuple[list[Sample], dict[str, Sample | PartialRollout]]:
        """(samples of ``num_groups`` complete groups, what there is of the other groups by the request's id)."""
        chosen = set(self.complete_groups()[: self.num_groups])
        found = self.partials | self.samples
        return (
            [self.samples[place] for place, request in enumerate(self.requests) if request.group_id in chosen],
            {
                request.id: found[place]
                for place, request in enumerate(self.requests)
                if request.group_id not in chosen and place in found
            },
        )


class ServedEngine:
    """See the module. ``close`` ends the fleet."""

    def __init__(self, fleet: ServerGroup):
        self._server_group, self._spec, self._layout = fleet, fleet.spec, fleet.layout
        self._rollout, self._tokenizer = fleet.rollout, fleet.tokenizer
        self._begun: PendingBatch | None = None  # by ``begin``
        self._refused = ""  # what was begun and cannot be answered, whatever is tried
        self._carried: dict[str, Sample | PartialRollout] = {}  # by request, of groups that were not complete in time

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
        """With ``ahead``: have the requests answered from now on; the next ``generate`` must ask for the same."""
        if self._rollout.async_mode == "sync":
            return
        self._check(requests)
        self._begun = PendingBatch(requests, num_groups, self._carried)
        if self._sends_requests:
            self._begun.start(self._server_group.pool, self._reply_contract)

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
            work = PendingBatch(requests, num_groups, self._carried)
        self._server_group.wake_up()
        self._with_recoveries(lambda: self._generate_once(work, progress))
        samples, carried = work.split() if self._sends_requests else ([], {})
        if num_groups is not None:
            self._carried = carried
        return broadcast_in_group(samples, self._layout.groups.mp)

    def sleep(self) -> None:
        """With ``release_memory``: the servers give their GPU memory back until the next push."""
        self._server_group.sleep()

    def score(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """log pi of every sample's response tokens at temperature 1, [length] float32 each (0 elsewhere), on all ranks.

        The same samples on all ranks. Raises ``UserError`` as ``generate`` does, and for samples of a temperature.
        """
        found = self._scored(samples, scoring.score)
        return [np.where(sample.response_mask, found[place], 0.0) for place, sample in enumerate(samples)]

    def top_tokens(self, samples: Sequence[Sample], k: int, layout: Layout | None = None) -> list[scoring.TopTokens]:
        """The k likeliest tokens at every position of every sample, on all ranks of the replica that asks.

        Each model replica of ``layout`` (by default that of the served model) brings its own samples. Temperature and
        errors as in ``score``.
        """
        scoring.check_temperature(samples)
        group, fleet = (layout or self._layout).groups.mp, self._server_group
        found: dict[int, scoring.TopTokens] = {}

        def ask() -> list[str]:
            missing = [place for place in range(len(samples)) if place not in found]
            reasons, refused = [], ""
            if group.rank() == 0 and missing:
                part = [samples[place].token_ids for place in missing]
                try:
                    tokens, reasons = scoring.top_tokens(
                        fleet.pool, part, fleet.weight_version, self._spec.vocab_size, k
                    )
                    found.update({missing[place]: value for place, value in tokens.items()})
                except UserError as error:
                    refused = str(error)
            return self._agree(refused, reasons)

        self._with_recoveries(ask)
        return broadcast_in_group([found[place] for place in range(len(samples))] if group.rank() == 0 else [], group)

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Bring the weights of ``chunks`` to all servers and prove it; ``UserError`` where none holds them then."""
        self._pause_generation()
        self._server_group.update_weights(chunks, version)
        if self._begun is not None and self._sends_requests:
            self._begun.start(self._server_group.pool, self._reply_contract)

    def metrics(self) -> dict[str, float]:
        """``weight_sync/gb_per_s`` and ``weight_sync/max_log_prob_diff`` (nats) of the last push."""
        return self._server_group.metrics()

    def close(self) -> None:
        """End the servers that were started here, and remove the weights that they read."""
        if self._begun is not None and self._begun.generation is not None:
            self._begun.generation.interrupt()
        self._server_group.close()

    # ------------------------------------------------------------------ requests

    def _with_recoveries(self, ask: Callable[[], list[str]]) -> None:
        """Ask, and recover, until ``ask`` returns no reasons of failures; they are the same on all ranks."""
        for recovery in range(self._rollout.server.max_restarts + 1):
            reasons = ask()
            if not reasons:
                return
            if recovery < self._rollout.server.max_restarts:
                self._server_group.recover()
        raise UserError(
            f"the SGLang servers left some requests unanswered, after {self._rollout.server.max_restarts} recoveries too "
            f"({reasons[0]}); see the servers' logs in {self._server_group.directory}"
        )

    def _scored(self, samples: Sequence[Sample], score: Callable[..., tuple[dict[int, Any], list[str]]]) -> dict:
        """Place -> score; rank 0 asks for all."""
        scoring.check_temperature(samples)
        sequences = [sample.token_ids for sample in samples]
        found: dict[int, Any] = {}

        def ask_missing() -> tuple[dict[int, Any], list[str], dict[str, str]]:
            missing = [place for place in range(len(samples)) if place not in found]
            part = [sequences[place] for place in missing]
            scores, reasons = score(
                self._server_group.pool, part, self._server_group.weight_version, self._spec.vocab_size
            )
            return {missing[place]: value for place, value in scores.items()}, reasons, self._server_group.pool.problems

        def ask() -> list[str]:
            scores, reasons, problems = broadcast_from_rank0(ask_missing)
            found.update(scores)
            self._server_group.pool.mark_failed(problems)
            return reasons

        self._with_recoveries(ask)
        return found

    @property
    def _sends_requests(self) -> bool:
        """Whether this rank sends the requests of its replica."""
        return self._layout.groups.mp.rank() == 0

    @property
    def _reply_contract(self) -> ReplyContract:
        return ReplyContract(self._server_group.weight_version, self.version, self._spec.vocab_size, self._tokenizer)

    def _generate_once(self, work: PendingBatch, progress: ProgressCallback | None) -> list[str]:
        """Add samples to ``work``; returns reasons of failures, of all replicas and on all ranks."""
        outcome, refused = GenerationResult(), self._refused
        if self._sends_requests and not refused:
            try:
                if work.generation is None:
                    work.start(self._server_group.pool, self._reply_contract, progress)
                outcome = work.collect()
            except UserError as error:
                refused = str(error)
        reasons = sorted(set(outcome.failures.values())) or ["no answer"] if self._is_incomplete(work) else []
        return self._agree(refused, reasons)

    def _agree(self, refused: str, reasons: Sequence[str]) -> list[str]:
        """The reasons of all ranks for what failed, and the servers' problems; the refusal of one is that of all."""
        everyone = all_gather_object((refused, self._server_group.pool.problems, reasons))
        for said, _, _ in everyone:
            if said:
                raise UserError(said)
        self._server_group.pool.mark_failed(
            {url: problem for _, found, _ in everyone for url, problem in found.items()}
        )
        return [reason for _, _, reasons in everyone for reason in reasons]

    def _is_incomplete(self, work: PendingBatch) -> bool:
        return self._sends_requests and len(work.complete_groups()) < work.num_groups

    def _pause_generation(self) -> None:
        """Before a push: responses that were begun are complete, or interrupted; no request is in flight."""
        if self._begun is None:
            return
        if self._begun.generation is not None:
            if self._rollout.async_mode == "partial_rollout":
                self._begun.generation.interrupt()
            try:
                self._begun.collect()  # what failed is asked for again
            except UserError as error:
                self._refused = str(error)
        pool = self._server_group.pool
        pool.mark_failed({url: problem for found in all_gather_object(pool.problems) for url, problem in found.items()})

    def _check(self, requests: Sequence[Request]) -> None:
        check_requests(
            requests,
            vocab_size=self._spec.vocab_size,
            max_positions=self._spec.max_position_embeddings,
            has_tokenizer=self._tokenizer is not None,
        )
        self._check_same_requests(list(requests))

    def _check_same_requests(self, requests: list[Request]) -> None:
        if not is_same_on_all_ranks(requests_digest(requests), self._layout.groups.mp):
            raise RuntimeError("the ranks of one model replica were given different requests")
