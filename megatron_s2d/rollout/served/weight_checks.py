"""Token sequences on which server and trainer must agree: the proof that weights arrived complete and in order.

A check finds tensors that are missing, swapped, cut wrongly or stale by more than the tolerance. In bfloat16 one small
weight update can lie within it; that the newest weights are in use is proven by the version that the server reports.
Shapes: s sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.records import Sample
from megatron_s2d.rollout.served.backend import InvalidReply, ServerReply
from megatron_s2d.rollout.served.replies import check_weight_version, checked_log_probs
from megatron_s2d.rollout.served.server_pool import Server, ServerPool

_COUNT = 4
_LENGTH = 32


def weight_check_sequences(spec: ModelSpec) -> list[Sample]:
    """Return the check sequences of a model as samples scored from the second token on; the same on every rank."""
    generator = np.random.default_rng(0)
    length = min(_LENGTH, spec.max_position_embeddings)
    mask = np.arange(length) > 0
    return [
        Sample(
            id=f"probe{number}",
            prompt_id=f"probe{number}",
            group_id=f"probe{number}",
            domain="probe",
            seed=0,
            token_ids=generator.integers(0, spec.vocab_size, length),
            response_mask=mask,
            temperature=1.0,
            finish_reason="data",
        )
        for number in range(_COUNT)
    ]


def input_log_probs(token_ids: np.ndarray, reply: ServerReply) -> np.ndarray:
    """Return [s] float32: log-probability of each token at temperature 1, 0 for the first; or ``InvalidReply``."""
    ids, scored = token_ids.tolist(), reply.input_log_probs
    if reply.output_ids or len(scored) != len(ids):
        raise InvalidReply(f"{len(scored)} scores of {len(ids)} tokens, and {len(reply.output_ids)} new tokens")
    if scored[0][0] is not None or scored[0][1] != ids[0]:
        raise InvalidReply("the first token has a score: labels are shifted")
    return np.concatenate([np.zeros(1, dtype=np.float32), checked_log_probs(scored[1:], ids[1:])])


def max_log_prob_diff(
    pool: ServerPool,
    server: Server,
    samples: Sequence[Sample],
    expected: Sequence[np.ndarray],
    weight_version: str,
) -> float:
    """Return the largest difference, in nats, between ``server`` and the trainer's ``expected`` log-probabilities.

    Raises ``InvalidReply`` for another weight version, too.
    """
    sequences = [sample.token_ids for sample in samples]
    largest = 0.0
    for token_ids, reply, log_probs in zip(sequences, pool.score(server, sequences), expected, strict=True):
        check_weight_version(reply, weight_version)
        difference = np.abs(input_log_probs(token_ids, reply) - log_probs)
        largest = max(largest, float(difference[1:].max()))
    return largest
