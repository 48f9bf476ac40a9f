"""What the GRPO source hands to the training loop: advantages with the length penalty, and filtered groups."""

import dataclasses

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


class ResamplingWorker:
    """Answers each prompt with a correct and a wrong response."""

    def __init__(self, fakes):
        self.fakes = fakes

    def sample(self, prompts, num_generations, step):
        return [
            dataclasses.replace(
                self.fakes.sample(f"{prompt.id}#{index}", 2, reward=float(index)),
                prompt_id=prompt.id,
                group_id=f"{prompt.id}@{step}.0",
            )
            for prompt in prompts
            for index in range(num_generations)
        ]


class Resampler:
    def __init__(self, fakes, num_prompts):
        self.fakes, self.num_prompts, self.calls = fakes, num_prompts, []

    def resample(self, step, attempt, used, count):
        self.calls.append((step, attempt, set(used), count))
        return [self.fakes.prompt(f"extra{index}") for index in range(min(count, self.num_prompts))]


@pytest.mark.parametrize("num_extra", [0, 2])
def test_groups_without_a_signal_are_replaced(fakes, num_extra):
    rewards = {0: (1.0, 1.0), 1: (0.0, 1.0), 2: (0.0, 0.0)}
    samples = [
        fakes.sample(f"p{group}#{index}", 2, group=group, reward=reward)
        for group, pair in rewards.items()
        for index, reward in enumerate(pair)
    ]
    stage = grpo_config(train_batch_size=3, num_generations=2, filter_groups={"max_num_gen_batches": 2})
    loader = Resampler(fakes, num_extra)
    buffer = fakes.Buffer(samples, loader, ResamplingWorker(fakes))
    selected, prompts, generated = GrpoSource(stage, buffer, None)._sample(1)
    assert loader.calls == [(1, 1, {"p0", "p1", "p2"}, 2)] and buffer.prefetched == [2]
    # Without further prompts, uninformative groups fill the batch.
    expected = ["p1", "extra0", "extra1"] if num_extra else ["p0", "p1", "p2"]
    assert list(dict.fromkeys(sample.prompt_id for sample in selected)) == expected
    assert len(generated) == 6 + 2 * num_extra and len(prompts) == 3 + num_extra


def test_ratios_start_at_one_with_one_mini_batch_only():
    assert surrogate_of(grpo_config()).on_policy
    assert not surrogate_of(grpo_config(num_mini_batches=2)).on_policy
    assert surrogate_of(grpo_config(clip_ratio_c=3.0)).clip_ratio_c == 3.0
