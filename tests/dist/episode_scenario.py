"""Episodes with an environment at a layout: sampled by the trained model, graded, and trained on."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch.distributed as dist

from megatron_s2d.config.environment import EnvironmentLimits
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.objectives.policy import Surrogate, grpo_objective
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Prompt, Sample, own_samples
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.environments.environment import Step
from megatron_s2d.rollout.environments.episode import run_episode
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.rollout.sampler import RolloutWorker
from megatron_s2d.stages.grpo import with_advantages
from megatron_s2d.stages.policy_loss import policy_loss_weights
from megatron_s2d.verify import Verdict

VOCAB = 27
STAGE = GrpoConfig(role="rl", init="s", prompts="p", steps=1, sampling={"max_response_length": 24})


class Tokenizer:
    """A character per token."""

    def __len__(self):
        return VOCAB

    def decode(self, token_ids, **_):
        return "".join(chr(ord("a") + token) for token in token_ids)


class Echo:
    """Answers a turn with its tokens backwards, twice at most; a reward of its own for each turn."""

    stop_token_ids = tuple(range(0, VOCAB, 3))

    async def reset(self, prompt, seed):
        self.left = 1 + int(prompt.id) % 3

    async def step(self, turn):
        self.left -= 1
        if not self.left:
            return Step(None)
        return Step(turn.token_ids[:3][::-1].copy(), reward=0.1 * len(turn.token_ids))


class Environments:
    """The part of an ``EnvironmentManager`` that a worker uses."""

    def episode(self, request):
        async def episode(client):
            return await run_episode(client, request, Echo(), EnvironmentLimits(), Tokenizer())

        return episode


class Rewards:
    """Rewards by the last turn's text."""

    def grade(self, prompts, texts):
        return [Verdict(float(sum(map(ord, text)) % 3), "graded") for text in texts]


def spoiled(sample: Sample) -> Sample:
    """The sample with other numbers at all tokens that the model did not sample; its tokens are the same."""
    names = [name for name in ("rollout_log_probs", "old_log_probs", "advantages") if sample.has(name)]
    arrays = {name: np.where(sample.response_mask, getattr(sample, name), -7.5).astype(np.float32) for name in names}
    return dataclasses.replace(sample, **arrays)


def episodes(layout: Layout, policy, update, optimizer) -> dict:
    """Return the episodes by id, and the row of an update on them, and with other numbers at observations."""
    model = policy("tiny-llama", layout, 2)
    params = SamplingParams(24, (5,))
    engine = MegatronEngine(model.chunks, VOCAB, layout, max_batch_size=7)
    worker = RolloutWorker(layout, engine, params, 3, Tokenizer(), Rewards(), Environments())
    rng = np.random.default_rng(1)
    prompts = [
        Prompt(str(n), rng.integers(0, VOCAB, 2 + n % 4), "", "math", None, None, environment="echo") for n in range(6)
    ]
    samples = worker.sample(prompts, 3, 1)
    own = {s.id: [s.token_ids.tolist(), s.response_mask.tolist(), s.reward] for s in own_samples(samples)}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    rows = []
    for change in (lambda sample: sample, spoiled):
        model = policy("tiny-llama", layout, 2)
        model.prepare_training(optimizer, 1)
        batch = [change(s) if isinstance(s, Sample) else s for s in with_advantages(samples, STAGE)[0]]
        columns = {"policy_weight": policy_loss_weights(batch, STAGE)}
        rows.append(update(model, batch, grpo_objective(Surrogate(on_policy=True), kl_loss_coef=0.0), columns, None))
    return {"episodes": {name: value for part in everyone for name, value in part.items()}, "rows": rows}
