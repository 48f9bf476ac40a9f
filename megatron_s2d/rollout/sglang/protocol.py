"""What is said to an SGLang server and what it must say back, checked before anything of it is believed.

A reply that fails a check is no sample. Two things are decided here and not by the server: a response whose last
allowed token happens to be a stop token has ended ("stop"; SGLang says "length"), and tokens are those of
``output_ids``, never of text. Left out: sending (``client.py``).
"""

from __future__ import annotations

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


class BadReply(Exception):
    """A reply that breaks the protocol; asking again may help."""


class StaleWeights(BadReply):
    """The server answered with other weights than the current ones."""


class ShortContext(Exception):
    """The server cut a response short of its limit; it would do so again."""


class Decoder(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, token_ids: list[int]) -> str: ...


class _Reply(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore")


class _FinishReason(_Reply):
    type: Literal["stop", "length", "abort"]
    message: str = ""


class _Meta(_Reply):
    finish_reason: _FinishReason
    prompt_tokens: int
    completion_tokens: int
    weight_version: str
    output_token_logprobs: list[Scored] = []
    input_token_logprobs: list[Scored] = []
    input_top_logprobs: list[list[Scored] | None] = []


class GenerateReply(_Reply):
    """An element of the reply to /generate."""

    output_ids: list[int]
    meta_info: _Meta


def generate_body(request: Request) -> dict[str, Any]:
    """The body of POST /generate for one response; every call has a request id of its own."""
    params = request.params
    sampling: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
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
    token_ids = request.prompt.token_ids.tolist()
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
    """The fields that are used, with their types; ``BadReply`` names the first that is missing or wrong."""
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
        raise BadReply(f"{where + ': ' if where else ''}{first['msg']}") from None


def to_sample(
    request: Request, reply: GenerateReply, *, weight_version: str, version: int, vocab_size: int,
    tokenizer: Decoder | None,
) -> Sample:  # fmt: skip
    """The sample that ``reply`` brings; raises ``BadReply``, ``StaleWeights`` or ``ShortContext``."""
    meta, ids, params = reply.meta_info, reply.output_ids, request.params
    if meta.weight_version != weight_version:
        raise StaleWeights(f"weights '{meta.weight_version}' instead of '{weight_version}'")
    if meta.finish_reason.type == "abort":
        raise BadReply(f"the server gave the request up ({meta.finish_reason.message or 'no reason given'})")
    if meta.prompt_tokens != len(request.prompt.token_ids):
        raise BadReply(f"{meta.prompt_tokens} prompt tokens for a prompt of {len(request.prompt.token_ids)}")
    if not 1 <= len(ids) <= params.max_new_tokens or meta.completion_tokens != len(ids):
        raise BadReply(f"{len(ids)} tokens ({meta.completion_tokens} counted) of at most {params.max_new_tokens}")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise BadReply(f"a token outside of the vocabulary of {vocab_size}")
    log_probs = checked_log_probs(meta.output_token_logprobs, ids)
    stops = [place for place, token in enumerate(ids) if token in params.stop_token_ids]
    if stops and stops[0] != len(ids) - 1:
        raise BadReply(f"the response goes on after the stop token {ids[stops[0]]}")
    ended = bool(stops) or (bool(params.stop_strings) and _contains(tokenizer, ids, params.stop_strings))
    if not ended and meta.finish_reason.type == "stop":
        raise BadReply(f"stopped at token {ids[-1]}, which is no stop token of the request")
    if not ended and len(ids) < params.max_new_tokens:
        raise ShortContext(f"{len(ids)} tokens of {params.max_new_tokens}: the server's context is too short")
    response = np.array(ids, dtype=np.int64)
    return sample_of(request, response, log_probs, "stop" if ended else "length", version)


def checked_log_probs(scored: Sequence[Scored], ids: Sequence[int]) -> np.ndarray:
    """[len(ids)] float32, after comparing count and ids; ``BadReply`` otherwise, and for values that are none."""
    if len(scored) != len(ids):
        raise BadReply(f"{len(scored)} log-probabilities for {len(ids)} tokens")
    for (value, token, _), expected in zip(scored, ids, strict=True):
        if token != expected:
            raise BadReply(f"a log-probability of token {token} where token {expected} stands")
        if value is None or not math.isfinite(value) or value > _ABOVE_ZERO:
            raise BadReply(f"the log-probability of token {token} is {value}")
    return np.array([value for value, _, _ in scored], dtype=np.float32)


def _contains(tokenizer: Decoder | None, ids: list[int], texts: Sequence[str]) -> bool:
    decoded = tokenizer.decode(ids)
    return any(text in decoded for text in texts)
