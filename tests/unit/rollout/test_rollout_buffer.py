"""Rollout buffer: samples of a step are prefetched, taken when complete, carried over, and restarted after a kill."""

from __future__ import annotations

import collections
import types

import numpy as np
import pytest

pytest.importorskip("torch")

from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import Prompt
from megatron_s2d.rollout.buffer import RolloutBuffer
from megatron_s2d.rollout.engine import SamplingParams, sample_of
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker

NUM_PROMPTS, PER_STEP, RESPONSES, STEPS = 10, 4, 3, 12


class ToyEngine:
    """Answers at once; with ``num_groups`` the groups of a random order are the first to be complete."""

    version = 0

    def __init__(self, seed: int = 0):
        self.generator = np.random.default_rng(seed)
        self.requested: list[list[str]] = []
        self.submitted: list[tuple[list[str], int | None]] = []

    def submit(self, requests, num_groups=None):
        self.submitted.append(([request.id for request in requests], num_groups))

    def generate(self, requests, progress=None, *, num_groups=None):
        self.requested.append([request.id for request in requests])
        groups = list(dict.fromkeys(request.group_id for request in requests))
        assert len(groups) * RESPONSES == len(requests)  # every group has an id of its own
        if num_groups is not None:
            groups = set(self.generator.permutation(groups)[:num_groups].tolist())
        return [
            sample_of(request, np.array([1, 2]), np.zeros(2, np.float32), "stop", self.version)
            for request in requests
            if request.group_id in groups
        ]


def make_prompts() -> list[Prompt]:
    return [Prompt(f"p{number}", np.array([number]), "", "math", None, None) for number in range(NUM_PROMPTS)]


class Alone(HostGroup):
    """A data-parallel rank whose others have no responses."""

    def __init__(self, rank):
        super().__init__()
        self.__dict__["alone_as"] = rank

    def all_gather(self, values):
        return [values[:0]] * self.alone_as + [values]


def make_buffer(engine, rank=0, size=1, **settings) -> RolloutBuffer:
    layout = types.SimpleNamespace(
        dp_rank=rank,
        dp_size=size,
        is_dp_leader=True,
        leader_in_replica=0,
        host_dp=Alone(rank),
        host_replica=HostGroup(),
    )
    worker = RolloutWorker(layout, engine, SamplingParams(4, (0,)), 7, None)
    loader = PromptDataLoader(make_prompts(), PER_STEP, 5)
    return RolloutBuffer(loader, worker, PER_STEP, RESPONSES, STEPS, **settings)


def test_without_oversampling_the_samples_of_a_step_depend_on_its_number_only():
    rollout_buffer = make_buffer(ToyEngine())
    batches = [rollout_buffer.next_batch(step) for step in range(1, STEPS + 1)]
    for step, (prompts, samples) in enumerate(batches, start=1):
        assert [prompt.id for prompt in prompts] == [prompt.id for prompt in rollout_buffer.loader.batch_for_step(step)]
        group_ids = [sample.group_id for sample in samples]
        assert group_ids == [name for name in dict.fromkeys(group_ids) for _ in range(RESPONSES)]
        assert len(set(group_ids)) == PER_STEP
        assert [sample.prompt_id for sample in samples[::RESPONSES]] == [prompt.id for prompt in prompts]
        assert rollout_buffer.state() == {}
    alone = make_buffer(ToyEngine())
    alone.resume({"step": 6})
    assert [sample.id for sample in alone.next_batch(7)[1]] == [sample.id for sample in batches[6][1]]


def test_next_step_is_submitted_before_this_one_trains():
    engine = ToyEngine()
    rollout_buffer = make_buffer(engine)
    for step in range(1, STEPS + 1):
        rollout_buffer.next_batch(step)
        assert len(engine.submitted) == min(step, STEPS - 1)  # nothing is submitted after the last step
    assert [ids for ids, _ in engine.submitted] == engine.requested[1:]
    late = make_buffer(ToyEngine(), prefetches=False)
    late.next_batch(1)
    assert not late.worker.engine.submitted
    late.prefetch(2)
    assert len(late.worker.engine.submitted) == 1


class ClockedEngine(ToyEngine):
    """Servers of a known speed, on a simulated clock: they answer one batch after the other."""

    def __init__(self, seconds: float, *, ahead: bool):
        super().__init__()
        self.seconds, self.ahead = seconds, ahead
        self.now = self.free_at = 0.0
        self.ready: dict[str, float] = {}  # first request of a batch -> when it is answered

    def submit(self, requests, num_groups=None):
        super().submit(requests, num_groups)
        if self.ahead:
            self.begin(requests)

    def begin(self, requests):
        self.free_at = self.ready[requests[0].id] = max(self.now, self.free_at) + self.seconds

    def generate(self, requests, progress=None, *, num_groups=None):
        if requests[0].id not in self.ready:
            self.begin(requests)
        self.now = max(self.now, self.ready.pop(requests[0].id))
        return super().generate(requests, num_groups=num_groups)

    def update_weights(self):
        """As ``one_step_off``: an update waits for the responses in flight."""
        self.now = max([self.now, *self.ready.values()])


def seconds_of_a_run(generation: float, training: float, max_staleness: int) -> float:
    engine = ClockedEngine(generation, ahead=max_staleness > 0)
    rollout_buffer = make_buffer(engine, max_staleness=max_staleness)
    for step in range(1, STEPS + 1):
        rollout_buffer.next_batch(step)
        engine.now += training
        engine.update_weights()
    return engine.now


def test_generation_and_training_overlap_from_staleness_one_on():
    assert seconds_of_a_run(5.0, 5.0, 0) == STEPS * 10.0
    assert seconds_of_a_run(5.0, 5.0, 1) == (STEPS + 1) * 5.0  # 1.8 times as fast
    assert seconds_of_a_run(5.0, 1.0, 1) == STEPS * 5.0 + 1.0
    assert seconds_of_a_run(1.0, 5.0, 1) == STEPS * 5.0 + 1.0


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_requests_are_submitted_as_far_ahead_as_responses_may_be_old(max_staleness):
    engine = ToyEngine()
    rollout_buffer = make_buffer(engine, max_staleness=max_staleness)
    for step in range(1, STEPS + 1):
        rollout_buffer.next_batch(step)
        assert len(engine.submitted) == min(step + max_staleness, STEPS) - 1
        assert list(rollout_buffer.metrics()) == ["rollout/wait_seconds"]
    # Every step takes its own prompts, whatever runs ahead; so does a run that is resumed in between.
    expected = make_buffer(ToyEngine())
    for step in range(1, STEPS + 1):
        expected.next_batch(step)
    assert engine.requested == expected.worker.engine.requested
    assert [ids for ids, _ in engine.submitted] == engine.requested[1:]
    resumed = make_buffer(ToyEngine(), max_staleness=max_staleness)
    resumed.resume({"step": 6})
    for step in range(7, STEPS + 1):
        resumed.next_batch(step)
    assert resumed.worker.engine.requested == engine.requested[6:]
    assert expected.metrics() == {}


@pytest.mark.parametrize("over_sampling_ratio", [1.25, 1.5, 2.6])
def test_oversampling_takes_each_prompt_once_per_epoch(over_sampling_ratio):
    engine = ToyEngine()
    rollout_buffer = make_buffer(engine, over_sampling_ratio=over_sampling_ratio)
    extra = int(np.ceil(PER_STEP * (over_sampling_ratio - 1)))
    taken = []
    for step in range(1, STEPS + 1):
        prompts, samples = rollout_buffer.next_batch(step)
        assert len(engine.requested[-1]) == (PER_STEP + extra) * RESPONSES
        assert len(samples) == PER_STEP * RESPONSES and len(prompts) == PER_STEP
        assert len(rollout_buffer.state()["carried"]) == extra
        taken += [sample.id for sample in samples]
    assert len(set(taken)) == len(taken)
    requested = {ids for call in engine.requested for ids in call}
    assert len(requested - set(taken)) == extra * RESPONSES
    # Every prompt comes as often as in the order of the loader, with those that are still in flight.
    counts = collections.Counter(name.partition("#")[0] for name in requested)
    expected = collections.Counter(prompt.id for prompt in rollout_buffer.loader.slice(0, PER_STEP * STEPS + extra))
    assert {name: count / RESPONSES for name, count in counts.items()} == dict(expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_data_parallel_ranks_take_their_shares_of_the_prompts(size):
    buffers = [make_buffer(ToyEngine(rank), rank, size, over_sampling_ratio=1.75) for rank in range(size)]
    for step in range(1, 8):
        per_rank = [rollout_buffer.next_batch(step)[1] for rollout_buffer in buffers]
        assert sum(map(len, per_rank)) == PER_STEP * RESPONSES
        # Each rank takes its share of a step, however many groups are in flight.
        shares = [len(rollout_buffer.worker.dp_shard(range(PER_STEP))) for rollout_buffer in buffers]
        assert [len(samples) // RESPONSES for samples in per_rank] == shares
    ids = [
        name
        for rollout_buffer in buffers
        for name in {i for call in rollout_buffer.worker.engine.requested for i in call}
    ]
    assert len(set(ids)) == len(ids)


def test_groups_in_flight_at_a_kill_are_restarted():
    engine = ToyEngine()
    rollout_buffer = make_buffer(engine, over_sampling_ratio=1.5)
    for step in range(1, 6):
        rollout_buffer.next_batch(step)
    state = rollout_buffer.state()
    carried = engine.requested[-1]
    again = make_buffer(ToyEngine(9), over_sampling_ratio=1.5)
    again.resume({"step": 5} | state)
    again.next_batch(6)
    rollout_buffer.next_batch(6)
    assert again.worker.engine.requested[0] == engine.requested[-1]
    assert set(carried) & set(engine.requested[-1])
    # On another number of data-parallel ranks the same groups are in flight.
    parts = [make_buffer(ToyEngine(), rank, 2, over_sampling_ratio=1.5) for rank in range(2)]
    for part in parts:
        part.resume(state)
        part.next_batch(6)
    assert sorted(i for part in parts for i in part.worker.engine.requested[0]) == sorted(engine.requested[-1])
