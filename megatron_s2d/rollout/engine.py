"""The interface of rollout engines: requests in, ``Sample`` records out, weights updated by version. No torch here.

A served engine (``served/engine.py``) and the in-process one (``megatron/engine.py``) implement ``RolloutEngine``.
Conventions that the rest of the project relies on (methods.md, Notation and M1):

- ``rollout_log_probs`` are those of the sampled tokens under ``softmax(logits / temperature)``, before top-k and top-p,
  which is what served engines report too. Greedy decoding (temperature 0) reports them at temperature 1.
- A response ends with the stop token (or with the token that completes a stop string), which belongs to the response;
  its ``finish_reason`` is "stop". A response that reaches ``max_new_tokens`` first has "length".
- A sample depends on its own prompt, seed and parameters and on the weights, never on other requests.

Shapes: s response length.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_s2d.config.training import LEAST_TEMPERATURE
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt, Sample, WeightVersionSpan

# Called with (finished requests, all requests of the call) from time to time.
ProgressCallback = Callable[[int, int], None]


class Decoder(Protocol):
    """The part of a tokenizer that stop strings need; Hugging Face tokenizers have it."""

    def decode(self, token_ids: list[int]) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one response is sampled; a value out of range is a ``UserError`` that names it."""

    max_new_tokens: int  # response tokens at most, at least 1
    stop_token_ids: tuple[int, ...]  # the response ends with the first of these; empty: only the length ends it
    temperature: float = 1.0  # 0 is greedy decoding
    top_p: float = 1.0  # sample from the smallest set of likeliest tokens with this probability; 1: from all tokens
    top_k: int = -1  # sample from this many likeliest tokens; -1: from all tokens
    stop_strings: tuple[str, ...] = ()  # the response ends when its text contains one of these

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"sampling: max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if self.temperature != 0 and not (math.isfinite(self.temperature) and self.temperature >= LEAST_TEMPERATURE):
            raise UserError(
                f"sampling: temperature is {self.temperature}: it must be 0 (greedy) or at least {LEAST_TEMPERATURE}"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling: top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.top_k != -1 and self.top_k < 1:
            raise UserError(f"sampling: top_k is {self.top_k}: it must be -1 (every token) or at least 1")
        if any(token < 0 for token in self.stop_token_ids):
            raise UserError(f"sampling: stop_token_ids {self.stop_token_ids} contain a negative id")
        if any(not text for text in self.stop_strings):
            raise UserError("sampling: stop_strings contain an empty string, which would stop every response at once")

    @property
    def log_prob_temperature(self) -> float:
        """Temperature of the reported log-probabilities: the sampling temperature, and 1 for greedy decoding."""
        return self.temperature if self.temperature > 0 else 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A request for one response. ``id`` becomes the sample's id, so it is unique in a run."""

    id: str  # "<prompt id>#<index>@<step>"
    prompt: Prompt
    group_id: str  # copied to the sample; requests of one group share a prompt
    seed: int  # 0 <= seed < 2**63, from sample_seed
    params: SamplingParams


class RolloutEngine(Protocol):
    """Generates responses with the weights of the last ``update_weights``."""

    version: int  # of the weights in use; written to every sample's weight_versions

    def generate(self, requests: Sequence[Request], progress: ProgressCallback | None = None) -> list[Sample]:
        """Return one sample per request, in the order of ``requests``."""
        ...

    def sleep(self) -> None:
        """Release memory that generation needs, if possible; nothing is requested until the next weight update."""
        ...

    def update_weights(self, chunks: Sequence[Any], version: int) -> None:
        """Use the current weights of the live model ``chunks`` from the next ``generate`` on, as ``version``."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return the measurements of the last weight update, for the step's row."""
        ...

    def close(self) -> None:
        """Release the engine's resources; it is not used afterwards."""
        ...


def sample_seed(run_seed: int, step: int, prompt_id: str, index: int) -> int:
    """Return the seed of one response: a hash of the arguments, the same on every machine and layout.

    It has 63 bits, so that it is a non-negative signed integer everywhere.
    """
    text = f"{run_seed}\x1f{step}\x1f{prompt_id}\x1f{index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def check_requests(requests: Sequence[Request], *, vocab_size: int, max_positions: int, has_tokenizer: bool) -> None:
    """Raise ``UserError``, which names the prompt, for requests that a model of these sizes cannot serve."""
    checked: set[int] = set()  # prompts; the requests of a group share one
    for request in requests:
        prompt, params = request.prompt, request.params
        length = len(prompt.token_ids)
        if length + params.max_new_tokens > max_positions:
            raise UserError(
                f"prompt {prompt.id} has {length} tokens; with max_new_tokens {params.max_new_tokens} that exceeds "
                f"the model's {max_positions} positions: shorten the prompt or the response"
            )
        if params.stop_strings and not has_tokenizer:
            raise UserError("stop_strings need a tokenizer, and this engine has none: use stop_token_ids")
        if id(prompt) in checked:
            continue
        checked.add(id(prompt))
        if length == 0:
            raise UserError(f"prompt {prompt.id} is empty: there is nothing to continue")
        if prompt.token_ids.min() < 0 or prompt.token_ids.max() >= vocab_size:
            raise UserError(
                f"prompt {prompt.id} has token ids outside the model's vocabulary of {vocab_size}: "
                "was it made with another tokenizer?"
            )


def requests_digest(requests: Sequence[Request]) -> int:
    """Return a number of 63 bits that is equal for equal requests."""
    digest = hashlib.blake2b(digest_size=8)
    for request in requests:
        digest.update(f"{request.id}\x1f{request.seed}\x1f{request.params}".encode())
        digest.update(request.prompt.token_ids.tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def sample_of(
    request: Request,
    response: np.ndarray,
    log_probs: np.ndarray,
    reason: str,
    versions: int | np.ndarray,
    routed_experts: np.ndarray | None = None,
) -> Sample:
    """Return the record of a response: tokens [s] int64 and their log-probabilities [s] float32.

    versions: of the weights that sampled the response, or [s] int64 if there were several. routed_experts: see
    ``Sample``.
    """
    prompt = request.prompt.token_ids
    start = len(prompt)
    token_ids = np.concatenate([prompt, response])
    length = len(token_ids)
    mask = np.zeros(length, dtype=np.bool_)
    mask[start:] = True
    rollout_log_probs = np.zeros(length, dtype=np.float32)
    rollout_log_probs[start:] = log_probs
    return Sample(
        id=request.id,
        prompt_id=request.prompt.id,
        group_id=request.group_id,
        domain=request.prompt.domain,
        seed=request.seed,
        token_ids=token_ids,
        response_mask=mask,
        temperature=request.params.temperature,
        finish_reason=reason,
        rollout_log_probs=rollout_log_probs,
        weight_versions=version_spans(np.broadcast_to(versions, len(response)), start),
        routed_experts=routed_experts,
    )


def version_spans(versions: np.ndarray, start: int = 0) -> tuple[WeightVersionSpan, ...]:
    """Return runs of equal ``versions`` [s] as spans of the tokens from ``start`` on."""
    if len(versions) == 0:
        return ()
    bounds = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(versions)]
    return tuple(
        WeightVersionSpan(start + first, start + stop, int(versions[first]))
        for first, stop in itertools.pairwise(bounds)
    )
