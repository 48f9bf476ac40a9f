"""What is said to an SGLang server and what it must say back, checked before anything of it is believed.

A reply that fails a check is no sample. Two things are decided here and not by the server: a response whose last
allowed token happens to be a stop token has ended ("stop"; SGLang says "length"), and tokens are those of
``output_ids``, never of text. Left out: sending (``client.py``).
"""

from __future__ import annotations

import dataclasses
import math
import uuid
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pydantic

from megatron_s2d.records import Sample
from megatron_s2d.rollout.engine import Request, sample_of

# float32 rounding can put the log-probability of a certain token slightly above 0.
_ABOVE_ZERO = 1e-4
# log-probability (null for a first token), token id, text (not asked for)
Scored = tuple[float | None, int, str | None]


class InvalidReply(Exception):
    """A reply that breaks the protocol; asking again may help."""


class StaleWeights(InvalidReply):
    """The server answered with other weights than the current ones."""


class ContextLengthExceeded(Exception):
    """The server cut a response short of its limit; it would do so again."""


class Decoder(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, token_ids: list[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class ReplyContract:
    """What a good reply agrees with."""

    weight_version: str  # that the server reports
    version: int  # that samples are credited to
    vocab_size: int
    tokenizer: Decoder | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PartialRollout:
    """The beginning of a response; r tokens of it."""

    token_ids: np.ndarray  # [r] int64
    log_probs: np.ndarray  # [r] float32, of these tokens when they were sampled
    versions: np.ndarray  # [r] int64, of the weights that sampled them

    @classmethod
    def empty(cls) -> PartialRollout:
        """Nothing yet."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))

    def with_more(self, token_ids: Sequence[int], log_probs: np.ndarray, version: int) -> PartialRollout:
        """This and what ``version`` wrote after it."""
        return PartialRollout(
            np.concatenate([self.token_ids, np.array(token_ids, dtype=np.int64)]),
            np.concatenate([self.log_probs, log_probs]),
            np.concatenate([self.versions, np.full(len(token_ids), version)]),
        )


class _Reply(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore")


class _FinishReason(_Reply):
    type: Literal["stop", "length", "abort"]
    message: str = ""


class _Meta(_Reply):
    finish_reason: _FinishReason
    prompt_tokens: int = -1  # not said of a request that was given up while it waited
    completion_tokens: int
    weight_version: str
    output_token_logprobs: list[Scored] = []
    input_token_logprobs: list[Scored] = []
    input_top_logprobs: list[list[Scored] | None] = []


class GenerateReply(_Reply):
    """An element of the reply to /generate."""

    output_ids: list[int]
    meta_info: _Meta


def generate_body(request: Request, before: PartialRollout | None = None) -> dict[str, Any]:
    """The body of POST /generate for one response, or for the rest of it; every call has a request id of its own."""
    params = request.params
    written = [] if before is None else before.token_ids.tolist()
    sampling: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens - len(written),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "sampling_seed": request.seed,
        "skip_special_tokens": False,
        "no_stop_trim": True,
    }
    if params.stop_token_ids:
        sampling["stop_token_ids"] = list(params.stop_token_ids)
    else:
        sampling["ignore_eos"] = True
    if params.stop_strings:
        sampling["stop"] = list(params.stop_strings)
    token_ids = request.prompt.token_ids.tolist() + written
    rid = f"{request.id}~{_unique()}"
    return {"rid": rid, "input_ids": token_ids, "sampling_params": sampling, "return_logprob": True}


def score_body(sequences: Sequence[np.ndarray], top_k: int = 0) -> dict[str, Any]:
    """The body of POST /generate that scores given tokens and generates none."""
    body = {
        "rid": [f"score~{_unique()}" for _ in sequences],
        "input_ids": [sequence.tolist() for sequence in sequences],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    return body | ({"top_logprobs_num": top_k} if top_k else {})


def _unique() -> str:
    return uuid.uuid4().hex[:16]


def parse_reply(content: bytes) -> GenerateReply:
    """The fields that are used, with their types; ``InvalidReply`` names the first that is missing or wrong."""
    return _parse(_ONE, content)


def parse_replies(content: bytes) -> list[GenerateReply]:
    """``parse_reply`` for a batch."""
    return _parse(_SEVERAL, content)


_ONE: pydantic.TypeAdapter[GenerateReply] = pydantic.TypeAdapter(GenerateReply)
_SEVERAL: pydantic.TypeAdapter[list[GenerateReply]] = pydantic.TypeAdapter(list[GenerateReply])


def _parse(adapter: pydantic.TypeAdapter, content: bytes) -> Any:
    try:
        return adapter.validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidReply(f"{where + ': ' if where else ''}{first['msg']}") from None


def to_sample(
    request: Request, reply: GenerateReply, expected: ReplyContract, before: PartialRollout | None = None
) -> Sample:
    """The sample that ``reply`` completes; raises ``InvalidReply``, ``StaleWeights`` or ``ContextLengthExceeded``."""
    meta, ids, params = reply.meta_info, reply.output_ids, request.params
    if meta.finish_reason.type == "abort":
        _check_version(reply, expected)
        raise InvalidReply(f"the server gave the request up ({meta.finish_reason.message or 'no reason given'})")
    before = before or PartialRollout.empty()
    whole = _checked(request, reply, expected, before)
    if meta.prompt_tokens != len(request.prompt.token_ids) + len(before.token_ids):
        raise InvalidReply(f"{meta.prompt_tokens} prompt tokens for a prompt of {len(request.prompt.token_ids)}")
    if not ids:
        raise InvalidReply("no tokens")
    stops = [place for place, token in enumerate(ids) if token in params.stop_token_ids]
    if stops and stops[0] != len(ids) - 1:
        raise InvalidReply(f"the response goes on after the stop token {ids[stops[0]]}")
    ended = bool(stops) or (bool(params.stop_strings) and _contains(expected.tokenizer, ids, params.stop_strings))
    if not ended and meta.finish_reason.type == "stop":
        raise InvalidReply(f"stopped at token {ids[-1]}, which is no stop token of the request")
    if not ended and len(whole.token_ids) < params.max_new_tokens:
        raise ContextLengthExceeded(
            f"{len(whole.token_ids)} tokens of {params.max_new_tokens}: the server's context is too short"
        )
    return sample_of(request, whole.token_ids, whole.log_probs, "stop" if ended else "length", whole.versions)


def to_partial(
    request: Request, reply: GenerateReply, expected: ReplyContract, before: PartialRollout | None = None
) -> PartialRollout | None:
    """What there is of a response that was given up; None where nothing can be gone on from.

    A response with stop strings is begun anew: one that begins in these tokens would not be seen in the next ones.
    """
    if request.params.stop_strings:
        return None
    try:
        whole = _checked(request, reply, expected, before or PartialRollout.empty())
    except InvalidReply:
        return None
    room = request.params.max_new_tokens - len(whole.token_ids)
    return None if not room or set(reply.output_ids) & set(request.params.stop_token_ids) else whole


def _checked(request: Request, reply: GenerateReply, expected: ReplyContract, before: PartialRollout) -> PartialRollout:
    """``before`` and the reply's tokens, which are from the expected weights and scored one by one."""
    _check_version(reply, expected)
    meta, ids, most = reply.meta_info, reply.output_ids, request.params.max_new_tokens - len(before.token_ids)
    if len(ids) > most or meta.completion_tokens != len(ids):
        raise InvalidReply(f"{len(ids)} tokens ({meta.completion_tokens} counted) of at most {most}")
    if ids and (min(ids) < 0 or max(ids) >= expected.vocab_size):
        raise InvalidReply(f"a token outside of the vocabulary of {expected.vocab_size}")
    return before.with_more(ids, checked_log_probs(meta.output_token_logprobs, ids), expected.version)


def _check_version(reply: GenerateReply, expected: ReplyContract) -> None:
    if reply.meta_info.weight_version != expected.weight_version:
        raise StaleWeights(f"weights '{reply.meta_info.weight_version}' instead of '{expected.weight_version}'")


def checked_log_probs(scored: Sequence[Scored], ids: Sequence[int]) -> np.ndarray:
    """[len(ids)] float32, after comparing count and ids; ``InvalidReply`` otherwise, and for values that are none."""
    if len(scored) != len(ids):
        raise InvalidReply(f"{len(scored)} log-probabilities for {len(ids)} tokens")
    for (value, token, _), expected in zip(scored, ids, strict=True):
        if token != expected:
            raise InvalidReply(f"a log-probability of token {token} where token {expected} stands")
        if value is None or not math.isfinite(value) or value > _ABOVE_ZERO:
            raise InvalidReply(f"the log-probability of token {token} is {value}")
    return np.array([value for value, _, _ in scored], dtype=np.float32)


def _contains(tokenizer: Decoder | None, ids: list[int], texts: Sequence[str]) -> bool:
    decoded = tokenizer.decode(ids)
    return any(text in decoded for text in texts)
