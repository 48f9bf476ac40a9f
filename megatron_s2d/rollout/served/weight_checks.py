"""Fixed token sequences on which server and trainer must agree: the proof that weights arrived, whole and in place.

A probe finds tensors that are missing, swapped, cut wrongly or stale by more than the tolerance. In bfloat16 one small
update can lie within it; that the newest weights are in use is what the version says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.records import Sample
from megatron_s2d.rollout.served.server_pool import Server, ServerPool
from megatron_s2d.rollout.sglang.protocol import GenerateReply, InvalidReply, checked_log_probs

_COUNT = 4
_LENGTH = 32


def weight_check_sequences(spec: ModelSpec) -> list[Sample]:
    """The probes of a model as samples whose every token but the first is scored; the same on every rank."""
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


def named_ids(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """What SGLang calls given tokens: it scores the last token of a vocabulary rightly, but names it 0."""
    return [0 if token == vocab_size - 1 else token for token in token_ids]


def scored_tokens(sequence: np.ndarray, reply: GenerateReply, vocab_size: int) -> np.ndarray:
    """[length] float32: log-probability of each given token at temperature 1, 0 for the first; may be ``InvalidReply``."""
    ids = named_ids(sequence.tolist(), vocab_size)
    scored = reply.meta_info.input_token_logprobs
    if reply.output_ids or len(scored) != len(ids):
        raise InvalidReply(f"{len(scored)} scores of {len(ids)} tokens, and {len(reply.output_ids)} new tokens")
    if scored[0][0] is not None or scored[0][1] != ids[0]:
        raise InvalidReply("the first token has a score: labels are shifted")
    return np.concatenate([np.zeros(1, dtype=np.float32), checked_log_probs(scored[1:], ids[1:])])


def max_log_prob_diff(
    pool: ServerPool,
    server: Server,
    spec: ModelSpec,
    samples: Sequence[Sample],
    expected: Sequence[np.ndarray],
    label: str,
) -> float:
    """Largest difference, in nats, between ``server`` and the trainer's ``expected``; ``InvalidReply`` on another label."""
    sequences = [sample.token_ids for sample in samples]
    worst = 0.0
    for sequence, reply, wanted in zip(sequences, pool.score(server, sequences), expected, strict=True):
        if reply.meta_info.weight_version != label:
            raise InvalidReply(f"weights '{reply.meta_info.weight_version}' instead of '{label}'")
        found = scored_tokens(sequence, reply, spec.vocab_size)
        worst = max(worst, float(np.abs(found - wanted)[1:].max()))
    return worst
