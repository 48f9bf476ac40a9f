"""What the GRPO source hands to the training loop: advantages with the length penalty."""

import numpy as np
import pytest

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.stages.grpo import GrpoSource, with_advantages
from megatron_s2d.stages.policy_loss import surrogate_of


def grpo_config(**options) -> GrpoConfig:
    return GrpoConfig(role="rl", init="start", prompts="pool", steps=10, **options)


def test_advantages_are_relative_to_the_group(fakes):
    samples = [fakes.sample("a", 3, reward=1.0), fakes.sample("b", 2, reward=0.0)]
    scored, zero_variance_fraction = with_advantages(samples, grpo_config(norm_adv_by_std=False))
    assert scored[0].advantages == pytest.approx([0, 0, 0.5, 0.5, 0.5])
    assert scored[1].advantages == pytest.approx([0, 0, -0.5, -0.5])
    assert zero_variance_fraction == 0.0


def test_overlong_responses_lose_reward_before_groups_are_compared(fakes):
    samples = [fakes.sample(str(length), length, reward=1.0) for length in (4, 7, 8)]
    options = {"sampling": {"max_response_length": 8}, "norm_adv_by_std": False}
    plain, zero_variance_fraction = with_advantages(samples, grpo_config(**options))
    assert not any(sample.advantages.any() for sample in plain) and zero_variance_fraction == 1.0
    buffer = {"len": 4, "penalty_factor": 0.8}
    penalised, zero_variance_fraction = with_advantages(samples, grpo_config(**options, overlong_buffer=buffer))
    rewards = np.array([1.0, 1.0 - 0.8 * 3 / 4, 1.0 - 0.8])
    assert [sample.advantages[-1] for sample in penalised] == pytest.approx(rewards - rewards.mean())
    assert zero_variance_fraction == 0.0


def test_step_scores_with_the_reference_and_weighs_truncated_responses(fakes):
    samples = [fakes.sample("a", 3, reward=1.0), fakes.sample("b", 5, reward=0.0, reason="length")]
    reference = fakes.Scorer({"a": -1.0, "b": -2.0})
    stage = grpo_config(truncated_responses="mask")
    data = GrpoSource(stage, fakes.Buffer(samples), reference).step(1)
    (batch,) = data.mini_batches
    assert [sample.reference_log_probs[2] for sample in batch.samples] == [-1.0, -2.0]
    assert batch.loss_weights["policy_weight"] == pytest.approx([1 / 3, 0.0])
    assert data.metrics["rollout/num_generated"] == 2 and data.metrics["truncated_fraction"] == 0.5


def test_ratios_start_at_one_with_one_mini_batch_only():
    assert surrogate_of(grpo_config()).on_policy
    assert not surrogate_of(grpo_config(num_mini_batches=2)).on_policy
    assert surrogate_of(grpo_config(clip_ratio_c=3.0)).clip_ratio_c == 3.0


def groups_of(batch):
    return list(dict.fromkeys(sample.group_id for sample in batch.samples))


def test_every_pass_over_the_batch_trains_on_all_groups_once_in_another_order(fakes):
    samples = [
        fakes.sample(f"p{group}#{index}", 1 + group, group=group, reward=float(index))
        for group in range(8)
        for index in range(2)
    ]
    options = {"train_batch_size": 8, "num_generations": 2, "num_mini_batches": 4, "kl_loss_coef": 0.0}
    once, thrice, other_seed = (
        GrpoSource(grpo_config(**options, ppo_epochs=epochs), fakes.Buffer(samples), None, seed).step(5).mini_batches
        for epochs, seed in ((1, 7), (3, 7), (3, 8))
    )
    assert [len(batches) for batches in (once, thrice)] == [4, 12]
    assert [groups_of(batch) for batch in thrice[:4]] == [groups_of(batch) for batch in once]
    passes = [[groups_of(batch) for batch in thrice[start : start + 4]] for start in (0, 4, 8)]
    for mini_batches in passes:
        assert sorted(group for groups in mini_batches for group in groups) == sorted(f"p{g}@1.0" for g in range(8))
    # Not only the order of the mini-batches changes, but also which groups are in one.
    members = [{frozenset(groups) for groups in mini_batches} for mini_batches in passes]
    assert members[0] != members[1] != members[2] != members[0]
    assert [groups_of(batch) for batch in other_seed[4:]] != [groups_of(batch) for batch in thrice[4:]]
    for batch in thrice:  # each mini-batch has its own normaliser, and whole groups
        assert len(batch.samples) == 4
        lengths = sum(sample.response_length for sample in batch.samples)
        assert batch.loss_weights["policy_weight"] == pytest.approx([1 / lengths] * 4)


def test_ratios_do_not_start_at_one_with_several_passes():
    assert not surrogate_of(grpo_config(ppo_epochs=2)).on_policy
    assert grpo_config(num_mini_batches=8, ppo_epochs=10).num_updates == 80
