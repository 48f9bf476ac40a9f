"""Checks of a server's reply, and the ``Sample`` or ``PartialRollout`` that a good one becomes.

A reply that fails a check is no sample. Two things are decided here and not by the server: a response whose last
allowed token happens to be a stop token has ended ("stop"; SGLang reports "length"), and tokens are those of
``output_ids``, never of text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import Decoder, Request, sample_of
from megatron_s2d.rollout.served.backend import (
    ContextLengthExceeded,
    InvalidReply,
    PartialRollout,
    ScoredToken,
    ServerReply,
    StaleWeights,
)
from megatron_s2d.rollout.served.routes import checked_routes

# float32 rounding can put the log-probability of a certain token slightly above 0.
_MAX_LOG_PROB = 1e-4


@dataclasses.dataclass(frozen=True)
class ReplyContract:
    """The values that a valid reply must match."""

    weight_version: str  # that the server reports
    version: int  # that samples record
    vocab_size: int
    tokenizer: Decoder | None = None
    routed_spec: ModelSpec | None = None  # of the model whose routes come with the response; None: no routes


def check_weight_version(reply: ServerReply, weight_version: str) -> None:
    """Raise ``StaleWeights`` for a reply of other weights than ``weight_version``."""
    if reply.weight_version != weight_version:
        raise StaleWeights(f"weights '{reply.weight_version}' instead of '{weight_version}'")


def to_sample(
    request: Request, reply: ServerReply, contract: ReplyContract, partial: PartialRollout | None = None
) -> Sample:
    """Return the sample that ``reply`` completes; ``InvalidReply``, ``StaleWeights`` or ``ContextLengthExceeded``."""
    output_ids, params = reply.output_ids, request.params
    if reply.finish_reason == "abort":
        check_weight_version(reply, contract.weight_version)
        raise InvalidReply(f"the server aborted the request ({reply.message or 'no reason given'})")
    partial = partial or PartialRollout.empty()
    response = _extend(request, reply, contract, partial)
    if reply.num_prompt_tokens != len(request.prompt.token_ids) + len(partial.token_ids):
        raise InvalidReply(f"{reply.num_prompt_tokens} prompt tokens for a prompt of {len(request.prompt.token_ids)}")
    if not output_ids:
        raise InvalidReply("no tokens")
    stops = [index for index, token in enumerate(output_ids) if token in params.stop_token_ids]
    if stops and stops[0] != len(output_ids) - 1:
        raise InvalidReply(f"the response continues after the stop token {output_ids[stops[0]]}")
    ended = bool(stops) or (
        bool(params.stop_strings) and _contains(contract.tokenizer, output_ids, params.stop_strings)
    )
    if not ended and reply.finish_reason == "stop":
        raise InvalidReply(f"stopped at token {output_ids[-1]}, which is no stop token of the request")
    if not ended and len(response.token_ids) < params.max_new_tokens:
        raise ContextLengthExceeded(
            f"{len(response.token_ids)} tokens of {params.max_new_tokens}: the server's context is too short"
        )
    reason = "stop" if ended else "length"
    return sample_of(
        request, response.token_ids, response.log_probs, reason, response.versions, response.routed_experts
    )


def to_partial(
    request: Request, reply: ServerReply, contract: ReplyContract, partial: PartialRollout | None = None
) -> PartialRollout | None:
    """Return the tokens so far of an aborted response; None if it cannot be continued.

    A response with stop strings is restarted: a string that begins in these tokens would be missed in the next ones.
    """
    if request.params.stop_strings:
        return None
    try:
        response = _extend(request, reply, contract, partial or PartialRollout.empty())
    except InvalidReply:
        return None
    num_missing = request.params.max_new_tokens - len(response.token_ids)
    return None if not num_missing or set(reply.output_ids) & set(request.params.stop_token_ids) else response


def to_aborted(
    request: Request, reply: ServerReply | None, contract: ReplyContract, partial: PartialRollout | None
) -> Sample:
    """Return what there is of a response that the caller has ended: ``partial``, and the tokens of ``reply``."""
    response = partial or PartialRollout.empty()
    if reply is not None:
        with contextlib.suppress(InvalidReply):
            response = _extend(request, reply, contract, response)
    return sample_of(
        request, response.token_ids, response.log_probs, "abort", response.versions, response.routed_experts
    )


def _extend(request: Request, reply: ServerReply, contract: ReplyContract, partial: PartialRollout) -> PartialRollout:
    """Return ``partial`` with the reply's tokens, which are of the contract's weights and scored one by one."""
    check_weight_version(reply, contract.weight_version)
    output_ids, limit = reply.output_ids, request.params.max_new_tokens - len(partial.token_ids)
    if len(output_ids) > limit or reply.num_output_tokens != len(output_ids):
        raise InvalidReply(f"{len(output_ids)} tokens ({reply.num_output_tokens} counted) of at most {limit}")
    if output_ids and (min(output_ids) < 0 or max(output_ids) >= contract.vocab_size):
        raise InvalidReply(f"a token outside of the vocabulary of {contract.vocab_size}")
    log_probs, routes = checked_log_probs(reply.output_log_probs, output_ids), None
    if contract.routed_spec is not None and output_ids:
        num_tokens = len(request.prompt.token_ids) + len(partial.token_ids) + len(output_ids)
        # The routes of earlier parts stay those of the weights that sampled them.
        routes = checked_routes(reply, num_tokens - 1 - partial.num_routed, contract.routed_spec)
    return partial.extended(output_ids, log_probs, contract.version, routes)


def checked_log_probs(scored: Sequence[ScoredToken], token_ids: Sequence[int]) -> np.ndarray:
    """Return [len(token_ids)] float32; ``InvalidReply`` for other counts or ids, and for values that are no scores."""
    if len(scored) != len(token_ids):
        raise InvalidReply(f"{len(scored)} log-probabilities for {len(token_ids)} tokens")
    for (value, token, _), expected in zip(scored, token_ids, strict=True):
        if token != expected:
            raise InvalidReply(f"a log-probability of token {token} where token {expected} stands")
        if value is None or not math.isfinite(value) or value > _MAX_LOG_PROB:
            raise InvalidReply(f"the log-probability of token {token} is {value}")
    return np.array([value for value, _, _ in scored], dtype=np.float32)


def _contains(tokenizer: Decoder | None, token_ids: list[int], texts: Sequence[str]) -> bool:
    decoded = tokenizer.decode(token_ids)
    return any(text in decoded for text in texts)
