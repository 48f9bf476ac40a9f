"""GRPO on responses of older weights (``rollout.max_staleness``): what the age changes, and what it must not change."""

import dataclasses

import numpy as np
import pytest
import torch
from toy_models import (
    ToyModel,
    ToyRollouts,
    assert_matches,
    group_advantages,
    model_log_probs,
    response_log_probs,
    rewards_of,
)

from megatron_s2d.config.grpo import FilterGroupsConfig
from megatron_s2d.rollout.buffer import Batch
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker

GROUP, STEPS = 3, 6
SETTINGS = {
    "type": "grpo", "init": "student", "prompts": "pool", "steps": STEPS, "train_batch_size": 4,
    "num_generations": GROUP, "sampling": {"max_response_length": 8, "temperature": 0.7}, "optimizer": {"lr": 0.02},
    "kl_loss_coef": 0.0,
}  # fmt: skip


def run(workflow, settings=SETTINGS, *, max_staleness=0, **changes):
    """Return (updates, samples of each step, their rewards, rows of metrics.jsonl)."""
    workflow.rollout = {"max_staleness": max_staleness}
    context = workflow.run(f"rl{len(workflow.stages)}", **(settings | changes))
    actor = context.models.trained
    samples = context.rollouts.engines[actor].samples
    tokenizer, prompts = context.inputs.tokenizer, context.inputs.prompts("pool")
    rewards = [rewards_of(batch, prompts, tokenizer) for batch in samples]
    return actor.updates, samples, rewards, context.directory.metrics()


def test_weights_that_do_not_change_train_alike_at_any_age(workflow, monkeypatch):
    """Same rounds, same samples, same gradients: the age alone changes nothing."""
    monkeypatch.setattr(ToyModel, "optim_step", lambda self: 0.0)
    now, samples, *_ = run(workflow)
    for max_staleness in (1, 4):
        old, older, _, rows = run(workflow, max_staleness=max_staleness)
        assert len(old) == len(now) == STEPS
        assert [row["policy_lag_max"] for row in rows] == [min(step, max_staleness) for step in range(STEPS)]
        for step, (mine, theirs) in enumerate(zip(older, samples, strict=True)):
            assert [sample.id for sample in mine] == [sample.id for sample in theirs], step
            assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(old, now, strict=True):
            assert mine.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-7)
            torch.testing.assert_close(mine.head_gradient, theirs.head_gradient, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(mine.embedding_gradient, theirs.embedding_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_staleness", [1, 4])
def test_gradient_of_old_samples_has_the_importance_weights_of_their_own_weights(workflow, max_staleness):
    """min(pi_now / pi_sampled, cap) A, with pi_sampled of the weights so many steps ago, in float64."""
    cap = 1.1
    updates, samples, rewards, rows = run(
        workflow, max_staleness=max_staleness, optimizer={"lr": 0.1}, rollout_correction={"cap": cap}
    )
    sizes = [len(batch) for batch in samples]
    assert sizes == [4 * GROUP] * STEPS, "nothing is discarded"
    for step, (update, batch, of_batch) in enumerate(zip(updates, samples, rewards, strict=True)):
        sampled = updates[max(0, step - max_staleness)]
        advantages = group_advantages(of_batch, GROUP)
        num_tokens = sum(sample.response_length for sample in batch)
        for sample in batch:
            known = sample.rollout_log_probs[sample.response_mask]
            np.testing.assert_allclose(known, model_log_probs(sampled, sample).numpy(), atol=1e-6)

        def loss(embedding, head, *, batch=batch, advantages=advantages, sampled=sampled, num_tokens=num_tokens):
            total = 0.0
            for sample, advantage in zip(batch, advantages, strict=True):
                log_probs = response_log_probs(embedding, head, sample)
                weight = torch.exp(log_probs.detach() - model_log_probs(sampled, sample)).clamp(max=cap)
                total = total - (weight * advantage * torch.exp(log_probs - log_probs.detach())).sum()
            return total / num_tokens

        assert_matches(update, loss)
    assert rows[-1]["importance_clipped_fraction"] > 0 and rows[-1]["importance_ratio_max"] > cap


@dataclasses.dataclass
class SynchronousRollouts:
    """The rollout loop without a buffer: the prompts of the step, one call of the engine, dynamic sampling, no more.

    What a stage did before ``RolloutBuffer`` existed.
    """

    loader: PromptDataLoader
    worker: RolloutWorker
    train_batch_size: int
    num_generations: int
    filter_groups: FilterGroupsConfig | None

    def next_batch(self, step):
        prompts = self.loader.batch_for_step(step)
        generated = self.worker.sample(prompts, self.num_generations, step)
        if self.filter_groups is None:
            return Batch(prompts, generated, generated)
        informative = self.informative(generated)
        for attempt in range(1, self.filter_groups.max_num_gen_batches):
            num_missing = self.train_batch_size - len(informative) // self.num_generations
            used = {prompt.id for prompt in prompts}
            extra_prompts = self.loader.resample(step, attempt, used, num_missing) if num_missing else []
            if not extra_prompts:
                break
            extra = self.worker.sample(extra_prompts, self.num_generations, step)
            prompts, generated = prompts + extra_prompts, generated + extra
            informative += self.informative(extra)
        selected = {sample.group_id for sample in informative}
        for sample in generated:
            if len(selected) == self.train_batch_size:
                break
            selected.add(sample.group_id)
        return Batch(prompts, [sample for sample in generated if sample.group_id in selected], generated)

    def informative(self, samples):
        rewards: dict[str, set[float]] = {}
        for sample in samples:
            rewards.setdefault(sample.group_id, set()).add(sample.reward)
        return [sample for sample in samples if len(rewards[sample.group_id]) > 1]

    def update_weights(self, chunks, version):
        self.worker.engine.update_weights(chunks, version)

    def metrics(self):
        return self.worker.engine.metrics()

    def sleep(self):
        self.worker.engine.sleep()

    def state(self):
        return {}

    def resume(self, state):
        pass


def synchronous(self, loader, worker, train_batch_size=None):
    """As ``RolloutFactory.buffer``, without one."""
    stage = self._config.stages[self._stage_name]
    filter_groups = getattr(stage, "filter_groups", None)
    return SynchronousRollouts(
        loader, worker, train_batch_size or stage.train_batch_size, stage.num_generations, filter_groups
    )


OPD = {"type": "opd", "teacher": "teacher", "num_generations": 2}
STAGES = {
    "grpo": {"num_mini_batches": 2, "kl_loss_coef": 0.1},
    "grpo, dynamic sampling": {"filter_groups": {"max_num_gen_batches": 3}, "num_generations": 2},
    "opd, sampled": OPD | {"kl_estimator": "sampled_token"},
    "opd, exact": OPD | {"kl_estimator": "full_vocab"},
}


@pytest.mark.parametrize("settings", STAGES.values(), ids=STAGES)
def test_without_staleness_the_buffer_is_the_synchronous_loop_bit_for_bit(workflow, monkeypatch, settings):
    settings = {key: value for key, value in SETTINGS.items() if key != "kl_loss_coef"} | settings
    with_buffer, samples, _, rows = run(workflow, settings)
    monkeypatch.setattr(ToyRollouts, "buffer", synchronous)
    without, expected, _, expected_rows = run(workflow, settings)
    assert len(with_buffer) == len(without) >= STEPS
    for mine, theirs in zip(with_buffer, without, strict=True):
        assert mine.loss == theirs.loss and mine.metrics == theirs.metrics
        for name in ("embedding", "head", "embedding_gradient", "head_gradient"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    assert [[sample.id for sample in call] for call in samples] == [[sample.id for sample in call] for call in expected]
    assert untimed(rows) == untimed(expected_rows)
    if "filter_groups" in settings:
        assert len(samples) > STEPS, "no group was replaced"


def untimed(rows):
    """Return the rows without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if "time" not in k and "timing" not in k and "per_second" not in k}
        for row in rows
    ]
