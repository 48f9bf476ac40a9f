"""Advantages, sign gate, stability weight, penalties and schedule against hand-computed numbers."""

import concurrent.futures
import math
import threading
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_s2d.errors import UserError
from megatron_s2d.objectives.advantages import (
    AnchorSchedule,
    GateCounts,
    SignGate,
    combined_advantage,
    distillation_advantage,
    fixed_advantage,
    g_opd_advantage,
    group_relative,
    overlong_penalty,
    sg_opd_gate,
    stability_weight,
    zero_variance_groups,
)


class Untouchable:
    """A reference that raises when it is read."""

    def __array__(self, *args, **kwargs):
        raise AssertionError("the reference was read")


def log_prob_arrays(tokens=200, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    return [-random.exponential(size=tokens).astype(dtype) for _ in range(3)]


def signals(tokens=200, seed=0, dtype=np.float32):
    """Return verifier advantages (a third are zero), teacher (every tenth equals the student), student, reference."""
    teacher, student, reference = log_prob_arrays(tokens, dtype, seed)
    teacher[::10] = student[::10]
    verifier = np.random.default_rng(seed + 1).choice([-0.7, 0.0, 1.3], size=tokens)
    return verifier, teacher, student, reference


def test_group_relative_by_hand():
    # Group 7: rewards 1 0 0 1, mean 1/2, sample deviation sqrt(1/3); group 2: rewards 1 1, zero variance.
    relative = group_relative(np.array([1.0, 1, 0, 0, 1, 1]), np.array([7, 2, 7, 7, 2, 7]))
    size = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert relative.advantages == pytest.approx([size, 0, -size, -size, 0, size], rel=1e-14)
    assert (relative.num_groups, relative.num_zero_variance) == (2, 1)
    # One right out of four: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4.
    relative = group_relative(np.array([0.0, 0, 1, 0]), np.zeros(4, int), eps=0.0)
    assert relative.advantages == pytest.approx([-0.5, -0.5, 1.5, -0.5], rel=1e-14)


def test_dr_grpo_ignores_the_deviation():
    relative = group_relative(np.array([0.0, 0, 1, 0]), np.zeros(4, int), norm_adv_by_std=False)
    assert relative.advantages.tolist() == [-0.25, -0.25, 0.75, -0.25]


def test_equal_rewards_give_exactly_zero():
    # The mean of three times 0.1 rounds to another number: the rounding error must not become an advantage.
    relative = group_relative(np.array([0.1, 0.1, 0.1, 5.0]), np.array([0, 0, 0, 1]), eps=0.0)
    assert relative.advantages.tolist() == [0.0] * 4 and relative.num_zero_variance == 2


@given(
    rewards=st.lists(st.floats(-3, 3), min_size=1, max_size=24),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_group_relative_properties(rewards, data):
    rewards = np.round(np.array(rewards), 2)
    groups = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(rewards), max_size=len(rewards))))
    relative = group_relative(rewards, groups)
    order = np.random.default_rng(0).permutation(len(rewards))
    shuffled = group_relative(rewards[order], groups[order])
    assert shuffled.advantages == pytest.approx(relative.advantages[order], rel=1e-9, abs=1e-9)
    dropped = zero_variance_groups(rewards, groups)
    assert len(dropped) == relative.num_zero_variance
    for group in np.unique(groups):
        advantages = relative.advantages[groups == group]
        assert advantages.sum() == pytest.approx(0.0, abs=1e-9)
        assert (group in dropped) == (not advantages.any())


def test_zero_variance_groups_by_hand():
    assert zero_variance_groups([1, 0, 1, 1, 0, 0, 3], [4, 4, 9, 9, 1, 1, 0]).tolist() == [0, 1, 9]


def test_group_relative_refuses_invalid_rewards():
    with pytest.raises(UserError, match="1 rewards are not finite"):
        group_relative(np.array([1.0, np.nan]), np.zeros(2, int))
    with pytest.raises(ValueError, match="one entry per response"):
        group_relative(np.zeros(3), np.zeros(2, int))


def test_overlong_penalty_by_hand():
    # Limit 100, buffer 20: no penalty up to 80 tokens, a twentieth per token above, the full penalty from 100.
    lengths = np.array([0, 80, 81, 90, 100, 130])
    penalties = overlong_penalty(lengths, max_response_length=100, buffer_tokens=20, penalty=2.0)
    assert penalties == pytest.approx([0, 0, -0.1, -1.0, -2.0, -2.0])
    with pytest.raises(UserError, match="overlong_buffer.len 200"):
        overlong_penalty(lengths, max_response_length=100, buffer_tokens=200)


def test_distillation_advantage_by_hand():
    advantages = distillation_advantage(np.float32([-1.0, -0.5]), np.float32([-3.0, -0.25]))
    assert advantages.tolist() == [2.0, -0.25] and advantages.dtype == np.float32
    assert distillation_advantage(np.zeros(1), np.zeros(1)).dtype == np.float64
    with pytest.raises(UserError, match="1 of 2 sampled tokens have no finite teacher"):
        distillation_advantage(np.float32([-np.inf, -1]), np.float32([-1, -1]))
    with pytest.raises(ValueError, match="one entry per token"):
        distillation_advantage(np.zeros(2), np.zeros(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lambda_one_is_opd_bit_for_bit_and_ignores_the_reference(dtype):
    teacher, student, _ = log_prob_arrays(dtype=dtype)
    expected = distillation_advantage(teacher, student)
    assert expected.tobytes() == (teacher - student).tobytes()
    for reference in (None, Untouchable()):
        advantages = g_opd_advantage(teacher, student, reference, reward_scale=1.0)
        assert advantages.dtype == dtype and advantages.tobytes() == expected.tobytes()


def test_g_opd_is_the_geometric_target_up_to_a_constant():
    """(log pi_T - log pi_S) + (lambda - 1)(log pi_T - log pi_ref) = lambda T + (1 - lambda) ref - S (eq. 12)."""
    teacher, student, reference = log_prob_arrays(dtype=np.float64)
    for scale in (0.0, 0.25, 1.25, 1.8):
        advantages = g_opd_advantage(teacher, student, reference, reward_scale=scale)
        assert advantages == pytest.approx(scale * teacher + (1 - scale) * reference - student, rel=1e-12, abs=1e-12)
    # By hand: T -1, S -2, ref -3, lambda 1.25: 1 + 0.25 * 2; the sign is that of a reward.
    assert g_opd_advantage([-1.0], [-2.0], [-3.0], reward_scale=1.25).tolist() == [1.5]


def test_g_opd_refuses_invalid_inputs():
    teacher, student, reference = log_prob_arrays()
    with pytest.raises(UserError, match="reward scale 1.25 needs the log-probabilities of a reference"):
        g_opd_advantage(teacher, student, None, reward_scale=1.25)
    with pytest.raises(ValueError, match="one entry per token"):
        g_opd_advantage(teacher, student, reference[:1], reward_scale=1.25)


def test_gate_by_hand():
    # A^D = +1, -1, +1, -1, +1, 0; the reference is 2 below the teacher, so A^G(1.5) = A^D + 1.
    verifier = np.array([0.5, -0.5, -0.5, 0.5, 0.0, 0.5])
    student = np.array([-2.0, -1, -2, -1, -2, -1])
    teacher = np.array([-1.0, -2, -1, -2, -1, -1])
    expected = {
        "interp": [2.0, 0.0, 0.25, -0.25, 1.2, 0.2],
        "preserve": [2.0, 0.0, 1.2, -0.8, 1.2, 0.2],
        "grpo": [2.0, 0.0, -0.5, 0.5, 1.2, 0.2],
        "mask": [2.0, 0.0, 0.0, 0.0, 1.2, 0.2],
    }
    for fallback, advantages in expected.items():
        beta = 0.25 if fallback == "interp" else None
        gate = SignGate(lambda_high=1.5, lambda_base=1.1, conflict_fallback=fallback, conflict_beta=beta)
        gated = sg_opd_gate(verifier, teacher, student, teacher - 2, gate)
        assert gated.advantages == pytest.approx(advantages, abs=1e-12), fallback
        assert gated.agreement.tolist() == [1, 1, -1, -1, 0, 0]
        assert gated.counts == GateCounts(consensus=2, conflict=2, neutral=2)


@pytest.mark.parametrize("scale", [1.0, 1.25, 1.8])
def test_equal_lambdas_with_preserve_are_g_opd(scale):
    verifier, *models = signals()
    gated = sg_opd_gate(verifier, *models, SignGate(scale, scale, "preserve"))
    assert gated.advantages.tobytes() == g_opd_advantage(*models, reward_scale=scale).tobytes()
    assert min(gated.counts.consensus, gated.counts.conflict, gated.counts.neutral) > 0


def test_interp_beta_one_is_opd_and_zero_masks():
    verifier, *models = signals()
    conflict = sg_opd_gate(verifier, *models, SignGate(conflict_fallback="mask")).agreement < 0
    for beta, expected in ((1.0, distillation_advantage(*models[:2])), (0.0, np.zeros(200, np.float32))):
        gated = sg_opd_gate(verifier, *models, SignGate(conflict_fallback="interp", conflict_beta=beta))
        assert np.array_equal(gated.advantages[conflict], expected[conflict])
    masked = sg_opd_gate(verifier, *models, SignGate(conflict_fallback="mask"))
    assert np.array_equal(gated.advantages, masked.advantages)


def test_gate_without_extrapolation_needs_no_reference():
    verifier, teacher, student, _ = signals()
    gated = sg_opd_gate(verifier, teacher, student, None, SignGate(1.0, 1.0, "interp", 1.0))
    assert gated.advantages.tobytes() == distillation_advantage(teacher, student).tobytes()
    with pytest.raises(UserError, match="needs the log-probabilities of a reference"):
        sg_opd_gate(verifier, teacher, student, None, SignGate(1.8, 1.0, "mask"))


def test_gate_without_verifier_signal_is_neutral():
    _, *models = signals()
    gated = sg_opd_gate(np.zeros(200), *models, SignGate(1.8, 1.25, "mask"))
    assert gated.counts == GateCounts(0, 0, 200)
    assert gated.advantages.tobytes() == g_opd_advantage(*models, reward_scale=1.25).tobytes()


def test_gate_depends_on_signs_of_tiny_numbers():
    tiny = 1e-200
    gated = sg_opd_gate(np.array([tiny, -tiny]), np.array([tiny, tiny]), np.zeros(2), None,
                        SignGate(1.0, 1.0, "grpo"))  # fmt: skip
    assert gated.agreement.tolist() == [1, -1]


def test_gate_fractions_over_both_denominators():
    fractions = GateCounts(3, 3, 4).fractions()
    assert fractions == {
        "consensus_fraction": 0.3,
        "conflict_fraction": 0.3,
        "neutral_fraction": 0.4,
        "consensus_fraction_of_signed": 0.5,
        "conflict_fraction_of_signed": 0.5,
    }
    assert all(math.isnan(value) for value in GateCounts(0, 0, 0).fractions().values())


def test_stability_weight_by_hand():
    # c = 1: raw weights 1, 1, 1/2, 1/4; their mean is 11/16.
    stability = stability_weight(np.array([0.0, -1.0, 2.0, -4.0]), clip=1.0)
    assert stability.weights == pytest.approx(np.array([1, 1, 0.5, 0.25]) * 16 / 11, rel=1e-14)
    assert (stability.num_clipped, stability.num_tokens) == (2, 4)


def test_stability_weight_averages_over_the_counted_tokens():
    # Raw weights 1, 1, 1/2, 1/4, of which the second and the third count: their mean is 3/4.
    counted = np.array([False, True, True, False])
    stability = stability_weight(np.array([0.0, -1.0, 2.0, -4.0]), clip=1.0, counted=counted)
    assert stability.weights == pytest.approx(np.array([1, 1, 0.5, 0.25]) * 4 / 3, rel=1e-14)
    assert (stability.num_clipped, stability.num_tokens) == (1, 2)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50), st.floats(0.01, 10))
@settings(max_examples=60, deadline=None)
def test_stability_weight_has_mean_one_and_keeps_signs(advantages, clip):
    advantages = np.array(advantages, dtype=np.float32)
    stability = stability_weight(advantages, clip=clip)
    assert stability.weights.dtype == np.float32 and (stability.weights > 0).all()
    assert stability.weights.astype(np.float64).mean() == pytest.approx(1.0, abs=1e-5)
    assert np.array_equal(np.sign(stability.weights.astype(np.float64) * advantages), np.sign(advantages))


def test_stability_weight_refuses_infinite_advantages():
    with pytest.raises(UserError, match="finite advantages"):
        stability_weight(np.array([1.0, np.inf]), clip=1.0)
    assert stability_weight(np.zeros(0), clip=1.0).weights.shape == (0,)


def test_anchor_schedule():
    schedule = AnchorSchedule(alpha_high=0.4, alpha_end=0.1, phase_1_end=0.3, phase_2_end=0.7)
    assert [schedule.alpha(u) for u in (0.0, 0.29, 0.7, 1.0)] == [0.4, 0.4, 0.0, 0.0]
    assert schedule.alpha(0.3) == pytest.approx(0.4) and schedule.alpha(0.5) == pytest.approx(0.25)
    assert schedule.alpha(0.4) == pytest.approx(0.1 + 0.3 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule.alpha(0.7 - 1e-9) == pytest.approx(0.1)
    values = [schedule.alpha(u) for u in np.linspace(0, 1, 101)]
    assert values == sorted(values, reverse=True)
    assert schedule.samples_teacher(0.69) and not schedule.samples_teacher(0.7)
    step = AnchorSchedule(1.0, 0.0, 0.5, 0.5)
    assert (step.alpha(0.499), step.alpha(0.5)) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("tokens", "fraction", "count"), [(10, 0.2, 2), (4, 0.2, 1), (100, 0.29, 29), (7, 1.0, 7)])
def test_fixed_advantage_of_the_least_likely_tokens(dtype, tokens, fraction, count):
    log_probs = log_prob_arrays(tokens, dtype)[0]
    fixed = fixed_advantage(log_probs, value=-0.5, fraction=fraction)
    lowest = sorted(range(tokens), key=lambda index: log_probs[index])[:count]
    assert np.flatnonzero(fixed.is_selected).tolist() == sorted(lowest)
    assert fixed.advantages.dtype == dtype and fixed.advantages.tolist() == [
        -0.5 if index in lowest else 0.0 for index in range(tokens)
    ]
    assert fixed.weight_scale == tokens / count


def test_fixed_advantage_counts_tokens_with_a_loss_and_refuses_missing_scores():
    log_probs = np.array([-9.0, -1.0, -1.0, -0.5, -8.0])
    fixed = fixed_advantage(log_probs, value=-1.0, fraction=0.4, counted=np.array([False, True, True, True, False]))
    assert fixed.advantages.tolist() == [0, -1, 0, 0, 0]  # the first of two equal ones
    assert fixed.num_tokens == 3 and fixed.weight_scale == 3
    nothing = fixed_advantage(log_probs, value=-1.0, fraction=0.4, counted=np.zeros(5, dtype=bool))
    assert not nothing.is_selected.any() and nothing.weight_scale == 0
    with pytest.raises(UserError, match="1 of 5 sampled tokens have no finite selecting model's log-probability"):
        fixed_advantage(np.where(log_probs == -9, np.nan, log_probs), value=-1.0, fraction=0.4)


class ThreadTotals:
    """Sums over threads, each of which is a rank."""

    def __init__(self, size: int):
        self.barrier, self.values = threading.Barrier(size), [None] * size

    def exchange(self, rank: int, value):
        self.values[rank] = value
        self.barrier.wait()
        everyone = list(self.values)
        self.barrier.wait()
        return everyone

    def of(self, rank: int):
        return types.SimpleNamespace(
            sum=lambda values: np.sum(self.exchange(rank, values), axis=0),
        )


def on_ranks(parts, function) -> list:
    """Return ``function(part, totals)`` of each part, on a rank of its own."""
    totals = ThreadTotals(len(parts))
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(lambda rank: function(parts[rank], totals.of(rank)), range(len(parts))))


@settings(deadline=None, max_examples=30)
@given(
    values=st.lists(st.sampled_from([-3.5, -2.0, -2.0, -0.5, -0.0, 0.0, -1e-30, -40.0]), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    fraction=st.floats(0.01, 1.0),
)
def test_selection_and_stability_over_ranks_are_those_of_one_rank(values, cuts, fraction):
    log_probs = np.array(values, dtype=np.float32)
    counted = np.arange(len(values)) % 4 != 3
    responses = np.arange(len(values)) // 3
    ranks_of = (responses * 7 + responses // 2) % (len(cuts) + 1)  # not in order
    parts = [(log_probs[ranks_of == r], counted[ranks_of == r], responses[ranks_of == r]) for r in range(len(cuts) + 1)]
    alone = fixed_advantage(log_probs, value=-1.0, fraction=fraction, counted=counted)

    def of_rank(part, totals):
        ties = {"responses": part[2], "num_responses": len(values) // 3 + 1, "totals": totals}
        return fixed_advantage(part[0], value=-1.0, fraction=fraction, counted=part[1], **ties)

    ranks = on_ranks(parts, of_rank)
    for number, rank in enumerate(ranks):
        assert np.array_equal(rank.is_selected, alone.is_selected[ranks_of == number])
    # The definition: the first of a stable order.
    order = np.flatnonzero(counted)[np.argsort(log_probs[counted], kind="stable")]
    assert set(np.flatnonzero(alone.is_selected)) == set(order[: alone.num_selected])
    assert all(rank.weight_scale == alone.weight_scale for rank in ranks)
    alone = stability_weight(log_probs, clip=1.0, counted=counted)
    ranks = on_ranks(parts, lambda part, totals: stability_weight(part[0], clip=1.0, counted=part[1], totals=totals))
    for number, rank in enumerate(ranks):
        np.testing.assert_allclose(rank.weights, alone.weights[ranks_of == number], rtol=1e-6)
    assert all((rank.num_clipped, rank.num_tokens) == (alone.num_clipped, alone.num_tokens) for rank in ranks)


def test_combined_advantage_is_the_weighted_sum_in_float64():
    rng = np.random.default_rng(0)
    verifier, teacher = rng.normal(size=50), rng.normal(size=50).astype(np.float32)
    counted, parts = rng.random(50) < 0.7, (slice(0, 20), slice(20, 50))
    alone = combined_advantage(verifier, teacher, verifier_weight=0.3, distillation_weight=1.7, counted=counted)
    definition = 0.3 * verifier + 1.7 * teacher.astype(np.float64)
    assert alone.advantages.dtype == np.float32
    np.testing.assert_array_equal(alone.advantages, definition.astype(np.float32))
    assert alone.metrics == pytest.approx(
        {
            "advantage/reward_abs_mean": np.abs(0.3 * verifier)[counted].mean(),
            "advantage/teacher_abs_mean": np.abs(1.7 * teacher)[counted].mean(),
            "advantage/conflict_fraction": (verifier * teacher < 0)[counted].mean(),
        }
    )
    ranks = on_ranks(
        [(verifier[part], teacher[part], counted[part]) for part in parts],
        lambda part, totals: combined_advantage(
            *part[:2], verifier_weight=0.3, distillation_weight=1.7, counted=part[2], totals=totals
        ),
    )
    for rank, part in zip(ranks, parts, strict=True):
        np.testing.assert_array_equal(rank.advantages, alone.advantages[part])
        assert rank.metrics == pytest.approx(alone.metrics)


def test_a_combined_advantage_of_weight_0_is_the_other_one():
    values = np.array([0.5, -1.25, 3.0], dtype=np.float32)
    other = np.array([1e30, -7.0, 0.1])
    np.testing.assert_array_equal(combined_advantage(other, values, verifier_weight=0).advantages, values)
    np.testing.assert_array_equal(
        combined_advantage(values, other, distillation_weight=0).advantages, values.astype(np.float64)
    )
    with pytest.raises(UserError, match="1 advantages of the teacher are not finite"):
        combined_advantage(other, np.array([1.0, np.nan, 2.0]))
    with pytest.raises(ValueError, match="must be"):
        combined_advantage(other, values[:2])
