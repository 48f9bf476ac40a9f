"""Generation in the training process by the trained Megatron model itself, with a key-value cache.

``generate`` takes all requests at once: all ranks of one model replica (tensor x pipeline) call it with the same ones
and return the same samples. ``run`` takes requests one by one from the episodes of the replica's producer, and lets
them join the running batch. Every data-parallel replica brings its own. ``passes.py`` describes the communication,
``running_batch.py`` the batch.

On a GPU the host looks for ended responses at every 16th token only, and cuts off what was decoded after the end, so
that it never waits for the device in between.

Not supported: pipelining several batches, virtual pipeline stages, context parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_s2d.errors import UserError
from megatron_s2d.models.routing_replay import RoutingReplay
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import (
    Decoder,
    ProgressCallback,
    Request,
    check_requests,
    requests_digest,
    sample_of,
)
from megatron_s2d.rollout.megatron.batching import plan_batches
from megatron_s2d.rollout.megatron.episodes import EpisodeLoop
from megatron_s2d.rollout.megatron.passes import ModelPasses
from megatron_s2d.rollout.megatron.running_batch import RunningBatch
from megatron_s2d.rollout.sampling_client import Episode

# Blocks of tokens between two looks at the episodes: their time limits and aborts. Ended responses are looked for in
# any case.
_BLOCKS_PER_EXCHANGE = 32

_MANY_TOKENS = 1 << 30  # episodes tell their requests' lengths only as they go


class MegatronEngine:
    """A ``RolloutEngine`` over the model that is being trained; a weight update only sets the version."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        vocab_size: int,
        layout: Layout,
        *,
        tokenizer: Decoder | None = None,
        max_batch_size: int = 1024,
        max_batch_tokens: int = 262_144,
        routing_replay: RoutingReplay | None = None,
        enforce_eager: bool = False,
    ):
        """chunks: the bare model of this rank. vocab_size: without padding. tokenizer: for stop strings only.
        routing_replay: of the model, whose samples then record their experts.

        max_batch_size: rows of a batch at most. max_batch_tokens: rows x (prompt + response) at most, which bounds
        the memory of keys and values. enforce_eager: on a GPU, launch every kernel of a token instead of replaying a
        CUDA graph.
        """
        if len(chunks) != 1:
            raise UserError(f"generation does not support virtual pipeline stages ({len(chunks)} chunks on a rank)")
        if layout.config.context_parallel_size > 1:
            raise UserError("generation does not support context_parallel_size > 1: generate with another layout")
        if max_batch_size < 1 or max_batch_tokens < 1:
            raise UserError("generation: max_batch_size and max_batch_tokens must be at least 1")
        self.version = 0
        self._passes = ModelPasses(chunks[0], vocab_size, layout)
        self._layout = layout
        self._tokenizer = tokenizer
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._routing_replay = routing_replay
        self._graphs_steps = self._passes.device.type == "cuda" and not enforce_eager

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Set the version: the engine generates with the trained weights, and ``chunks`` must be its own model."""
        if len(chunks) != 1 or chunks[0] is not self._passes.chunk:
            raise ValueError("this engine generates with the model that it was built on and got another one")
        self.version = version

    def metrics(self) -> dict[str, float]:
        """Return nothing: a weight update copies nothing."""
        return {}

    def close(self) -> None:
        """Do nothing: no memory is used between calls."""

    def sleep(self) -> None:
        """Do nothing: no memory is used between two calls of ``generate``."""

    def generate(self, requests: Sequence[Request], progress: ProgressCallback | None = None) -> list[Sample]:
        """Return one sample per request, in order, the same on all ranks of the replica.

        Raises ``UserError`` for an empty prompt, an unknown token, a prompt and response longer than the model's
        positions, stop strings without a tokenizer, and a model whose outputs are not finite.
        """
        requests = list(requests)
        self._check(requests)
        samples: list[Sample | None] = [None] * len(requests)
        done = 0
        longest = max((request.params.max_new_tokens for request in requests), default=0)
        with self._passes.inference(longest), self._recording():
            for planned in plan_batches(requests, self._max_batch_size, self._max_batch_tokens):
                batch = self._new_batch()
                batch.add([requests[index] for index in planned])
                while batch.num_alive:
                    batch.drop_ended()
                    batch.decode()
                    if progress is not None:
                        progress(done + len(planned) - batch.num_alive, len(requests))
                for index, sample in zip(planned, batch.take_ended(), strict=True):
                    samples[index] = sample
                done += len(planned)
                if progress is not None:
                    progress(done, len(requests))
            self._passes.join_until_all_done()
        return samples

    def run[Result](self, episodes: Sequence[Episode[Result]]) -> list[Result]:
        """See ``EpisodeRunner``. Requests of all episodes form a batch, where later ones take the rows of ended ones.

        The ranks of a replica may pass different ``episodes``: those of the producer count.
        """
        producer = self._layout.is_replica_root
        loop = EpisodeLoop(
            episodes if producer else None, self._layout.host_replica, lambda: self.version, self._check_request
        )
        try:
            with self._passes.inference(_MANY_TOKENS), self._recording():
                error = self._answer(loop)
                self._passes.join_until_all_done()
            if error and not producer:
                raise UserError(error)
            return loop.results() if producer else []
        finally:
            loop.close()

    def _answer(self, loop: EpisodeLoop) -> str:
        """Answer the requests of the episodes until all have ended; return the error of one that failed."""
        batch = self._new_batch()
        waiting: list[tuple[int, Request]] = []
        while not (asked := loop.exchange()).has_ended:
            waiting = sorted([*waiting, *asked.requests], key=lambda item: item[0])
            if asked.aborted:
                ended = [request for _, request in waiting if request.id in asked.aborted]
                waiting = [item for item in waiting if item[1].id not in asked.aborted]
                loop.deliver([_without_response(request, self.version) for request in ended])
                batch.abort(asked.aborted)
                loop.deliver(batch.take_ended())
                batch.drop_ended()
            requests = [request for _, request in waiting]
            num_joining = batch.fits(requests, self._max_batch_size, self._max_batch_tokens)
            if num_joining:
                batch.add(requests[:num_joining])
                waiting = waiting[num_joining:]
            for _ in range(_BLOCKS_PER_EXCHANGE):
                if batch.is_due:
                    break
                batch.decode()
            if batch.is_due:
                loop.deliver(batch.take_ended())
                batch.drop_ended()
        return asked.error

    def _new_batch(self) -> RunningBatch:
        return RunningBatch(
            self._passes, self.version, self._tokenizer, self._routing_replay, graphs_steps=self._graphs_steps
        )

    def _recording(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._routing_replay is None else self._routing_replay.recording()

    def _check(self, requests: list[Request]) -> None:
        self._check_fit(requests)
        if not self._passes.is_alone:
            self._check_same_requests(requests)

    def _check_same_requests(self, requests: list[Request]) -> None:
        """Raise if ranks of the replica have different requests: they would wait for each other forever."""
        digest = requests_digest(requests)
        both = np.array([digest, -digest])
        if (self._layout.host_replica.max(both) != both).any():  # on the host, which waits for no device
            raise RuntimeError("the ranks of one model replica have different requests")

    def _check_fit(self, requests: list[Request]) -> None:
        check_requests(
            requests,
            vocab_size=self._passes.vocab_size,
            max_positions=self._passes.chunk.max_sequence_length,
            has_tokenizer=self._tokenizer is not None,
        )

    def _check_request(self, request: Request) -> None:
        self._check_fit([request])


def _without_response(request: Request, version: int) -> Sample:
    """Return the sample of a request that was ended before it joined a batch."""
    empty = np.zeros(0, dtype=np.int64)
    return sample_of(request, empty, empty.astype(np.float32), "abort", version)
