"""The interface of engines by request: tokens in, a ``Completion`` out, while other requests are in flight. No torch.

An episode (one response, or a conversation with an environment) is a coroutine that asks a ``SamplingClient`` for
completions. ``RolloutEngine.run`` runs many of them on the producer, one rank of each model replica; the engine forms
batches of what they ask for. Tokens in, tokens out: an engine never sees text, and the caller never tokenizes what a
model has sampled.

Conventions beside those of ``engine.py``:

- A completion may span several weight updates: the engine continues it with the new weights, and ``weight_versions``
  says which tokens each version sampled. The caller sees one completion.
- The random numbers of a completion depend on its seed and on the positions within it, so each request of an episode
  needs a seed of its own. Engines whose servers draw their own numbers say so in their documentation.

Shapes: p tokens of the request, n tokens of the completion.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from typing import Any, Literal, Protocol

import numpy as np

from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt, Sample, WeightVersionSpan
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_of

FinishReason = Literal["stop", "length", "abort"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What an engine sampled after the tokens of one request."""

    token_ids: np.ndarray  # [n] int64; with the stop token, if it ended with one; n >= 1 unless aborted
    log_probs: np.ndarray  # [n] float32, at the sampling temperature, before top-k and top-p (see ``engine.py``)
    finish_reason: FinishReason  # "abort": ended by ``SamplingClient.abort``, with the tokens up to then
    weight_versions: tuple[WeightVersionSpan, ...]  # cover [0, n), indices into ``token_ids`` of this completion
    routed_experts: np.ndarray | None = (
        None  # [p + n - 1, layers, experts per token], as in ``Sample``; None: no routes
    )


class SamplingClient(Protocol):
    """What an episode sees of an engine; used from the event loop that runs the episode, by that episode alone."""

    @property
    def version(self) -> int:
        """Of the weights that would sample the next token."""
        ...

    async def sample(
        self, token_ids: np.ndarray, params: SamplingParams, *, seed: int, request_id: str, priority: int = 0
    ) -> Completion:
        """Return the continuation of ``token_ids`` [p] int64.

        seed: 0 <= seed < 2**63, see ``sample_seed``. request_id: unique among the requests in flight. priority: smaller
        values are sampled first where requests have to wait. A cancelled call aborts its request. Raises ``UserError``
        for a request that the model cannot serve, and for a model or servers that fail for good.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request: its ``sample`` returns soon, with "abort" if it was not complete. Unknown ids are ignored."""
        ...


type Episode[Result] = Callable[[SamplingClient], Awaitable[Result]]


class EpisodeRunner(Protocol):
    """The part of a rollout engine that runs episodes."""

    def run[Result](self, episodes: Sequence[Episode[Result]]) -> list[Result]:
        """Run ``episodes`` to their ends and return their results in order; all ranks of the job call it.

        Every model replica brings its own. Only its producer (``layout.is_replica_root``) starts the episodes and
        returns results; the others take part in forward passes and return an empty list. An exception of an episode
        ends all and is raised, on the other ranks as a ``UserError`` with its message.
        """
        ...


class BackgroundRunner(EpisodeRunner, Protocol):
    """An engine that runs episodes beside the trainer, such as servers. All ranks of the job call these methods.

    It knows what it was told to run and nothing else: which episodes there are, and which are taken, is decided in
    ``buffer.py``. Only producers have results; other ranks pass the same names.
    """

    def start(self, episodes: Mapping[str, Episode[Any]], priority: int = 0) -> None:
        """Start ``episodes``, by name, and return at once. Requests of smaller ``priority`` are sent first."""
        ...

    def wait(self, is_enough: Callable[[Set[str]], bool]) -> dict[str, Any]:
        """Let episodes run until ``is_enough`` of the names that have ended; take what has ended, by name.

        Raises as ``run`` does. An interrupted episode continues.
        """
        ...

    def cancel(self, names: Sequence[str]) -> None:
        """End episodes; their tokens are discarded. Names that have been taken are no episodes any more."""
        ...

    def pause(self, *, interrupt: bool) -> None:
        """Return when no request is in flight, until the next ``wait`` or weight update.

        interrupt: end the requests that are in flight; they go on later with what they have.
        """
        ...

    def measurements(self) -> dict[str, float]:
        """Return ``rollout/producer_wait_seconds`` (without a request) and ``rollout/discarded_tokens`` since the last
        call, of this rank.
        """
        ...


def shift_spans(spans: Sequence[WeightVersionSpan], offset: int) -> tuple[WeightVersionSpan, ...]:
    """Return ``spans`` of a completion as spans of the sequence in which it starts at ``offset``."""
    return tuple(WeightVersionSpan(span.start + offset, span.stop + offset, span.version) for span in spans)


def completion_of(sample: Sample) -> Completion:
    """Return the response of ``sample`` as the completion of its prompt; the prompt is what comes before it."""
    start = sample.length - sample.response_length
    return Completion(
        sample.token_ids[start:],
        sample.rollout_log_probs[start:],
        sample.finish_reason,
        shift_spans(sample.weight_versions, -start),
        sample.routed_experts,
    )


def single_turn(request: Request) -> Episode[Sample]:
    """Return the episode of ``request`` that is one response."""

    async def episode(client: SamplingClient) -> Sample:
        prompt = np.asarray(request.prompt.token_ids, dtype=np.int64)
        completion = await client.sample(prompt, request.params, seed=request.seed, request_id=request.id)
        spans = completion.weight_versions
        versions = [np.full(span.stop - span.start, span.version, dtype=np.int64) for span in spans]
        return sample_of(
            request,
            completion.token_ids,
            completion.log_probs,
            completion.finish_reason,
            np.concatenate(versions) if versions else np.zeros(0, dtype=np.int64),
            completion.routed_experts,
        )

    return episode


def together[Result](episodes: Sequence[Episode[Result]]) -> Episode[list[Result]]:
    """Return ``episodes``, which run at the same time, as one; it fails with the first of them that does."""

    async def call(episode: Episode[Result], client: SamplingClient) -> Result:
        return await episode(client)

    async def episode(client: SamplingClient) -> list[Result]:
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(call(part, client)) for part in episodes]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in running]

    return episode


def token_request(request_id: str, token_ids: np.ndarray, params: SamplingParams, seed: int) -> Request:
    """Return a request for the continuation of tokens that belong to no prompt of the data."""
    return Request(request_id, Prompt(request_id, token_ids, "", "", None, None), request_id, seed, params)


def failure_of(task: asyncio.Task) -> BaseException | None:
    """Return the exception of an episode's task that has ended with one."""
    if not task.done():
        return None
    return UserError("an episode was cancelled") if task.cancelled() else task.exception()
