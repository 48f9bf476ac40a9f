"""Shared parts of GRPO and OPD: mini-batches of whole groups, loss weights of responses, the clipped surrogate.

Shapes: b responses of all data-parallel ranks, t response tokens of this rank's samples, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.errors import UserError
from megatron_s2d.objectives.advantages import finite
from megatron_s2d.objectives.policy import Surrogate
from megatron_s2d.objectives.terms import ResponseCounts, token_weights
from megatron_s2d.records import AnySample, Sample, own_samples, with_array


def surrogate_of(stage: GrpoConfig | OpdConfig) -> Surrogate:
    """Return the surrogate's settings.

    With one update per step the sampled weights are the current ones, so ratios start at 1 and old log-probabilities
    are not needed.
    """
    correction = stage.rollout_correction.for_engine(in_trainer=True)  # a workflow has resolved `auto`
    return Surrogate(
        policy_loss=stage.policy_loss,
        clip_ratio_low=stage.clip_ratio_low,
        clip_ratio_high=stage.clip_ratio_high,
        clip_ratio_c=stage.clip_ratio_c if isinstance(stage, GrpoConfig) else None,
        rollout_correction=correction.mode,
        rollout_correction_cap=correction.cap,
        on_policy=stage.num_updates == 1,
    )


def split_into_mini_batches(samples: Sequence[AnySample], count: int) -> list[list[AnySample]]:
    """Cut ``samples`` into ``count`` mini-batches of whole groups, in order of first occurrence."""
    groups = list(dict.fromkeys(sample.group_id for sample in samples))
    mini_batch_of = {group: index * count // len(groups) for index, group in enumerate(groups)}
    return [[sample for sample in samples if mini_batch_of[sample.group_id] == index] for index in range(count)]


def epoch_order(count: int, seed: int, step: int, epoch: int) -> np.ndarray:
    """Return the order of ``count`` items in pass ``epoch`` over a step's batch: theirs in the first, then shuffled."""
    return np.arange(count) if epoch == 0 else np.random.default_rng([seed, step, epoch]).permutation(count)


def mini_batches_by_epoch(
    samples: Sequence[AnySample], stage: GrpoConfig | OpdConfig, seed: int, step: int
) -> list[list[list[AnySample]]]:
    """Return the mini-batches of each of the ``ppo_epochs`` passes over ``samples``, by pass.

    The first pass keeps the order of the samples, which the loader of the prompts has shuffled. Further passes shuffle
    the groups (not the samples: a mini-batch has whole groups), so the members of a mini-batch change.
    """
    groups: dict[str, list[AnySample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    members = list(groups.values())
    passes = [list(samples)]
    for epoch in range(1, stage.ppo_epochs):
        order = epoch_order(len(members), seed, step, epoch)
        passes.append([sample for index in order for sample in members[index]])
    return [split_into_mini_batches(in_order, stage.num_mini_batches) for in_order in passes]


def mix_into_mini_batches(
    mini_batches: Sequence[Sequence[AnySample]], others: Sequence[AnySample]
) -> list[list[AnySample]]:
    """Append ``others`` (single samples, in order) to the mini-batches, so that all become equally large."""
    count = len(mini_batches)
    total = len(others) + sum(len(part) for part in mini_batches)
    sizes = [total * (index + 1) // count - total * index // count for index in range(count)]
    gaps = np.array([max(0, size - len(part)) for size, part in zip(sizes, mini_batches, strict=True)])
    cuts = np.cumsum(gaps) * len(others) // max(1, gaps.sum())
    return [[*part, *others[start:stop]] for part, start, stop in zip(mini_batches, [0, *cuts], cuts, strict=False)]


def has_loss(sample: AnySample, stage: GrpoConfig | OpdConfig) -> bool:
    """Return whether the sample's tokens have a loss weight: means over tokens leave out those that have none."""
    return not (stage.truncated_responses == "mask" and sample.finish_reason == "length")


def policy_loss_weights(samples: Sequence[AnySample], stage: GrpoConfig | OpdConfig) -> np.ndarray:
    """Return the loss weight of every response token of each sample, with the mini-batch's normaliser folded in.

    With ``truncated_responses: mask``, responses that ran into the length limit weigh 0 and are not counted.
    """
    lengths = np.array([sample.response_length if has_loss(sample, stage) else 0 for sample in samples], dtype=np.int64)
    limit = stage.sampling.max_response_length
    shares = domain_shares(samples, lengths, getattr(stage, "domain_weights", None))
    if not shares:
        return token_weights(lengths, stage.loss_agg_mode, ResponseCounts.of(lengths), limit)
    weights = np.zeros(len(samples))
    for domain, share in shares.items():
        members = np.array([sample.domain == domain for sample in samples])
        counts = ResponseCounts.of(lengths[members])
        weights[members] = share * token_weights(lengths[members], stage.loss_agg_mode, counts, limit)
    return weights


def domain_shares(
    samples: Sequence[AnySample], lengths: np.ndarray, weights: str | Mapping[str, float] | None
) -> dict[str, float]:
    """Return the share of the loss of each domain that has tokens, of sum 1; empty without ``domain_weights``.

    lengths: [b] tokens with a loss weight.
    """
    if weights is None:
        return {}
    present = sorted({sample.domain for sample, length in zip(samples, lengths, strict=True) if length})
    own = {domain: 1.0 if isinstance(weights, str) else weights[domain] for domain in present}
    total = sum(own.values())
    return {domain: weight / total for domain, weight in own.items()} if total else dict.fromkeys(present, 0.0)


def check_truncated(metrics: Mapping[str, float], limit: float | None, step: int) -> None:
    """Raise ``UserError``, before the update, if too many responses of a step were cut. metrics: of its responses."""
    share = metrics.get("truncated_fraction", 0.0)
    if limit is not None and share > limit:
        raise UserError(
            f"step {step}: {share:.0%} of the responses run into max_response_length, above max_truncated_fraction "
            f"{limit}: do teacher and student end responses with the same token (kl/end_token in metrics.jsonl, "
            "notices of --dry-run)? Otherwise raise sampling.max_response_length"
        )


def flat_values(samples: Sequence[Sample], field: str, whose: str) -> np.ndarray:
    """Return ``field`` at the response tokens of this rank's samples: [t]; ``UserError`` if one is not finite."""
    parts = [getattr(sample, field)[sample.response_mask] for sample in samples]
    values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    finite(values, whose)
    return values


def counted_tokens(samples: Sequence[Sample], stage: GrpoConfig | OpdConfig) -> np.ndarray:
    """Return which response tokens of this rank's samples have a loss weight: bool [t]."""
    counted = np.array([has_loss(sample, stage) for sample in samples], dtype=bool)
    return np.repeat(counted, [sample.response_length for sample in samples])


def at_tokens(samples: Sequence[AnySample], values: np.ndarray) -> np.ndarray:
    """Return the value [b] of each of this rank's responses at its tokens: [t]."""
    is_own = np.array([isinstance(sample, Sample) for sample in samples], dtype=bool)
    return np.repeat(values[is_own], [sample.response_length for sample in own_samples(samples)])


def with_token_advantages(samples: Sequence[AnySample], values: np.ndarray) -> list[AnySample]:
    """Return ``samples`` with the advantages ``values`` [t] of this rank's response tokens."""
    own = own_samples(samples)
    responses = iter(np.split(values, np.cumsum([sample.response_length for sample in own])[:-1]) if own else [])
    advantages: list[np.ndarray | None] = [None] * len(samples)
    for index, sample in enumerate(samples):
        if isinstance(sample, Sample):
            advantages[index] = np.zeros(sample.length, dtype=np.float32)
            advantages[index][sample.response_mask] = next(responses)
    return with_array(samples, "advantages", advantages)
