"""Generates the responses of one call with the servers of a pool.

A request goes to a server by its prompt, so that the responses of a group share the prompt's keys and values there.
No response is lost or counted twice: a response is taken once, under the index of its request, and an attempt that
timed out is aborted.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import ProgressCallback, Request
from megatron_s2d.rollout.served.backend import ContextLengthExceeded, InvalidReply
from megatron_s2d.rollout.served.replies import ReplyContract, to_sample
from megatron_s2d.rollout.served.server_pool import NoHealthyServer, ServerPool, Session, gather_all


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """By the index of the request: samples, and the last reason of each that failed."""

    samples: dict[int, Sample] = dataclasses.field(default_factory=dict)
    failures: dict[int, str] = dataclasses.field(default_factory=dict)


def generate_all(
    pool: ServerPool, requests: Sequence[Request], contract: ReplyContract, progress: ProgressCallback | None = None
) -> GenerationResult:
    """Try each request until it has a sample or ``max_attempts`` are used up.

    Raises ``UserError`` for a request that is refused or that a context is too short for.
    """
    result = GenerationResult()
    numbers = {key: number for number, key in enumerate(dict.fromkeys(map(_prompt_key, requests)))}

    async def answer(session: Session, semaphore: asyncio.Semaphore, index: int) -> None:
        request = requests[index]
        calls = (pool.protocol.generate(request, None) for _ in range(pool.settings.max_attempts))
        async with semaphore:
            try:
                result.samples[index] = await session.request(
                    calls,
                    numbers[_prompt_key(request)],
                    lambda content: to_sample(request, pool.protocol.parse_reply(content), contract, None),
                )
            except (InvalidReply, NoHealthyServer) as error:
                result.failures[index] = str(error)
            except ContextLengthExceeded as error:
                raise UserError(f"the response to prompt {request.prompt.id} was cut at {error}") from None
        if progress is not None:
            progress(len(result.samples) + len(result.failures), len(requests))

    async def answer_all() -> None:
        semaphore = asyncio.Semaphore(pool.concurrency)
        async with pool.session() as session:
            await gather_all(answer(session, semaphore, index) for index in range(len(requests)))

    asyncio.run(answer_all())
    return result


def _prompt_key(request: Request) -> bytes:
    return request.prompt.token_ids.tobytes()
