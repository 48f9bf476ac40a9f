"""Log-probabilities of given tokens from a server that holds a teacher: of the tokens themselves, and the top k.

All values are at temperature 1, and the entry at t belongs to token t; the first token has no score. That server and
trainer agree is proven after each weight update (``weight_checks.py``). Shapes: s sequence length, k top-k entries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample
from megatron_s2d.rollout.served.backend import InvalidReply, ServerReply
from megatron_s2d.rollout.served.replies import check_weight_version
from megatron_s2d.rollout.served.server_pool import ServerPool
from megatron_s2d.rollout.served.weight_checks import input_log_probs

_ROUNDING = 1e-6  # of a sum of probabilities whose float32 logarithms are right to about their last digit


@dataclasses.dataclass(frozen=True)
class TopTokens:
    """The k likeliest tokens at each position of a sequence, likeliest first."""

    ids: np.ndarray  # [s, k] int64; rows up to the last token of the prompt are not asked for and 0
    log_probs: np.ndarray  # [s, k] float32
    log_tail: np.ndarray  # [s] float32, log of the mass of all other tokens (see ``_log_tail``); -inf for none


def check_temperature(samples: Sequence[Sample]) -> None:
    """Refuse samples of another temperature than 1 (or greedy ones), which a server cannot score."""
    for sample in samples:
        if sample.temperature not in (0.0, 1.0):
            raise UserError(
                f"sample {sample.id} was sampled at temperature {sample.temperature}: a served teacher scores at "
                "temperature 1 only; set sampling.temperature to 1 or score with the teacher in the trainer"
            )


def score(
    pool: ServerPool, sequences: Sequence[np.ndarray], starts: Sequence[int], weight_version: str
) -> tuple[dict[int, np.ndarray], list[str]]:
    """Return index -> [s] float32 of each sequence that could be scored, and why the others could not.

    starts: index of the token before the first one of each sequence that is scored; earlier ones have 0.
    """

    def check(index: int, reply: ServerReply) -> np.ndarray:
        check_weight_version(reply, weight_version)
        start = starts[index]
        return _behind(start, input_log_probs(sequences[index][start:], reply))

    return pool.score_all(sequences, starts, check)


def starts_of(samples: Sequence[Sample]) -> list[int]:
    """Return the index of the last token of each prompt: it predicts the first token that needs a score."""
    return [max(0, sample.prompt_length - 1) for sample in samples]


def top_tokens(
    pool: ServerPool,
    sequences: Sequence[np.ndarray],
    starts: Sequence[int],
    weight_version: str,
    vocab_size: int,
    k: int,
) -> tuple[dict[int, TopTokens], list[str]]:
    """Return what ``score`` does, for the k likeliest tokens of every position."""

    def check(index: int, reply: ServerReply) -> TopTokens:
        check_weight_version(reply, weight_version)
        start = starts[index]
        input_log_probs(sequences[index][start:], reply)
        top = _top_tokens(sequences[index][start:], reply, vocab_size, k)
        return TopTokens(_behind(start, top.ids), _behind(start, top.log_probs), _behind(start, top.log_tail))

    return pool.score_all(sequences, starts, check, top_k=k)


def _behind(start: int, values: np.ndarray) -> np.ndarray:
    """Return ``values`` [s - start, ...] of the tokens from ``start`` on as those of all tokens, 0 before."""
    return np.concatenate([np.zeros((start, *values.shape[1:]), dtype=values.dtype), values])


def _top_tokens(sequence: np.ndarray, reply: ServerReply, vocab_size: int, k: int) -> TopTokens:
    rows = reply.input_top_log_probs
    if len(rows) != len(sequence) or rows[0]:
        raise InvalidReply(f"{len(rows)} rows of likeliest tokens for {len(sequence)} tokens")
    ids = np.zeros((len(rows), k), dtype=np.int64)
    log_probs = np.zeros((len(rows), k), dtype=np.float32)
    for index, row in enumerate(rows[1:], start=1):
        if row is None or len(row) != k:
            raise InvalidReply(f"{len(row or ())} likeliest tokens instead of {k}: does the server cap them?")
        if any(value is None or not math.isfinite(value) for value, _, _ in row):
            raise InvalidReply("a likeliest token has no finite log-probability")
        ids[index] = [token for _, token, _ in row]
        log_probs[index] = [value for value, _, _ in row]
        if len(set(ids[index])) < k or ids[index].min() < 0 or ids[index].max() >= vocab_size:
            raise InvalidReply(f"likeliest tokens {ids[index].tolist()[:8]} are not different tokens of the vocabulary")
    if (np.diff(log_probs[1:], axis=1) > 0).any():
        raise InvalidReply("likeliest tokens are not in order")
    log_tail = _log_tail(log_probs, vocab_size)
    log_tail[0] = 0.0
    return TopTokens(ids, log_probs, log_tail)


def _log_tail(log_probs: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return [s] float32: log of the mass beyond the k likeliest tokens of log_probs [s, k], in descending order.

    The mass that float32 log-probabilities leave of 1 is unknown below their rounding: a smaller tail counts as that,
    but not as more than if all other tokens were as likely as the last one. So it is 0 for a full vocabulary only.
    """
    num_others = vocab_size - log_probs.shape[1]
    if not num_others:
        return np.full(len(log_probs), -np.inf, dtype=np.float32)
    tail = 1.0 - np.exp(log_probs.astype(np.float64)).sum(axis=1)
    bound = np.log(num_others) + log_probs[:, -1]
    return np.minimum(np.log(np.maximum(tail, _ROUNDING)), bound).astype(np.float32)
