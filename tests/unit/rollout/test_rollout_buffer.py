"""Which responses a step trains on: begun early, taken when complete, carried over, and begun anew after a kill."""

from __future__ import annotations

import collections
import types

import numpy as np
import pytest

pytest.importorskip("torch")

from megatron_s2d.records import Prompt
from megatron_s2d.rollout import sampler as rollouts
from megatron_s2d.rollout.engine import SamplingParams, sample_of
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutBuffer, RolloutWorker

NUM_PROMPTS, PER_STEP, RESPONSES, STEPS = 10, 4, 3, 12


class ToyEngine:
    """Answers at once; with ``num_groups`` the groups of a random order are the first to be complete."""

    version = 0

    def __init__(self, seed: int = 0):
        self.generator = np.random.default_rng(seed)
        self.asked: list[list[str]] = []
        self.begun: list[tuple[list[str], int | None]] = []

    def submit(self, requests, num_groups=None):
        self.begun.append(([request.id for request in requests], num_groups))

    def generate(self, requests, progress=None, *, num_groups=None):
        self.asked.append([request.id for request in requests])
        groups = list(dict.fromkeys(request.group_id for request in requests))
        assert len(groups) * RESPONSES == len(requests)  # every group has a number of its own
        if num_groups is not None:
            groups = set(self.generator.permutation(groups)[:num_groups].tolist())
        return [
            sample_of(request, np.array([1, 2]), np.zeros(2, np.float32), "stop", self.version)
            for request in requests
            if request.group_id in groups
        ]


def make_prompts() -> list[Prompt]:
    return [Prompt(f"p{number}", np.array([number]), "", "math", None, None) for number in range(NUM_PROMPTS)]


def make_rounds(engine, rank=0, size=1, **settings) -> RolloutBuffer:
    layout = types.SimpleNamespace(dp_rank=rank, dp_size=size, is_dp_leader=True)
    sampler = RolloutWorker(layout, engine, SamplingParams(4, (0,)), 7, None)
    stream = PromptDataLoader(make_prompts(), PER_STEP, 5)
    return RolloutBuffer(stream, sampler, PER_STEP, RESPONSES, STEPS, **settings)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(rollouts, "gather_dicts", lambda found: found)


def test_without_oversampling_a_step_is_a_function_of_its_number():
    rounds = make_rounds(ToyEngine())
    seen = [rounds.next_batch(step) for step in range(1, STEPS + 1)]
    for step, (prompts, samples) in enumerate(seen, start=1):
        assert [prompt.id for prompt in prompts] == [prompt.id for prompt in rounds.stream.batch_for_step(step)]
        group_ids = [sample.group_id for sample in samples]
        assert group_ids == [name for name in dict.fromkeys(group_ids) for _ in range(RESPONSES)]
        assert len(set(group_ids)) == PER_STEP
        assert [sample.prompt_id for sample in samples[::RESPONSES]] == [prompt.id for prompt in prompts]
        assert rounds.state() == {}
    alone = make_rounds(ToyEngine())
    alone.resume({"step": 6})
    assert [sample.id for sample in alone.next_batch(7)[1]] == [sample.id for sample in seen[6][1]]


def test_the_next_step_is_announced_before_this_one_trains_and_asked_for_alike():
    engine = ToyEngine()
    rounds = make_rounds(engine)
    for step in range(1, STEPS + 1):
        rounds.next_batch(step)
        assert len(engine.begun) == min(step, STEPS - 1)  # nothing is begun after the last step
    assert [ids for ids, _ in engine.begun] == engine.asked[1:]
    late = make_rounds(ToyEngine(), prefetches=False)
    late.next_batch(1)
    assert not late.sampler.engine.begun
    late.prefetch(2)
    assert len(late.sampler.engine.begun) == 1


@pytest.mark.parametrize("over_sampling_ratio", [1.25, 1.5, 2.6])
def test_with_oversampling_each_prompt_has_its_turn_once(over_sampling_ratio):
    engine = ToyEngine()
    rounds = make_rounds(engine, over_sampling_ratio=over_sampling_ratio)
    extra = int(np.ceil(PER_STEP * (over_sampling_ratio - 1)))
    taken = []
    for step in range(1, STEPS + 1):
        prompts, samples = rounds.next_batch(step)
        assert len(engine.asked[-1]) == (PER_STEP + extra) * RESPONSES
        assert len(samples) == PER_STEP * RESPONSES and len(prompts) == PER_STEP
        assert len(rounds.state()["carried"]) == extra
        taken += [sample.id for sample in samples]
    assert len(set(taken)) == len(taken)
    begun = {ids for call in engine.asked for ids in call}
    left = begun - set(taken)
    assert len(left) == extra * RESPONSES
    # Every prompt comes as often as in the order of the stream, up to what is still under way.
    counts = collections.Counter(name.partition("#")[0] for name in begun)
    expected = collections.Counter(prompt.id for prompt in rounds.stream.slice(0, PER_STEP * STEPS + extra))
    assert {name: count / RESPONSES for name, count in counts.items()} == dict(expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_data_ranks_share_the_prompts_and_keep_their_numbers(size):
    found = [make_rounds(ToyEngine(rank), rank, size, over_sampling_ratio=1.75) for rank in range(size)]
    for step in range(1, 8):
        per_rank = [rounds.next_batch(step)[1] for rounds in found]
        assert sum(map(len, per_rank)) == PER_STEP * RESPONSES
        # Each rank takes its share of a step whatever is left over.
        shares = [len(rounds.sampler.dp_shard(range(PER_STEP))) for rounds in found]
        assert [len(samples) // RESPONSES for samples in per_rank] == shares
    ids = [name for rounds in found for name in {i for call in rounds.sampler.engine.asked for i in call}]
    assert len(set(ids)) == len(ids)


def test_what_was_under_way_at_a_kill_is_begun_anew():
    engine = ToyEngine()
    rounds = make_rounds(engine, over_sampling_ratio=1.5)
    for step in range(1, 6):
        rounds.next_batch(step)
    position = rounds.state()
    carried = engine.asked[-1]
    again = make_rounds(ToyEngine(9), over_sampling_ratio=1.5)
    again.resume({"step": 5} | position)
    again.next_batch(6)
    rounds.next_batch(6)
    assert again.sampler.engine.asked[0] == engine.asked[-1]
    assert set(carried) & set(engine.asked[-1])
    # On another number of data ranks the same prompts are under way.
    parts = [make_rounds(ToyEngine(), rank, 2, over_sampling_ratio=1.5) for rank in range(2)]
    for part in parts:
        part.resume(position)
        part.next_batch(6)
    assert sorted(i for part in parts for i in part.sampler.engine.asked[0]) == sorted(engine.asked[-1])
