"""The responses that are decoded together. Finished ones leave; waiting requests join between two tokens.

Requests that join together form a cohort: their responses are equally long as long as they run. Rows of all cohorts
share one cache, in which they end at the same column, and one forward pass per token. With a single cohort this is
decoding of a batch from its first to its last token.

The batch shrinks when a quarter of its rows has ended, and only then rows join (or when there is none): moving keys and
values costs about as much memory traffic as one step's attention. Every method is collective over the replica, whose
ranks have the same rows.

Shapes: a active requests of all cohorts, s response positions, n positions of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Sequence

import torch

from megatron_s2d.models.kv_cache import KeyValueCache
from megatron_s2d.models.routing_replay import RoutingReplay
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import Decoder, Request
from megatron_s2d.rollout.megatron.batching import ActiveRows, PromptTable, Responses, TokenBlock
from megatron_s2d.rollout.megatron.passes import ModelPasses
from megatron_s2d.rollout.megatron.route_recorder import RouteRecorder
from megatron_s2d.rollout.megatron.sampling import BatchParams
from megatron_s2d.rollout.megatron.step_graph import StepGraph
from megatron_s2d.rollout.megatron.stop_strings import StopStrings

# A batch is shrunk when this share of its rows, or less, is still alive: copying the remaining keys and values costs
# about as much memory traffic as one step's attention, while every dead row costs a full row of every layer.
_SHRINK_BELOW = 0.75


@dataclasses.dataclass(eq=False)
class Cohort:
    """Requests that joined together."""

    requests: list[Request]
    active: ActiveRows  # ``rows`` are indices into ``requests``
    responses: Responses
    stop_strings: StopStrings | None
    recorder: RouteRecorder | None
    aborted: dict[int, int] = dataclasses.field(default_factory=dict)  # index of the request -> tokens that it got
    taken: set[int] = dataclasses.field(default_factory=set)  # indices of requests whose samples were returned

    @property
    def num_rows(self) -> int:
        """Rows of the batch that are this cohort's."""
        return len(self.active.rows)

    @property
    def num_left(self) -> int:
        """Positions to the end of its longest response."""
        return len(self.responses.tokens) - self.responses.num_steps


class RunningBatch:
    """Rows that are decoded, until ``alive`` is 0."""

    def __init__(
        self,
        passes: ModelPasses,
        version: int,
        tokenizer: Decoder | None,
        replay: RoutingReplay | None,
        *,
        graphs_steps: bool,
    ):
        """version: of the weights. graphs_steps: decode tokens as CUDA graphs."""
        self._passes, self._version, self._tokenizer, self._replay = passes, version, tokenizer, replay
        self._cohorts: list[Cohort] = []
        self._cache: KeyValueCache | None = None
        self._graph = StepGraph(enabled=graphs_steps)
        self._block = TokenBlock(0, 0)
        self._params: BatchParams | None = None
        self._alive: list[torch.Tensor] = []  # per cohort, indices of its rows that are alive
        self.num_alive = 0

    # ------------------------------------------------------------------ rows join and leave

    @property
    def is_due(self) -> bool:
        """Whether rows should leave, so that others can join."""
        num_rows = sum(cohort.num_rows for cohort in self._cohorts)
        if any(cohort.num_left == 0 for cohort in self._cohorts):
            return True
        return self.num_alive <= _SHRINK_BELOW * num_rows

    def add(self, requests: Sequence[Request]) -> None:
        """Compute the prompts of ``requests`` and draw their first tokens; rows that have ended must have left."""
        requests = list(requests)
        prompts = PromptTable.of(requests)
        cohort = self._new_cohort(requests, prompts)
        cache = self._passes.new_cache(prompts, len(cohort.responses.tokens))
        logits = self._passes.prefill(prompts.token_ids, cache)
        if cohort.recorder is not None:
            cohort.recorder.add_prompts(len(prompts.token_ids))
        cache.select(prompts.rows)
        logits = None if logits is None else logits[prompts.rows]
        if self._cache is None:
            self._cache, self._cohorts = cache, [cohort]
            self._params = cohort.active.params
            self._block = self._new_block(len(requests))
            self._decode_block(logits)
            return
        self._join(cohort, cache, logits)

    def _join(self, cohort: Cohort, cache: KeyValueCache, logits: torch.Tensor | None) -> None:
        """Draw the first tokens of ``cohort`` and put its rows after those of the batch."""
        block = TokenBlock(1, cohort.num_rows)
        block.begin(cohort.responses.uniforms(cohort.active.rows, 1))
        self._passes.sample(logits, cohort.active.params, block)
        self._end_block(cohort, block.tokens, block.log_probs)
        self._cohorts.append(cohort)
        newest = torch.cat([self._block.newest, block.newest])
        self._cache.join(cache, max(cohort.num_left for cohort in self._cohorts))
        self._replace_rows(newest)

    def abort(self, ids: Collection[str]) -> None:
        """End the responses to the requests ``ids`` with the tokens that they have; unknown ids are ignored."""
        for cohort in self._cohorts:
            indices = [
                index
                for index, request in enumerate(cohort.requests)
                if request.id in ids and index not in cohort.taken and index not in cohort.aborted
            ]
            if indices:
                cohort.aborted |= dict.fromkeys(indices, cohort.responses.num_steps)
                ended = torch.isin(cohort.active.rows, torch.tensor(indices, device=self._passes.device))
                cohort.active = dataclasses.replace(cohort.active, alive=cohort.active.alive & ~ended)
        self._count_alive()

    def drop_ended(self) -> None:
        """Let the rows that have ended leave, where that is worth it."""
        if self._cache is None or not self.is_due:
            return
        if self.num_alive == 0:
            self._cohorts, self._cache, self._alive = [], None, []
            self._graph.buffers_moved()
            return
        starts = itertools.accumulate((cohort.num_rows for cohort in self._cohorts), initial=0)
        alive = torch.cat([rows + start for rows, start in zip(self._alive, starts, strict=False)])
        for cohort, rows in zip(self._cohorts, self._alive, strict=True):
            cohort.active = cohort.active.select(rows)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.num_rows]
        newest = self._block.newest[alive]
        self._cache.select(alive)
        self._replace_rows(newest)

    def _replace_rows(self, newest: torch.Tensor) -> None:
        self._block = self._new_block(len(newest))
        self._block.newest.copy_(newest)
        self._params = (
            self._cohorts[0].active.params
            if len(self._cohorts) == 1
            else BatchParams.of(
                [cohort.requests[row].params for cohort in self._cohorts for row in cohort.active.rows.tolist()],
                self._passes.vocab_size,
            )
        )
        self._count_alive()
        self._graph.buffers_moved()

    def fits(self, requests: Sequence[Request], max_batch_size: int, max_batch_tokens: int) -> int:
        """Return how many of the first ``requests`` may join."""
        rows = [
            (len(cohort.requests[row].prompt.token_ids) + cohort.responses.num_steps, cohort.num_left)
            for cohort in self._cohorts
            for row in cohort.active.rows.tolist()
        ]
        longest, left = max((length for length, _ in rows), default=0), max((left for _, left in rows), default=0)
        count = len(rows)
        for index, request in enumerate(requests):
            longest = max(longest, len(request.prompt.token_ids))
            left = max(left, request.params.max_new_tokens)
            count += 1
            if count > 1 and (count > max_batch_size or count * (longest + left) > max_batch_tokens):
                return index
        return len(requests)

    # ------------------------------------------------------------------ tokens

    def decode(self) -> None:
        """Decode a block of tokens of every row: one on a CPU, 16 on a GPU, fewer at the end of a response."""
        self._decode_block(None)

    def _decode_block(self, logits: torch.Tensor | None) -> None:
        """logits: behind the prompts, from which the block's first tokens are drawn; None: they are decoded."""
        num_positions, num_sampled = self._begin_block(), 0
        if logits is not None or self._is_first_block():
            self._passes.sample(logits, self._params, self._block)
            num_sampled = 1
        if self._cache.reserve(num_positions - num_sampled):
            self._graph.buffers_moved()
        step = functools.partial(self._passes.step, self._params, self._block, self._cache)
        left = min(cohort.num_left for cohort in self._cohorts)
        for position in range(num_sampled, num_positions):
            self._passes.begin_pass(len(self._block.newest))
            self._graph.run(step, left - position, self._passes.graph_key)
            self._cache.advance()
            offset = 0
            for cohort in self._cohorts:
                if cohort.recorder is not None:
                    routes = slice(offset, offset + cohort.num_rows)
                    cohort.recorder.add_tokens(cohort.responses.num_steps + position - 1, cohort.active.rows, routes)
                offset += cohort.num_rows
        start = 0
        for cohort in self._cohorts:
            columns = slice(start, start + cohort.num_rows)
            block = self._block
            self._end_block(cohort, block.tokens[:num_positions, columns], block.log_probs[:num_positions, columns])
            start += cohort.num_rows
        self._count_alive()

    def _is_first_block(self) -> bool:
        return self._cohorts[0].responses.num_steps == 0

    def _begin_block(self) -> int:
        """Return how many positions the block has: the last one may end with the longest response of a cohort."""
        parts = [
            cohort.responses.uniforms(cohort.active.rows, self._passes.positions_per_check) for cohort in self._cohorts
        ]
        num_positions = min(map(len, parts))
        self._block.begin(parts[0] if len(parts) == 1 else torch.cat([part[:num_positions] for part in parts], dim=1))
        return num_positions

    def _end_block(self, cohort: Cohort, tokens: torch.Tensor, log_probs: torch.Tensor) -> None:
        """Append [n, a] tokens to the cohort's responses; its rows are alive as far as none of them ends one."""
        matches = None
        if cohort.stop_strings is not None:
            matches = torch.zeros(tokens.shape, dtype=torch.bool, device=self._passes.device)
            if self._passes.is_root:
                earlier = cohort.responses.tokens[: cohort.responses.num_steps]
                matches = cohort.stop_strings.completed(earlier, tokens, cohort.active)
            self._passes.broadcast(matches)
        cohort.active = cohort.responses.add(cohort.active, tokens, log_probs, matches)

    # ------------------------------------------------------------------ samples

    def take_ended(self) -> list[Sample]:
        """Return the samples of responses that have ended since the last call."""
        samples = []
        for cohort, alive in zip(self._cohorts, self._alive, strict=True):
            running = set(cohort.active.rows[alive].tolist())
            ended = [i for i in range(len(cohort.requests)) if i not in running and i not in cohort.taken]
            if ended:
                cohort.taken.update(ended)
                samples += self._samples(cohort, ended)
        return samples

    def _samples(self, cohort: Cohort, ended: Sequence[int]) -> list[Sample]:
        """Return the samples of the requests ``ended`` (indices, ascending)."""
        responses = cohort.responses
        everything = len(ended) == len(cohort.requests)
        rows = None if everything else torch.tensor(ended, device=self._passes.device)
        log_probs = responses.log_probs[: responses.num_steps]
        log_probs = self._passes.broadcast((log_probs if rows is None else log_probs[:, rows]).contiguous())
        samples = responses.samples(self._version, ended, log_probs, cohort.aborted)
        if cohort.recorder is None:
            return samples
        routes = cohort.recorder.by_request(
            ended,
            [sample.prompt_length for sample in samples],
            [sample.response_length for sample in samples],
            self._passes.layout,
        )
        return [
            dataclasses.replace(sample, routed_experts=experts) for sample, experts in zip(samples, routes, strict=True)
        ]

    # ------------------------------------------------------------------ parts

    def _new_cohort(self, requests: list[Request], prompts: PromptTable) -> Cohort:
        responses = Responses(requests)
        recorder = None
        if self._replay is not None:
            recorder = RouteRecorder(self._replay, prompts.rows, len(responses.tokens))
        active = ActiveRows.of(requests, self._passes.vocab_size)
        return Cohort(requests, active, responses, StopStrings.of(requests, self._tokenizer), recorder)

    def _new_block(self, num_rows: int) -> TokenBlock:
        return TokenBlock(self._passes.positions_per_check, num_rows)

    def _count_alive(self) -> None:
        self._alive = [cohort.active.alive.nonzero().squeeze(1) for cohort in self._cohorts]
        self.num_alive = sum(map(len, self._alive))
