"""Rollout buffer: what is in flight, what a step takes, how old it is; kills; both sides on a simulated clock."""

from __future__ import annotations

import asyncio
import collections
import types

import numpy as np
import pytest

pytest.importorskip("torch")

from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import Prompt
from megatron_s2d.rollout.buffer import BufferPolicy, RolloutBuffer
from megatron_s2d.rollout.engine import SamplingParams, sample_of, version_spans
from megatron_s2d.rollout.group_filters import GroupFilter
from megatron_s2d.rollout.sampler import PromptDataLoader, RolloutWorker
from megatron_s2d.rollout.sampling_client import Completion
from megatron_s2d.verify import Verdict

NUM_PROMPTS, PER_STEP, RESPONSES, STEPS = 10, 4, 3, 12


class ToyEngine:
    """Completes every call, in no time unless ``seconds`` says how long a group takes; knows the time."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.now, self.version = seconds, 0.0, 0
        self.requested: list[list[str]] = []

    def generate(self, requests, progress=None):
        self.requested.append([request.id for request in requests])
        groups = {request.group_id for request in requests}
        assert len(groups) * RESPONSES == len(requests)  # every group has an id of its own
        self.now += self.seconds * len(groups)
        return [sample_of(r, np.array([1, 2]), np.zeros(2, np.float32), "stop", self.version) for r in requests]

    def update_weights(self, chunks, version):
        self.version = version

    def metrics(self):
        return {}


class ServerEngine(ToyEngine):
    """Answers one group after the other on the simulated clock, beside the trainer; a group keeps its first version.

    seconds: of a group; a function of its name, or a number. parallel: groups are answered at the same time.
    """

    def __init__(self, seconds=0.0, *, parallel=False):
        super().__init__(seconds)
        self.parallel = parallel
        self.free_at, self.is_paused = 0.0, False
        self.ready: dict[str, tuple[float, object, int]] = {}  # name -> when it is complete, episode, version
        self.started: list[str] = []
        self.num_discarded = 0

    def start(self, episodes, priority=0):
        for name, episode in episodes.items():
            assert name not in self.ready
            self.started.append(name)
            seconds = self.seconds(name) if callable(self.seconds) else self.seconds
            self.free_at = (self.now if self.parallel else max(self.now, self.free_at)) + seconds
            self.ready[name] = (self.free_at, episode, None if self.is_paused else self.version)

    def wait(self, is_enough):
        self.is_paused = False
        order = sorted(self.ready, key=lambda name: self.ready[name][0])
        ended = {name for name in order if self.ready[name][0] <= self.now}
        while not is_enough(ended):
            name = next(name for name in order if name not in ended)
            self.now = max(self.now, self.ready[name][0])
            ended.add(name)
        return {name: self.answer(*self.ready.pop(name)[1:]) for name in order if name in ended}

    def answer(self, episode, version):
        engine = self

        class Client:
            async def sample(self, token_ids, params, *, seed, request_id, priority=0):
                spans = version_spans(np.full(2, engine.version if version is None else version))
                return Completion(np.array([1, 2]), np.zeros(2, np.float32), "stop", spans)

        return asyncio.run(episode(Client()))

    def pause(self, *, interrupt):
        self.is_paused = True
        if not interrupt:
            self.now = max([self.now, *(time for time, *_ in self.ready.values())])

    def cancel(self, names):
        for name in names:
            if name in self.ready:
                self.num_discarded += 1
                self.free_at -= max(0.0, self.ready.pop(name)[0] - self.now)

    def update_weights(self, chunks, version):
        assert self.is_paused
        super().update_weights(chunks, version)
        self.is_paused = False
        for name, (time, episode, first) in self.ready.items():  # what was started in the pause begins now
            self.ready[name] = (time, episode, version if first is None else first)

    def measurements(self):
        return {"rollout/producer_wait_seconds": 0.0, "rollout/discarded_tokens": 0.0}


def make_prompts(count: int = NUM_PROMPTS) -> list[Prompt]:
    return [Prompt(f"p{number}", np.array([number]), "", "math", None, None) for number in range(count)]


class Alone(HostGroup):
    """A data-parallel rank whose others have no responses."""

    def __init__(self, rank):
        super().__init__()
        self.__dict__["alone_as"] = rank

    def all_gather(self, values):
        return [values[:0]] * self.alone_as + [values]


def make_buffer(engine, rank=0, size=1, rewards=None, prompts=NUM_PROMPTS, **policy) -> RolloutBuffer:
    layout = types.SimpleNamespace(
        dp_rank=rank,
        dp_size=size,
        is_dp_leader=True,
        leader_in_replica=0,
        host_dp=Alone(rank),
        host_replica=HostGroup(),
    )
    tokenizer = types.SimpleNamespace(decode=lambda ids, **_: "")
    worker = RolloutWorker(layout, engine, SamplingParams(4, (0,)), 7, tokenizer, rewards)
    loader = PromptDataLoader(make_prompts(prompts), PER_STEP, 5)
    return RolloutBuffer(loader, worker, PER_STEP, RESPONSES, STEPS, BufferPolicy(**policy))


def servers(seed: int = 0) -> ServerEngine:
    """Groups take 0 to 3 seconds, each its own time."""
    return ServerEngine(lambda name: np.random.default_rng([seed, *name.encode()]).random() * 3)


def train(rollout_buffer, first: int = 1, last: int = STEPS, seconds: float = 0.0) -> list:
    """Train steps ``first`` to ``last``; return the batch of each. The version counts steps."""
    batches = []
    for step in range(first, last + 1):
        batch = rollout_buffer.next_batch(step)
        for sample in batch.samples:
            for span in sample.weight_versions:
                assert step - 1 - span.version <= rollout_buffer.policy.max_staleness
        batches.append(batch)
        rollout_buffer.worker.engine.now += seconds
        rollout_buffer.update_weights([], step)
    return batches


def groups_of(batches) -> list[list[str]]:
    return [list(dict.fromkeys(sample.group_id for sample in batch.samples)) for batch in batches]


def test_without_staleness_every_step_is_one_call_of_its_own_prompts():
    """As before there was a buffer: the requests of a step are a function of its number, in one call, just in time."""
    rollout_buffer = make_buffer(ToyEngine())
    batches = train(rollout_buffer)
    worker, loader = rollout_buffer.worker, rollout_buffer.loader
    for step, batch in enumerate(batches, start=1):
        prompts = loader.batch_for_step(step)
        expected = [r.id for g in worker.groups(prompts, RESPONSES, step) for r in g.requests]
        assert worker.engine.requested[step - 1] == expected == [sample.id for sample in batch.samples]
        assert [prompt.id for prompt in batch.prompts] == [prompt.id for prompt in prompts]
        assert {span.version for s in batch.samples for span in s.weight_versions} == {step - 1}
    assert len(worker.engine.requested) == STEPS and rollout_buffer.metrics() == rollout_buffer.state() == {}
    alone = make_buffer(ToyEngine())
    alone.resume({"step": 6})
    assert [sample.id for sample in alone.next_batch(7).samples] == [sample.id for sample in batches[6].samples]


POLICIES = {
    "in the trainer, 1": {"max_staleness": 1},
    "in the trainer, 4": {"max_staleness": 4},
    "one step off": {"max_staleness": 1, "async_mode": "one_step_off"},
    "partial, 4": {"max_staleness": 4, "async_mode": "partial_rollout"},
    "over-sampled, 0": {"over_sampling_ratio": 1.5},
    "over-sampled, 1": {"max_staleness": 1, "over_sampling_ratio": 1.5},
    "over-sampled beside, 2": {"max_staleness": 2, "over_sampling_ratio": 1.75, "async_mode": "partial_rollout"},
    "over-sampled beside, 4": {"max_staleness": 4, "over_sampling_ratio": 2.6, "async_mode": "one_step_off"},
}


def engine_for(policy, seed: int = 0):
    return servers(seed) if BufferPolicy(**policy).runs_beside else ToyEngine()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("interval", [1, 3])
def test_kills_lose_and_repeat_no_labelled_prompt(policy, interval):
    """The run is killed after a few steps, again and again, and goes on from its last checkpoint at another speed.

    In the steps that count, every group comes once, and the prompts are those of the loader's order.
    """
    expected = groups_of(train(make_buffer(engine_for(policy), **policy)))
    counted: dict[int, list[str]] = {}
    state, seed = {"step": 0}, 0
    while STEPS not in counted:
        seed, first = seed + 1, state["step"] + 1
        rollout_buffer = make_buffer(engine_for(policy, seed), **policy)
        rollout_buffer.resume(state)
        rollout_buffer.update_weights([], first - 1)
        for step in range(first, min(STEPS, first + interval) + 1):
            (counted[step],) = groups_of(train(rollout_buffer, step, step))
            if step % interval == 0:
                state = {"step": step} | rollout_buffer.state()
    taken = [name for step in sorted(counted) for name in counted[step]]
    assert len(set(taken)) == len(taken) == STEPS * PER_STEP
    assert not rollout_buffer._flights
    prompts = collections.Counter(name.partition("@")[0] for name in taken)
    assert prompts == collections.Counter(prompt.id for prompt in rollout_buffer.loader.slice(0, STEPS * PER_STEP))
    if "over_sampling_ratio" not in policy:  # what a resumed run repeats: the same groups, step by step
        assert [counted[step] for step in sorted(counted)] == expected


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_no_group_is_older_than_the_bound(policy):
    rollout_buffer = make_buffer(engine_for(policy), **policy)
    ages = []
    for step in range(1, STEPS + 1):
        batch = rollout_buffer.next_batch(step)
        assert len(batch.samples) == PER_STEP * RESPONSES
        ages += [step - 1 - span.version for s in batch.samples for span in s.weight_versions]
        rollout_buffer.worker.engine.now += 1.0
        rollout_buffer.update_weights([], step)
        assert rollout_buffer.metrics()["rollout/staleness_max"] <= policy.get("max_staleness", 0)
    bound = policy.get("max_staleness", 0)
    assert max(ages) <= bound and (max(ages) == bound or "over_sampling_ratio" in policy)


def test_what_gets_too_old_starts_again_and_counts_as_discarded():
    policy = {"over_sampling_ratio": 1.5}
    rollout_buffer = make_buffer(servers(), **policy)
    train(rollout_buffer, 1, 1)
    engine = rollout_buffer.worker.engine
    (again,) = [[name for name in engine.started if engine.started.count(name) == 2]]
    assert len(set(again)) == 2 and {name.partition("@")[2] for name in again} == {"1.0"}  # the two left over
    assert engine.num_discarded == 2
    # A complete group that no step took is discarded as well.
    ready = make_buffer(ServerEngine(), **policy)
    train(ready, 1, 2)
    assert ready.metrics()["rollout/discarded_tokens"] == 2 * RESPONSES * 2


def test_requests_in_flight_go_as_far_ahead_as_responses_may_be_old():
    for max_staleness in (1, 3):
        engine = ServerEngine()
        rollout_buffer = make_buffer(engine, max_staleness=max_staleness, async_mode="partial_rollout")
        for step in range(1, STEPS + 1):
            rollout_buffer.next_batch(step)
            assert len(engine.started) == PER_STEP * min(step + max_staleness, STEPS)
            rollout_buffer.update_weights([], step)
        assert len(set(engine.started)) == len(engine.started)


def seconds_of_a_run(generation: float, training: float, **policy) -> float:
    """Seconds of all steps, by the simulated clock."""
    engine = (ServerEngine if policy else ToyEngine)(generation / PER_STEP)
    train(make_buffer(engine, **policy), seconds=training)
    return engine.now


def test_generation_and_training_overlap_from_staleness_one_on():
    waits = {"max_staleness": 1, "async_mode": "one_step_off"}
    assert seconds_of_a_run(5.0, 5.0) == STEPS * 10.0
    assert seconds_of_a_run(5.0, 5.0, **waits) == (STEPS + 1) * 5.0
    assert seconds_of_a_run(5.0, 5.0) / seconds_of_a_run(5.0, 5.0, **waits) > 1.8
    assert seconds_of_a_run(5.0, 1.0, **waits) == STEPS * 5.0 + 1.0
    assert seconds_of_a_run(1.0, 5.0, **waits) == STEPS * 5.0 + 1.0
    # A bound of 4 evens out steps that take longer than others.
    uneven = {"async_mode": "partial_rollout"}
    assert seconds_of_a_run(5.0, 5.0, max_staleness=4, **uneven) == (STEPS + 1) * 5.0


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_oversampling_waits_for_the_slowest_group_only_when_it_is_due(max_staleness):
    """One of six groups in flight takes 20 seconds, the others one, side by side; a step needs four of them."""
    prompt = make_buffer(ToyEngine(), over_sampling_ratio=1.5).prompts_of_step(1)[0]
    slow = f"{prompt.id}@1.0"
    engine = ServerEngine(lambda name: 20.0 if name == slow else 1.0, parallel=True)
    rollout_buffer = make_buffer(engine, max_staleness=max_staleness, over_sampling_ratio=1.5)
    for step in range(1, max_staleness + 1):
        assert slow not in groups_of(train(rollout_buffer, step, step))[0]
        assert engine.now == step
    assert slow in groups_of(train(rollout_buffer, max_staleness + 1, max_staleness + 1))[0]
    assert engine.now == 20.0 and rollout_buffer.metrics()["rollout/staleness_max"] == max_staleness


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("ratio", [1.75, 2.6])
def test_data_parallel_ranks_take_their_shares_of_the_prompts(size, ratio):
    policy = {"over_sampling_ratio": ratio, "max_staleness": 1}
    buffers = [make_buffer(servers(rank), rank, size, **policy) for rank in range(size)]
    for step in range(1, STEPS + 1):
        per_rank = [rollout_buffer.next_batch(step).samples for rollout_buffer in buffers]
        assert sum(map(len, per_rank)) == PER_STEP * RESPONSES
        # Each rank takes its share of a step, however many groups are in flight.
        shares = [len(rollout_buffer.worker.dp_shard(range(PER_STEP))) for rollout_buffer in buffers]
        assert [len(samples) // RESPONSES for samples in per_rank] == shares
        for rollout_buffer in buffers:
            rollout_buffer.update_weights([], step)
    started = [name for rollout_buffer in buffers for name in set(rollout_buffer.worker.engine.started)]
    assert len(set(started)) == len(started) == STEPS * PER_STEP and not any(b._flights for b in buffers)


def test_groups_in_flight_at_a_kill_start_again_on_any_number_of_ranks():
    policy = {"over_sampling_ratio": 1.5, "max_staleness": 1}
    rollout_buffer = make_buffer(servers(), **policy)
    train(rollout_buffer, 1, 5)
    state = {"step": 5} | rollout_buffer.state()
    in_flight = [flight.name for flight in rollout_buffer._flights]
    assert len(in_flight) == len(state["carried"]) == 2
    for size in (1, 2):
        parts = [make_buffer(servers(9), rank, size, **policy) for rank in range(size)]
        for part in parts:
            part.resume(state)
            part.next_batch(6)
        started = [name for part in parts for name in part.worker.engine.started]
        new = [f"{prompt.id}@6.0" for prompt in rollout_buffer.prompts_of_step(6)]
        assert sorted(started) == sorted(in_flight + new)


class ScriptedRewards:
    """Rewards by prompt; others get a correct and then wrong responses."""

    def __init__(self, rewards):
        self.rewards, self.graded = rewards, []

    def grade(self, prompts, texts):
        verdicts = []
        for index, prompt in enumerate(prompts):
            self.graded.append(prompt.id)
            rewards = self.rewards.get(prompt.id, (1.0, 0.0, 0.0))
            reward = rewards[index % RESPONSES]
            verdicts.append(Verdict(reward, "correct" if reward == 1.0 else "wrong"))
        return verdicts


FILTERED = [
    {},
    {"max_staleness": 1},
    POLICIES["partial, 4"],
    POLICIES["over-sampled beside, 2"],
    POLICIES["over-sampled, 0"],
]


@pytest.mark.parametrize("policy", FILTERED, ids=str)
@pytest.mark.parametrize("prompts", [30, 4])
def test_groups_without_a_signal_are_replaced(policy, prompts):
    def buffer_with(rewards, **settings):
        grader = ScriptedRewards(rewards)
        filter_ = GroupFilter(**({"max_num_gen_batches": 2} | settings))
        return make_buffer(engine_for(policy), rewards=grader, prompts=prompts, group_filter=filter_, **policy)

    first = [prompt.id for prompt in buffer_with({}).next_batch(1).prompts]
    equal = {first[0]: (1.0,) * 3, first[2]: (0.0,) * 3}
    rollout_buffer = buffer_with(equal)
    batch = rollout_buffer.next_batch(1)
    names = list(dict.fromkeys(sample.prompt_id for sample in batch.samples))
    num_taken = len({sample.group_id for sample in batch.samples})
    assert num_taken == PER_STEP and len(batch.samples) == PER_STEP * RESPONSES
    if prompts == 4:  # without further prompts, they keep the size of the step
        assert set(names) == set(first) and batch.generated == batch.samples
        return
    used = {prompt.id for prompt in rollout_buffer.prompts_of_step(1)}
    extra = [p.id for p in rollout_buffer.loader.resample(1, 1, used, 2)]
    assert names == [first[1], first[3], *extra]
    assert [prompt.id for prompt in batch.prompts] == first + extra and len(batch.generated) == 6 * RESPONSES
    assert not {flight.name for flight in rollout_buffer._flights} & {sample.group_id for sample in batch.generated}
    # A range of pass rates: all others have 1 of 3.
    easy = buffer_with({first[0]: (1.0, 1.0, 0.0)}, max_pass_rate=0.5).next_batch(1)
    assert first[0] not in {sample.prompt_id for sample in easy.samples}
    hard = buffer_with({first[0]: (0.5, 0.0, 0.0)}, min_pass_rate=0.1).next_batch(1)
    assert first[0] not in {sample.prompt_id for sample in hard.samples} and len(hard.samples) == len(easy.samples)
    plain = buffer_with({first[0]: (0.5, 0.0, 0.0)}).next_batch(1)
    assert first[0] in {sample.prompt_id for sample in plain.samples}
