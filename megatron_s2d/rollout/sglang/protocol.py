"""SGLang's HTTP protocol: bodies of requests, and replies as ``ServerReply`` records. Nothing is sent here."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pydantic

from megatron_s2d.rollout.engine import Request
from megatron_s2d.rollout.served.backend import InvalidReply, PartialRollout, ScoredToken, ServerCall, ServerReply
from megatron_s2d.rollout.sglang.api_key import authorization

_GENERATE, _ABORT = "/generate", "/abort_request"
# What every request specifies itself; other sampling parameters that a server prefers would be used unasked.
SPECIFIED_PARAMS = {
    "max_new_tokens", "temperature", "top_p", "top_k", "sampling_seed", "skip_special_tokens", "no_stop_trim",
}  # fmt: skip


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore")


class _FinishReason(_Model):
    type: Literal["stop", "length", "abort"]
    message: str = ""


class _Meta(_Model):
    finish_reason: _FinishReason
    prompt_tokens: int = -1  # missing for a request that was aborted while it waited
    completion_tokens: int
    weight_version: str
    output_token_logprobs: list[ScoredToken] = []
    input_token_logprobs: list[ScoredToken] = []
    input_top_logprobs: list[list[ScoredToken] | None] = []
    routed_experts: str | None = None  # base64 of int32, [tokens, layers, experts of a token]


class _Reply(_Model):
    """An element of the reply to /generate."""

    output_ids: list[int]
    meta_info: _Meta

    def to_server_reply(self) -> ServerReply:
        meta = self.meta_info
        return ServerReply(
            output_ids=self.output_ids,
            finish_reason=meta.finish_reason.type,
            message=meta.finish_reason.message,
            num_prompt_tokens=meta.prompt_tokens,
            num_output_tokens=meta.completion_tokens,
            weight_version=meta.weight_version,
            output_log_probs=meta.output_token_logprobs,
            input_log_probs=meta.input_token_logprobs,
            input_top_log_probs=meta.input_top_logprobs,
            routed_experts=None if meta.routed_experts is None else _decode_routes(meta.routed_experts),
        )


_ONE: pydantic.TypeAdapter[_Reply] = pydantic.TypeAdapter(_Reply)
_SEVERAL: pydantic.TypeAdapter[list[_Reply]] = pydantic.TypeAdapter(list[_Reply])


class SglangProtocol:
    """See ``served.backend.ServerProtocol``."""

    original_log_probs_hint = "is SGLANG_RETURN_ORIGINAL_LOGPROB set there?"

    def __init__(self, vocab_size: int, api_key: str = "", *, routed_experts: bool = False):
        """routed_experts: responses come with the experts of their tokens."""
        self._routed_experts = routed_experts
        self.adapter: str | None = None  # name of the LoRA adapter on the servers that requests are for
        self.headers = authorization(api_key)
        self._last_token = vocab_size - 1

    def generate(self, request: Request, partial: PartialRollout | None = None) -> ServerCall:
        """Return the call of POST /generate for one response, or for the rest of ``partial``."""
        params = request.params
        response = [] if partial is None else partial.token_ids.tolist()
        sampling: dict[str, Any] = {
            "max_new_tokens": params.max_new_tokens - len(response),
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
        token_ids = request.prompt.token_ids.tolist() + response
        rid = f"{request.id}~{_unique()}"
        body = {"rid": rid, "input_ids": token_ids, "sampling_params": sampling, "return_logprob": True}
        if self._routed_experts:
            first = 0 if partial is None else partial.num_routed
            body |= {"return_routed_experts": True, "routed_experts_start_len": first}
        body |= self._with_adapter()
        return ServerCall(_GENERATE, body, (rid,))

    def score(self, sequences: Sequence[np.ndarray], top_k: int = 0, starts: Sequence[int] = ()) -> ServerCall:
        """Return the call of POST /generate that scores given tokens and generates none.

        starts: SGLang takes no more of its prefix cache than what comes before ``logprob_start_len``, so that 0 has it
        compute the prompt again for every response.
        """
        rids = [f"score~{_unique()}" for _ in sequences]
        body = {"rid": rids, "input_ids": [sequence.tolist() for sequence in sequences], **score_options()}
        body |= self._with_adapter()
        if starts:
            body["logprob_start_len"] = list(starts)
        return ServerCall(_GENERATE, body | ({"top_logprobs_num": top_k} if top_k else {}), tuple(rids))

    def _with_adapter(self) -> dict[str, Any]:
        return {} if self.adapter is None else {"lora_path": self.adapter}

    def abort(self, request_id: str) -> ServerCall:
        """Return the call that aborts a request."""
        return ServerCall(_ABORT, {"rid": request_id})

    def parse_reply(self, content: bytes) -> ServerReply:
        """Parse the reply to ``generate``; ``InvalidReply`` names the first field that is missing or wrong."""
        return _parse(_ONE, content).to_server_reply()

    def parse_scores(self, content: bytes, sequences: Sequence[np.ndarray]) -> list[ServerReply]:
        """Parse the reply to ``score``."""
        replies = parse_replies(content)
        for reply, sequence in zip(replies, sequences, strict=False):
            token_ids = sequence.tolist()
            if self.reported_ids(token_ids) == [token for _, token, _ in reply.input_log_probs]:
                reply.input_log_probs = [
                    (value, token, text)
                    for (value, _, text), token in zip(reply.input_log_probs, token_ids, strict=True)
                ]
        return replies

    def reported_ids(self, token_ids: Sequence[int]) -> list[int]:
        """Return the ids by which SGLang reports scored tokens: it scores the last token rightly, but names it 0."""
        return [0 if token == self._last_token else token for token in token_ids]


def score_options() -> dict[str, Any]:
    """Return the fields of a body that scores its input."""
    return {
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def parse_replies(content: bytes) -> list[ServerReply]:
    """Parse the reply to a batch; ``InvalidReply`` names the first field that is missing or wrong."""
    return [reply.to_server_reply() for reply in _parse(_SEVERAL, content)]


def _parse(adapter: pydantic.TypeAdapter, content: bytes) -> Any:
    try:
        return adapter.validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise InvalidReply(f"{field + ': ' if field else ''}{first['msg']}") from None


def _decode_routes(text: str) -> np.ndarray:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), np.int32)
    except ValueError:  # no base64, or no whole numbers
        raise InvalidReply("meta_info.routed_experts: not the base64 of int32 numbers") from None


def _unique() -> str:
    return uuid.uuid4().hex[:16]
