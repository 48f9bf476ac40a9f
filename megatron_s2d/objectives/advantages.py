"""Advantages and rewards of a step's responses, in numpy: rewards of all ranks, tokens of this rank's responses.

Where all tokens of a step count (a mean, a quantile), ``Totals`` adds up the ranks.

Group-relative (GRPO, Dr. GRPO), sampled distillation (OPD), G-OPD, the sign gate and stability weight of SG-OPD, the
overlong penalty of DAPO, and the schedule of SG-OPD's teacher anchor: methods.md M1, M3, M4, M5. Results have the dtype
of the log-probabilities (float32 or float64); the arithmetic is float64. Settings are validated by ``config``.

Shapes: b responses, t response tokens of all responses in order (no prompt, no padding), g responses of a group.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, Protocol

import numpy as np

from megatron_s2d.errors import UserError


class Totals(Protocol):
    """Sums over data-parallel ranks, each of which has the tokens of its own responses."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sums of ``values`` over the ranks."""
        ...


class OneRank:
    """The ``Totals`` of a single rank."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values


ONE_RANK = OneRank()
ConflictFallback = Literal["interp", "preserve", "grpo", "mask"]


@dataclasses.dataclass(frozen=True, eq=False)
class GroupAdvantages:
    """Result of ``group_relative``."""

    advantages: np.ndarray  # [b] float64, constant over the tokens of a response
    num_groups: int
    num_zero_variance: int  # groups whose rewards are all equal: their advantages are 0


def group_relative(
    rewards: np.ndarray, groups: np.ndarray, *, norm_adv_by_std: bool = True, eps: float = 1e-6
) -> GroupAdvantages:
    """Return A_i = (R_i - mean) / (std + eps) within each group, or R_i - mean without ``norm_adv_by_std`` (Dr. GRPO).

    rewards: [b]; groups: [b] ids, equal for responses of one group. std is the sample standard deviation (divisor
    g - 1), as in the frameworks that the papers trained with. A group whose rewards are all equal, also a group of one,
    gets exactly 0. Source: methods.md M1.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    groups = np.asarray(groups)
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(f"rewards {rewards.shape} and groups {groups.shape} must be [b], one entry per response")
    if not np.isfinite(rewards).all():
        raise UserError(f"{int((~np.isfinite(rewards)).sum())} rewards are not finite: check the verifier")
    advantages = np.zeros_like(rewards)
    ids, members = np.unique(groups, return_inverse=True)
    num_zero_variance = 0
    order = np.argsort(members, kind="stable")
    for in_group in np.split(order, np.flatnonzero(np.diff(members[order])) + 1) if len(ids) else ():
        group_rewards = rewards[in_group]
        if group_rewards.min() == group_rewards.max():
            num_zero_variance += 1
            continue
        centred = group_rewards - group_rewards.mean()
        advantages[in_group] = centred / (group_rewards.std(ddof=1) + eps) if norm_adv_by_std else centred
    return GroupAdvantages(advantages, len(ids), num_zero_variance)


def zero_variance_groups(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the sorted ids of groups whose rewards are all equal, which dynamic sampling (DAPO) replaces.

    rewards: [b] of the verifier, before any length penalty, which would make equal verdicts look informative.
    """
    rewards, groups = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    ids, members = np.unique(groups, return_inverse=True)
    lowest, highest = np.full(len(ids), np.inf), np.full(len(ids), -np.inf)
    np.minimum.at(lowest, members, rewards)
    np.maximum.at(highest, members, rewards)
    zero_variance: np.ndarray = ids[lowest == highest]
    return zero_variance


def overlong_penalty(
    lengths: np.ndarray, *, max_response_length: int, buffer_tokens: int, penalty: float = 1.0
) -> np.ndarray:
    """Return the reward penalty of long responses, float64 [b] in [-penalty, 0] (DAPO, soft overlong punishment).

    It is 0 up to max_response_length - buffer_tokens, then linear, and -penalty from max_response_length on.
    """
    if not 0 < buffer_tokens <= max_response_length:
        raise UserError(
            f"overlong_buffer.len {buffer_tokens}: choose 1 to sampling.max_response_length ({max_response_length})"
        )
    excess = np.asarray(lengths, dtype=np.float64) - (max_response_length - buffer_tokens)
    ramp: np.ndarray = np.clip(excess / buffer_tokens, 0.0, 1.0)
    return np.asarray(-penalty * ramp)


def distillation_advantage(teacher_log_probs: np.ndarray, student_log_probs: np.ndarray) -> np.ndarray:
    """Return A^D_t = log pi_T(y_t) - log pi_S_old(y_t) [t] of sampled tokens (OPD, methods.md M3).

    A constant of the policy loss, never a loss itself. Raises ``UserError`` if a log-probability is not finite.
    """
    teacher = finite(teacher_log_probs, "teacher")
    student = finite(student_log_probs, "student")
    _aligned(teacher, student)
    advantages: np.ndarray = teacher - student
    return advantages.astype(_dtype(teacher_log_probs, student_log_probs))


def g_opd_advantage(
    teacher_log_probs: np.ndarray,
    student_log_probs: np.ndarray,
    reference_log_probs: np.ndarray | None,
    *,
    reward_scale: float,
) -> np.ndarray:
    """Return (log pi_T - log pi_S) + (lambda - 1) (log pi_T - log pi_ref) [t], lambda = ``reward_scale`` (M4).

    The negative of G-OPD eq. 14, which is a cost. lambda = 1 is ``distillation_advantage`` bit for bit and does not
    read the reference; any other lambda needs one. Source: G-OPD eq. 12 and 14.
    """
    if reward_scale == 1.0:
        return distillation_advantage(teacher_log_probs, student_log_probs)
    if reference_log_probs is None:
        raise UserError(
            f"reward scale {reward_scale} needs the log-probabilities of a reference: set `reference`, or use 1"
        )
    teacher = finite(teacher_log_probs, "teacher")
    student = finite(student_log_probs, "student")
    reference = finite(reference_log_probs, "reference")
    _aligned(teacher, student, reference)
    advantages: np.ndarray = (teacher - student) + (reward_scale - 1.0) * (teacher - reference)
    return advantages.astype(_dtype(teacher_log_probs, student_log_probs))


@dataclasses.dataclass(frozen=True, eq=False)
class CombinedAdvantages:
    """Result of ``combined_advantage``."""

    advantages: np.ndarray  # [t]
    metrics: dict[str, float]  # the size of both terms, and how often their signs differ, over all ranks


def combined_advantage(
    verifier_advantages: np.ndarray,
    distillation_advantages: np.ndarray,
    *,
    verifier_weight: float = 1.0,
    distillation_weight: float = 1.0,
    counted: np.ndarray | None = None,
    totals: Totals = ONE_RANK,
) -> CombinedAdvantages:
    """Return ``verifier_weight`` A^R + ``distillation_weight`` A^D [t]: reward and teacher in one advantage (M3).

    verifier_advantages: [t], the response's group-relative advantage at each of its tokens. distillation_advantages:
    [t], whose dtype the result has. counted: bool [t], the tokens that have a loss weight, over which the metrics are
    means; all by default. totals: of the data-parallel ranks.
    """
    verifier = verifier_weight * _finite_advantages(verifier_advantages, "verifier")
    distillation = distillation_weight * _finite_advantages(distillation_advantages, "teacher")
    _aligned(verifier, distillation)
    counted = np.ones(verifier.shape, dtype=bool) if counted is None else np.asarray(counted, dtype=bool)
    sums = [np.abs(verifier), np.abs(distillation), verifier * distillation < 0, np.ones_like(verifier)]
    parts = np.array([values[counted].sum(dtype=np.float64) for values in sums])
    *means, count = totals.sum(parts).tolist()
    names = ("advantage/reward_abs_mean", "advantage/teacher_abs_mean", "advantage/conflict_fraction")
    metrics = {name: mean / max(1.0, count) for name, mean in zip(names, means, strict=True)}
    return CombinedAdvantages((verifier + distillation).astype(_dtype(distillation_advantages)), metrics)


@dataclasses.dataclass(frozen=True, eq=False)
class FixedAdvantages:
    """Result of ``fixed_advantage``."""

    advantages: np.ndarray  # [t]
    is_selected: np.ndarray  # bool [t]
    num_tokens: int  # counted tokens of all ranks, among which the selected ones were chosen
    num_selected: int  # of all ranks

    @property
    def weight_scale(self) -> float:
        """Factor on weights that average over all counted tokens, so that they average over the selected ones."""
        return self.num_tokens / max(1, self.num_selected)


def fixed_advantage(
    log_probs: np.ndarray,
    *,
    value: float,
    fraction: float,
    counted: np.ndarray | None = None,
    responses: np.ndarray | None = None,
    num_responses: int = 1,
    totals: Totals = ONE_RANK,
) -> FixedAdvantages:
    """Return ``value`` for the ``fraction`` of tokens with the lowest log-probabilities and 0 for all others.

    The control without a teacher of "Does On-Policy Distillation Really Distill?" (arXiv 2608.31046, section 3.2):
    max(1, floor(fraction * t)) tokens, first come first selected among equal ones. log_probs: [t] of sampled tokens.
    counted: bool [t], the tokens that have a loss weight (default: all); no other is selected. With tokens on several
    ranks, totals: of those; responses: int [t], the index of each token's response among the ``num_responses`` of all
    ranks, whose order decides which token comes first. Source: methods.md M3.
    """
    values = finite(log_probs, "selecting model's")
    counted = np.ones(values.shape, dtype=bool) if counted is None else np.asarray(counted, dtype=bool)
    _aligned(values, counted)
    responses = np.zeros(values.shape, dtype=np.int64) if responses is None else responses
    candidates = np.flatnonzero(counted)
    num_candidates = int(totals.sum(np.array([len(candidates)]))[0])
    count = min(num_candidates, max(1, math.floor(fraction * num_candidates + 1e-9)))  # 0.29 * 100 is 28.99...
    is_selected = np.zeros(values.shape, dtype=bool)
    is_selected[candidates[_lowest(values[candidates], responses[candidates], count, num_responses, totals)]] = True
    advantages = np.where(is_selected, value, 0.0).astype(_dtype(log_probs))
    return FixedAdvantages(advantages, is_selected, num_candidates, int(totals.sum(np.array([is_selected.sum()]))[0]))


def _lowest(values: np.ndarray, responses: np.ndarray, count: int, num_responses: int, totals: Totals) -> np.ndarray:
    """Return which of ``values`` (float64 [t]) are among the ``count`` lowest of all ranks: bool [t].

    Among equal ones the first, by response and then by index. The largest selected value is found digit by digit, from
    the counts of 256 values of each, so that no rank needs the values of others.
    """
    if count == 0:
        return np.zeros(values.shape, dtype=bool)
    bits = (values + 0.0).view(np.uint64)  # + 0.0: -0.0 is 0.0
    sign = np.uint64(1 << 63)
    keys = np.where(bits & sign, ~bits, bits | sign)  # in the order of the values
    possible, threshold, remaining = np.ones(values.shape, dtype=bool), 0, count
    for shift in range(56, -8, -8):
        digits = ((keys[possible] >> np.uint64(shift)) & np.uint64(255)).astype(np.int64)
        below = totals.sum(np.bincount(digits, minlength=256)).cumsum()
        digit = int(np.searchsorted(below, remaining))
        remaining -= int(below[digit - 1]) if digit else 0
        threshold |= digit << shift
        possible[possible] = digits == digit
    selected: np.ndarray = keys < np.uint64(threshold)
    equal = np.flatnonzero(possible)
    per_response = np.bincount(responses[equal], minlength=num_responses)
    total = totals.sum(per_response.astype(np.int32))
    first = total.cumsum() - total  # equal values in the responses before
    number = np.arange(len(equal)) - (per_response.cumsum() - per_response)[responses[equal]]
    selected[equal[first[responses[equal]] + number < remaining]] = True
    return selected


@dataclasses.dataclass(frozen=True)
class SignGate:
    """Settings of SG-OPD's sign gate (methods.md M5)."""

    lambda_high: float = 1.8  # reward scale of consensus tokens
    lambda_base: float = 1.0  # of neutral tokens, and of conflict tokens with conflict_fallback preserve
    conflict_fallback: ConflictFallback = "interp"  # advantage of conflict tokens
    conflict_beta: float | None = None  # for interp: 1 is OPD, 0 masks


@dataclasses.dataclass(frozen=True)
class GateCounts:
    """Number of tokens by agreement of verifier and teacher."""

    consensus: int
    conflict: int
    neutral: int

    def fractions(self) -> dict[str, float]:
        """Return shares of all tokens, and (``_of_signed``) of those with two non-zero signals; NaN if none."""
        signed = self.consensus + self.conflict
        total = signed + self.neutral
        return {
            "consensus_fraction": self.consensus / total if total else math.nan,
            "conflict_fraction": self.conflict / total if total else math.nan,
            "neutral_fraction": self.neutral / total if total else math.nan,
            "consensus_fraction_of_signed": self.consensus / signed if signed else math.nan,
            "conflict_fraction_of_signed": self.conflict / signed if signed else math.nan,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class GatedAdvantages:
    """Result of ``sg_opd_gate``."""

    advantages: np.ndarray  # [t]
    agreement: np.ndarray  # [t] int8: 1 consensus, -1 conflict, 0 neutral
    counts: GateCounts


def sg_opd_gate(
    verifier_advantages: np.ndarray,
    teacher_log_probs: np.ndarray,
    student_log_probs: np.ndarray,
    reference_log_probs: np.ndarray | None,
    gate: SignGate,
) -> GatedAdvantages:
    """Select each token's advantage by the signs of verifier and teacher (SG-OPD eq. 4 to 8; methods.md M5).

    verifier_advantages: [t] the response's GRPO advantage at each of its tokens. Consensus tokens get the G-OPD
    advantage at ``lambda_high``, neutral ones (a signal is 0) at ``lambda_base``, conflict tokens the fallback. A
    lambda other than 1 needs the reference.
    """
    distillation = distillation_advantage(teacher_log_probs, student_log_probs)
    verifier = np.asarray(verifier_advantages, dtype=np.float64)
    if verifier.shape != distillation.shape or not np.isfinite(verifier).all():
        raise ValueError(f"verifier advantages must be finite and of shape {distillation.shape}, got {verifier.shape}")
    models = (teacher_log_probs, student_log_probs, reference_log_probs)
    base = g_opd_advantage(*models, reward_scale=gate.lambda_base)
    high = g_opd_advantage(*models, reward_scale=gate.lambda_high)
    if gate.conflict_fallback == "interp":
        conflict = distillation * distillation.dtype.type(gate.conflict_beta)
    elif gate.conflict_fallback == "grpo":
        conflict = verifier.astype(distillation.dtype)
    else:
        conflict = base if gate.conflict_fallback == "preserve" else np.zeros_like(distillation)
    agreement = (np.sign(verifier) * np.sign(distillation)).astype(np.int8)
    advantages = np.select([agreement > 0, agreement < 0], [high, conflict], base)
    counts = GateCounts(*(int((agreement == kind).sum()) for kind in (1, -1, 0)))
    return GatedAdvantages(advantages, agreement, counts)


@dataclasses.dataclass(frozen=True, eq=False)
class StabilityWeights:
    """Result of ``stability_weight``."""

    weights: np.ndarray  # [t] mean 1 over the counted tokens; multiply the gated advantages with them
    num_clipped: int  # counted tokens of all ranks with |A^D| > clip
    num_tokens: int  # counted ones of all ranks


def stability_weight(
    distillation_advantages: np.ndarray, *, clip: float, counted: np.ndarray | None = None, totals: Totals = ONE_RANK
) -> StabilityWeights:
    """Return w_t = min(1, clip / |A^D_t|) [t], divided by its mean over counted tokens (SG-OPD eq. 9; methods.md M5).

    distillation_advantages: A^D of every response token of the batch, because the mean is over them. counted: bool [t],
    the tokens that have a loss weight; all of them by default. totals: of the ranks that share the batch. Apply the
    weights after the gate; they are positive, so they do not change its decisions.
    """
    advantages = np.asarray(distillation_advantages)
    size = np.abs(advantages.astype(np.float64))
    if not np.isfinite(size).all():
        raise UserError("stability weights need finite advantages: check the teacher's log-probabilities")
    counted = np.ones(size.shape, dtype=bool) if counted is None else counted
    raw = clip / np.maximum(size, clip)
    num_clipped = (size > clip)[counted].sum()
    total, clipped, tokens = totals.sum(np.array([raw[counted].sum(), num_clipped, counted.sum()], dtype=np.float64))
    weights = raw / (total / tokens) if tokens else raw
    return StabilityWeights(weights.astype(_dtype(advantages)), int(clipped), int(tokens))


@dataclasses.dataclass(frozen=True)
class AnchorSchedule:
    """Weight of the loss on verified teacher responses over training (phased teacher sampling, SG-OPD eq. 3).

    alpha(u), u = step / total steps: ``alpha_high`` for u < phase_1_end, then a half cosine to ``alpha_end`` at
    phase_2_end, 0 from phase_2_end on.
    """

    alpha_high: float
    alpha_end: float
    phase_1_end: float  # fraction of training
    phase_2_end: float  # fraction of training

    def alpha(self, progress: float) -> float:
        """Return alpha(u) at u = ``progress``."""
        if progress < self.phase_1_end:
            return self.alpha_high
        if progress >= self.phase_2_end:
            return 0.0
        decay = (progress - self.phase_1_end) / (self.phase_2_end - self.phase_1_end)
        return self.alpha_end + (self.alpha_high - self.alpha_end) * 0.5 * (1.0 + math.cos(math.pi * decay))

    def samples_teacher(self, progress: float) -> bool:
        """Return whether teacher responses have a weight at u = ``progress``; if not, none need to be sampled."""
        return self.alpha(progress) > 0


def finite(log_probs: np.ndarray, whose: str) -> np.ndarray:
    """Return log-probabilities as float64; raise ``UserError`` if one is not finite. whose: for the message."""
    values = np.asarray(log_probs, dtype=np.float64)
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise UserError(
            f"{bad} of {values.size} sampled tokens have no finite {whose} log-probability: check that all models "
            "share one vocabulary and that only response tokens were passed"
        )
    return values


def _finite_advantages(advantages: np.ndarray, whose: str) -> np.ndarray:
    values = np.asarray(advantages, dtype=np.float64)
    if not np.isfinite(values).all():
        raise UserError(
            f"{int((~np.isfinite(values)).sum())} advantages of the {whose} are not finite: check its scores"
        )
    return values


def _aligned(*log_probs: np.ndarray) -> None:
    shapes = [values.shape for values in log_probs]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"log-probabilities must be [t], one entry per token, got shapes {shapes}")


def _dtype(*log_probs: np.ndarray) -> np.dtype:
    """Return the widest dtype of the log-probabilities, at least float32."""
    return np.result_type(np.float32, *(np.asarray(values).dtype for values in log_probs))
