"""The prompts of each step, and which responses are graded."""

import types

import numpy as np

from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import Prompt, Sample
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker
from megatron_s2d.verify import Verdict

ONE_RANK = types.SimpleNamespace(
    dp_rank=0, dp_size=1, is_dp_leader=True, leader_in_replica=0, host_dp=HostGroup(), host_replica=HostGroup()
)


def make_prompts(count):
    return [Prompt(f"p{index}", np.array([index]), "text", "math", "math", "1") for index in range(count)]


def test_every_epoch_has_another_order_of_all_prompts():
    loader = PromptDataLoader(make_prompts(20), 5, seed=3)
    epochs = [
        [prompt.id for step in range(first, first + 4) for prompt in loader.batch_for_step(step)] for first in (1, 5, 9)
    ]
    assert all(sorted(epoch) == sorted(f"p{index}" for index in range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_order_can_be_continued_where_another_ended():
    whole, rest = (PromptDataLoader(make_prompts(20), 6, seed=3, first=first) for first in (0, 2 * 6))
    ids = [[prompt.id for prompt in whole.batch_for_step(step)] for step in range(1, 9)]
    assert [[prompt.id for prompt in rest.batch_for_step(step)] for step in range(1, 7)] == ids[2:]
    assert whole.resample(1, 1, set(), 5) != rest.resample(1, 1, set(), 5)


class GradeEverything:
    """Accepts whatever it is asked about."""

    def __init__(self):
        self.texts = []

    def grade(self, prompts, texts):
        self.texts += [(prompt.id, text) for prompt, text in zip(prompts, texts, strict=True)]
        return [Verdict(1.0, "correct") for _ in texts]


class Engine:
    """Answers with tokens 7 and 8; every second response runs into the length limit."""

    def generate(self, requests, progress=None):
        return [
            Sample(
                id=request.id,
                prompt_id=request.prompt.id,
                group_id=request.group_id,
                domain="math",
                seed=request.seed,
                token_ids=np.array([0, 7, 8]),
                response_mask=np.array([False, True, True]),
                temperature=1.0,
                finish_reason=("stop", "length")[index % 2],
            )
            for index, request in enumerate(requests)
        ]


def test_truncated_responses_get_reward_0_without_being_graded():
    manager = GradeEverything()
    tokenizer = types.SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
    worker = RolloutWorker(ONE_RANK, Engine(), SamplingParams(2, (0,)), 1, tokenizer, manager)
    samples = worker.sample(make_prompts(2), 2, 1)
    assert [sample.reward for sample in samples] == [1.0, 0.0, 1.0, 0.0]
    assert [sample.verifier_label for sample in samples] == ["correct", "truncated"] * 2
    assert manager.texts == [("p0", "7 8"), ("p1", "7 8")]


def test_every_response_has_a_seed_of_its_own():
    """Also where a prompt comes twice in a step, and in the next step; the same arguments give the same seeds."""
    worker = RolloutWorker(ONE_RANK, Engine(), SamplingParams(2, (0,)), 1, None)
    prompts = make_prompts(2)
    samples = [sample for step in (1, 2) for sample in worker.sample([*prompts, prompts[0]], 3, step)]
    assert len({sample.seed for sample in samples}) == len({sample.id for sample in samples}) == len(samples) == 18
    assert [sample.seed for sample in worker.sample(prompts, 3, 1)] == [sample.seed for sample in samples[:6]]
