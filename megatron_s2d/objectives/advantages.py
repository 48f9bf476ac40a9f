"""Advantages and rewards, in numpy, on the whole batch before its samples are dealt to ranks.

Group-relative (GRPO, Dr. GRPO), sampled distillation (OPD), G-OPD, the sign gate and stability weight of SG-OPD, the
overlong penalty of DAPO, and the schedule of SG-OPD's teacher anchor: methods.md M1, M3, M4, M5. Arrays per token are
flat: the response tokens of all samples one after the other, no prompt and no padding. Results have the dtype of the
log-probabilities (float32 or float64); the arithmetic is float64.

Left out: reading and writing samples, and dividing losses (``terms.token_weights``).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from megatron_s2d.errors import UserError

Fallback = Literal["interp", "preserve", "grpo", "mask"]
FALLBACKS = ("interp", "preserve", "grpo", "mask")


@dataclasses.dataclass(frozen=True, eq=False)
class GroupAdvantages:
    """Result of ``group_relative``."""

    advantages: np.ndarray  # [n] float64, one per response, constant over its tokens
    num_groups: int
    num_zero_variance: int  # groups whose rewards are all equal: their advantages are 0


def group_relative(
    rewards: np.ndarray, groups: np.ndarray, *, norm_adv_by_std: bool = True, eps: float = 1e-6
) -> GroupAdvantages:
    """A_i = (R_i - mean) / (std + eps) within each group, or R_i - mean (Dr. GRPO) without ``norm_adv_by_std``.

    rewards: [n]; groups: [n] ids, equal for responses of one group. std is the sample standard deviation
    (divisor G - 1), as in the frameworks that the papers trained with. A group whose rewards are all equal, a group
    of one included, gets exactly 0. Source: methods.md M1.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    groups = np.asarray(groups)
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(f"rewards {rewards.shape} and groups {groups.shape} must be [n], one each per response")
    if not np.isfinite(rewards).all():
        raise UserError(f"{int((~np.isfinite(rewards)).sum())} rewards are not finite: check the verifier")
    advantages = np.zeros_like(rewards)
    ids, members = np.unique(groups, return_inverse=True)
    num_zero_variance = 0
    for group in range(len(ids)):
        chosen = members == group
        found = rewards[chosen]
        if found.min() == found.max():
            num_zero_variance += 1
            continue
        centred = found - found.mean()
        advantages[chosen] = centred / (found.std(ddof=1) + eps) if norm_adv_by_std else centred
    return GroupAdvantages(advantages, len(ids), num_zero_variance)


def zero_variance_groups(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Sorted ids of the groups whose rewards are all equal: what dynamic sampling (DAPO) drops and refills.

    Give the verifier's rewards, before any length penalty: a penalty makes groups of equal verdicts look informative.
    """
    rewards, groups = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    ids, members = np.unique(groups, return_inverse=True)
    lowest, highest = np.full(len(ids), np.inf), np.full(len(ids), -np.inf)
    np.minimum.at(lowest, members, rewards)
    np.maximum.at(highest, members, rewards)
    return ids[lowest == highest]


def overlong_penalty(
    lengths: np.ndarray, *, max_response_length: int, buffer_tokens: int, penalty: float = 1.0
) -> np.ndarray:
    """What to add to the rewards of long responses: float64 [n] in [-penalty, 0] (DAPO, soft overlong punishment).

    0 up to max_response_length - buffer_tokens, then linear, -penalty from max_response_length on.
    """
    if not 0 < buffer_tokens <= max_response_length:
        raise UserError(
            f"overlong buffer_tokens {buffer_tokens}: give 1 to max_response_length ({max_response_length})"
        )
    excess = np.asarray(lengths, dtype=np.float64) - (max_response_length - buffer_tokens)
    return -penalty * np.clip(excess / buffer_tokens, 0.0, 1.0)


def distillation_advantage(teacher_log_probs: np.ndarray, student_log_probs: np.ndarray) -> np.ndarray:
    """A^D_t = log pi_T(y_t) - log pi_S_old(y_t) [n] of sampled tokens (OPD, methods.md M3).

    A constant for the policy loss, never a loss itself. Raises ``UserError`` where a log-probability is not finite.
    """
    teacher = _finite(teacher_log_probs, "teacher")
    student = _finite(student_log_probs, "student")
    _aligned(teacher, student)
    return (teacher - student).astype(_dtype(teacher_log_probs, student_log_probs))


def g_opd_advantage(
    teacher_log_probs: np.ndarray,
    student_log_probs: np.ndarray,
    reference_log_probs: np.ndarray | None,
    *,
    reward_scale: float,
) -> np.ndarray:
    """(log pi_T - log pi_S) + (lambda - 1) (log pi_T - log pi_ref) [n], lambda = ``reward_scale`` (methods.md M4).

    The negative of G-OPD eq. 14, which is a cost. lambda = 1 is ``distillation_advantage`` bit for bit and does not
    look at the reference; any other lambda needs one. Source: G-OPD eq. 12 and 14.
    """
    if not (math.isfinite(reward_scale) and reward_scale >= 0):
        raise UserError(f"reward_scale {reward_scale}: give a number of at least 0 (1 is OPD)")
    if reward_scale == 1.0:
        return distillation_advantage(teacher_log_probs, student_log_probs)
    if reference_log_probs is None:
        raise UserError(
            f"reward_scale {reward_scale} needs the log-probabilities of a reference: name a `reference`, or use 1"
        )
    teacher = _finite(teacher_log_probs, "teacher")
    student = _finite(student_log_probs, "student")
    reference = _finite(reference_log_probs, "reference")
    _aligned(teacher, student, reference)
    found = (teacher - student) + (reward_scale - 1.0) * (teacher - reference)
    return found.astype(_dtype(teacher_log_probs, student_log_probs))


@dataclasses.dataclass(frozen=True)
class SignGate:
    """Settings of SG-OPD's gate (methods.md M5)."""

    lambda_high: float = 1.8  # reward scale of consensus tokens
    lambda_base: float = 1.0  # of neutral tokens, and of conflict tokens with fallback preserve
    conflict_fallback: Fallback = "interp"  # what conflict tokens get
    conflict_beta: float | None = None  # with interp: 1 is OPD, 0 masks

    def __post_init__(self) -> None:
        if self.conflict_fallback not in FALLBACKS:
            raise UserError(f"conflict fallback {self.conflict_fallback!r}: choose one of {', '.join(FALLBACKS)}")
        if (self.conflict_fallback == "interp") != (self.conflict_beta is not None):
            raise UserError(
                f"conflict_beta goes with fallback interp, and only with it; fallback is {self.conflict_fallback}"
            )
        if self.conflict_beta is not None and not 0 <= self.conflict_beta <= 1:
            raise UserError(f"conflict_beta {self.conflict_beta}: give a number from 0 (mask) to 1 (OPD)")


@dataclasses.dataclass(frozen=True)
class GateCounts:
    """How many tokens the gate sent where; counts of several batches or ranks add up."""

    consensus: int
    conflict: int
    neutral: int

    def __add__(self, other: GateCounts) -> GateCounts:
        return GateCounts(
            self.consensus + other.consensus, self.conflict + other.conflict, self.neutral + other.neutral
        )

    def fractions(self) -> dict[str, float]:
        """Of all tokens, and (``_of_signed``) of those with both signals non-zero; NaN where there are none."""
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

    advantages: np.ndarray  # [n]
    agreement: np.ndarray  # [n] int8: 1 consensus, -1 conflict, 0 neutral
    counts: GateCounts


def sg_opd_gate(
    verifier_advantages: np.ndarray,
    teacher_log_probs: np.ndarray,
    student_log_probs: np.ndarray,
    reference_log_probs: np.ndarray | None,
    gate: SignGate,
) -> GatedAdvantages:
    """Route each token by whether verifier and teacher push it the same way (SG-OPD eq. 4 to 8; methods.md M5).

    verifier_advantages: [n] the response's GRPO advantage at each of its tokens. Consensus tokens get the G-OPD
    advantage at ``lambda_high``, neutral ones (a signal is 0) at ``lambda_base``, conflict tokens the fallback. The
    reference is needed where a lambda other than 1 is in use.
    """
    distillation = distillation_advantage(teacher_log_probs, student_log_probs)
    verifier = np.asarray(verifier_advantages, dtype=np.float64)
    if verifier.shape != distillation.shape or not np.isfinite(verifier).all():
        raise ValueError(f"verifier advantages must be finite and of shape {distillation.shape}, got {verifier.shape}")
    models = (teacher_log_probs, student_log_probs, reference_log_probs)
    base = g_opd_advantage(*models, reward_scale=gate.lambda_base)
    high = g_opd_advantage(*models, reward_scale=gate.lambda_high)
    fallbacks = {
        "interp": lambda: distillation * distillation.dtype.type(gate.conflict_beta),
        "preserve": lambda: base,
        "grpo": lambda: verifier.astype(distillation.dtype),
        "mask": lambda: np.zeros_like(distillation),
    }
    agreement = (np.sign(verifier) * np.sign(distillation)).astype(np.int8)
    advantages = np.select([agreement > 0, agreement < 0], [high, fallbacks[gate.conflict_fallback]()], base)
    counts = GateCounts(*(int((agreement == kind).sum()) for kind in (1, -1, 0)))
    return GatedAdvantages(advantages, agreement, counts)


@dataclasses.dataclass(frozen=True, eq=False)
class StabilityWeights:
    """Result of ``stability_weight``."""

    weights: np.ndarray  # [n] mean 1 over the batch; multiply the routed advantages with them
    num_clipped: int  # tokens with |A^D| > clip
    num_tokens: int


def stability_weight(distillation_advantages: np.ndarray, *, clip: float) -> StabilityWeights:
    """w_t = min(1, clip / |A^D_t|), divided by its mean over all tokens given (SG-OPD eq. 9; methods.md M5).

    Give A^D of every response token of the batch at once: the mean is over them. To be applied after the gate, whose
    decisions it cannot change, being positive.
    """
    if not (math.isfinite(clip) and clip > 0):
        raise UserError(f"stability clip {clip}: give a positive number of nats")
    advantages = np.asarray(distillation_advantages)
    size = np.abs(advantages.astype(np.float64))
    if not np.isfinite(size).all():
        raise UserError("stability weights need finite advantages: check the teacher's log-probabilities")
    raw = clip / np.maximum(size, clip)
    weights = raw / raw.mean() if raw.size else raw
    return StabilityWeights(weights.astype(_dtype(advantages)), int((size > clip).sum()), int(size.size))


@dataclasses.dataclass(frozen=True)
class AnchorSchedule:
    """Weight of the loss on verified teacher responses over training (phased teacher sampling, SG-OPD eq. 3).

    alpha(u), u = step / total steps: ``alpha_high`` for u < phase_1_end, a half cosine from there to ``alpha_end`` at
    phase_2_end, 0 from phase_2_end on.
    """

    alpha_high: float
    alpha_end: float
    phase_1_end: float  # fraction of training
    phase_2_end: float  # fraction of training

    def __post_init__(self) -> None:
        if not 0 <= self.phase_1_end <= self.phase_2_end <= 1:
            raise UserError(
                f"phases end at {self.phase_1_end} and {self.phase_2_end}: give 0 <= phase_1_end <= phase_2_end <= 1"
            )
        if not 0 <= self.alpha_end <= self.alpha_high < math.inf:
            raise UserError(f"anchor weights {self.alpha_high} to {self.alpha_end}: give 0 <= alpha_end <= alpha_high")

    def alpha(self, progress: float) -> float:
        """alpha(u) at u = ``progress``."""
        if progress < self.phase_1_end:
            return self.alpha_high
        if progress >= self.phase_2_end:
            return 0.0
        share = (progress - self.phase_1_end) / (self.phase_2_end - self.phase_1_end)
        return self.alpha_end + (self.alpha_high - self.alpha_end) * 0.5 * (1.0 + math.cos(math.pi * share))

    def samples_teacher(self, progress: float) -> bool:
        """Whether teacher responses are of any use at u = ``progress``; sample none where they are not."""
        return self.alpha(progress) > 0


def _finite(log_probs: np.ndarray, whose: str) -> np.ndarray:
    found = np.asarray(log_probs, dtype=np.float64)
    bad = int((~np.isfinite(found)).sum())
    if bad:
        raise UserError(
            f"{bad} of {found.size} sampled tokens have no finite {whose} log-probability: check that all models share "
            "one vocabulary and that only response tokens were given"
        )
    return found


def _aligned(*log_probs: np.ndarray) -> None:
    shapes = [found.shape for found in log_probs]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"log-probabilities must be [n], one each per token, got shapes {shapes}")


def _dtype(*log_probs: np.ndarray) -> np.dtype:
    """The widest dtype of the log-probabilities, at least float32."""
    return np.result_type(np.float32, *(np.asarray(found).dtype for found in log_probs))
