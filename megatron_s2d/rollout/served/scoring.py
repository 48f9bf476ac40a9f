"""Log-probabilities of given tokens from a server that holds a teacher: of the tokens themselves, and the top k.

All values are at temperature 1 and speak of token t where they stand at t: SGLang scores a prompt without temperature,
and its first token has no score. That server and trainer agree is proven by the probes of the push (``engine.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample
from megatron_s2d.rollout.served.server_pool import ServerPool
from megatron_s2d.rollout.served.weight_checks import scored_tokens
from megatron_s2d.rollout.sglang.protocol import GenerateReply, InvalidReply, StaleWeights

_ROUNDING = 1e-6  # of a sum of probabilities whose float32 logarithms are right to about their last digit


@dataclasses.dataclass(frozen=True)
class TopTokens:
    """The k likeliest tokens at each position of a sequence, likeliest first."""

    ids: np.ndarray  # [length, k] int64; row 0 speaks of nothing and is 0
    log_probs: np.ndarray  # [length, k] float32
    log_tail: np.ndarray  # [length] float32, log of the mass of all other tokens (see ``_log_tail``); -inf for none


def check_temperature(samples: Sequence[Sample]) -> None:
    """Refuse samples of another temperature than 1 (or greedy ones), which a server cannot score."""
    for sample in samples:
        if sample.temperature not in (0.0, 1.0):
            raise UserError(
                f"sample {sample.id} was sampled at temperature {sample.temperature}: a served teacher scores at "
                "temperature 1 only; set sampling.temperature to 1 or score with the teacher in the trainer"
            )


def score(
    pool: ServerPool, sequences: Sequence[np.ndarray], label: str, vocab_size: int
) -> tuple[dict[int, np.ndarray], list[str]]:
    """Place -> [length] float32 of each sequence that could be scored, and why the others could not."""

    def checked(place: int, reply: GenerateReply) -> np.ndarray:
        _check_weight_version(reply, label)
        return scored_tokens(sequences[place], reply, vocab_size)

    return pool.score_all(sequences, checked)


def top_tokens(
    pool: ServerPool, sequences: Sequence[np.ndarray], label: str, vocab_size: int, k: int
) -> tuple[dict[int, TopTokens], list[str]]:
    """``score`` for the k likeliest tokens of every position."""

    def checked(place: int, reply: GenerateReply) -> TopTokens:
        _check_weight_version(reply, label)
        scored_tokens(sequences[place], reply, vocab_size)
        return _top(sequences[place], reply, vocab_size, k)

    return pool.score_all(sequences, checked, top_k=k)


def _check_weight_version(reply: GenerateReply, label: str) -> None:
    if reply.meta_info.weight_version != label:
        raise StaleWeights(f"weights '{reply.meta_info.weight_version}' instead of '{label}'")


def _top(sequence: np.ndarray, reply: GenerateReply, vocab_size: int, k: int) -> TopTokens:
    rows = reply.meta_info.input_top_logprobs
    if len(rows) != len(sequence) or rows[0]:
        raise InvalidReply(f"{len(rows)} rows of likeliest tokens for {len(sequence)} tokens")
    ids = np.zeros((len(rows), k), dtype=np.int64)
    log_probs = np.zeros((len(rows), k), dtype=np.float32)
    for place, row in enumerate(rows[1:], start=1):
        if row is None or len(row) != k:
            raise InvalidReply(f"{len(row or ())} likeliest tokens instead of {k}: does the server cap them?")
        if any(value is None or not math.isfinite(value) for value, _, _ in row):
            raise InvalidReply("a likeliest token has no finite log-probability")
        ids[place] = [token for _, token, _ in row]
        log_probs[place] = [value for value, _, _ in row]
        if len(set(ids[place])) < k or ids[place].min() < 0 or ids[place].max() >= vocab_size:
            raise InvalidReply(f"likeliest tokens {ids[place].tolist()[:8]} are not different tokens of the vocabulary")
    if (np.diff(log_probs[1:], axis=1) > 0).any():
        raise InvalidReply("likeliest tokens are not in order")
    log_tail = _log_tail(log_probs, vocab_size)
    log_tail[0] = 0.0
    return TopTokens(ids, log_probs, log_tail)


def _log_tail(log_probs: np.ndarray, vocab_size: int) -> np.ndarray:
    """[length] float32: log of the mass beyond the k likeliest tokens, log_probs [length, k] in falling order.

    What float32 log-probabilities leave of 1 is not known below their rounding: a smaller rest counts as that, but not
    as more than if all other tokens were as likely as the last one. So it is 0 for a whole vocabulary only.
    """
    others = vocab_size - log_probs.shape[1]
    if not others:
        return np.full(len(log_probs), -np.inf, dtype=np.float32)
    rest = 1.0 - np.exp(log_probs.astype(np.float64)).sum(axis=1)
    bound = np.log(others) + log_probs[:, -1]
    return np.minimum(np.log(np.maximum(rest, _ROUNDING)), bound).astype(np.float32)
