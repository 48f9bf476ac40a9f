"""The contract of engines by request, on the engine in the process and on the stand-in of other tests."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import engine_contract as contract
import numpy as np
import pytest
from fake_sglang import log_prob_table
from stand_in_engine import StandInEngine

torch = pytest.importorskip("torch")

from served_helpers import change_weights, embedding_of, make_engine

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.models.build import build_model
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.megatron import running_batch
from megatron_s2d.rollout.megatron.engine import MegatronEngine

VOCAB_SIZE, EOS = 27, 5


def in_process(layout, **options) -> contract.Subject:
    spec = dataclasses.replace(ModelConfig(preset="tiny-llama").resolve(VOCAB_SIZE), initializer_range=0.25)
    chunks = build_model(spec, layout, seed=3)
    engine = MegatronEngine(chunks, VOCAB_SIZE, layout, **options)
    states = {}  # of the weights by version: the first ones are kept when they change

    def score(version, token_ids, temperature):
        now = {name: value.clone() for name, value in chunks[0].state_dict().items() if value is not None}
        if version in states:
            chunks[0].load_state_dict(states[version], strict=False)
        with torch.no_grad():
            logits = chunks[0](torch.from_numpy(token_ids)[None], None, None)[0, :, :VOCAB_SIZE].double()
        chunks[0].load_state_dict(now, strict=False)
        log_probs = torch.log_softmax(logits / temperature, dim=-1)
        values = log_probs[:-1].gather(1, torch.from_numpy(token_ids)[1:, None]).squeeze(1)
        return np.concatenate([[0.0], values.numpy()])

    subject = contract.Subject(engine, score, VOCAB_SIZE, EOS)

    def update() -> int:
        states[0] = {name: value.clone() for name, value in chunks[0].state_dict().items() if value is not None}
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.mul_(0.8)
        engine.update_weights(chunks, 1)
        return 1

    subject.update = update
    return subject


def stand_in() -> contract.Subject:
    engine = StandInEngine(VOCAB_SIZE, stalls_from=100)  # on a fast machine they would end before they are aborted

    def score(version, token_ids, temperature):
        table = engine.log_probs(version, temperature)
        return np.concatenate([[0.0], table[token_ids[:-1], token_ids[1:]]])

    subject = contract.Subject(engine, score, VOCAB_SIZE, EOS)

    def update() -> int:
        engine.update_weights(None, 1)
        return 1

    subject.update = update
    return subject


def served(engine, chunks) -> contract.Subject:
    tables = {0: embedding_of(chunks).copy()}

    def score(version, token_ids, temperature):
        table = log_prob_table(tables[version], temperature)
        return np.concatenate([[0.0], table[token_ids[:-1], token_ids[1:]]])

    subject = contract.Subject(engine, score, VOCAB_SIZE, EOS)

    def update() -> int:
        change_weights(chunks)
        tables[1] = embedding_of(chunks).copy()
        engine.update_weights(chunks, 1)
        return 1

    subject.update = update
    return subject


@pytest.fixture
def make_served(chunks, layout, servers, tmp_path, short_pauses):
    """Returns a function that attaches an engine to toy servers, which stall long responses at their third token."""
    engines = []
    for server in servers:
        server.holds = lambda body, n: body["sampling_params"]["max_new_tokens"] > 100 and n == 3

    def make(**settings) -> contract.Subject:
        with torch.no_grad():  # flatter distributions than those of other tests, where tokens repeat
            chunks[0].embedding.word_embeddings.weight.mul_(0.3)
        engines.append(make_engine(chunks, layout, tmp_path, servers, **settings))
        return served(engines[-1], chunks)

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=["in-process", "three rows", "stand-in", "servers"])
def subject(request, layout) -> contract.Subject:
    if request.param == "servers":
        return request.getfixturevalue("make_served")()
    if request.param == "stand-in":
        return stand_in()
    return in_process(layout, **({"max_batch_size": 3} if request.param == "three rows" else {}))


def test_log_probs_are_the_trainers_and_responses_end_where_they_should(subject):
    contract.check_log_probs_and_ends(subject)


def test_seeds_determine_tokens(subject):
    contract.check_seeds(subject)


def test_episodes_continue_their_own_tokens(subject):
    contract.check_turns(subject)


def test_aborted_requests_keep_their_tokens(subject):
    contract.check_abort(subject)


def test_tokens_carry_the_version_of_their_weights(subject):
    contract.check_versions(subject, subject.update)


def test_errors_end_what_they_concern(subject):
    contract.check_errors(subject)


def test_waiting_requests_take_the_rows_of_ended_ones(layout, monkeypatch):
    """Fewer passes than in batches one after the other, and the same tokens."""
    prompts = contract.prompts_of(in_process(layout), 12)
    limits = [2, 2, 2, 30, 2, 2, 2, 2, 2, 2, 2, 2]
    episodes = [
        contract.one_request(tokens, SamplingParams(limit, ()), number)
        for number, (tokens, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    wide = in_process(layout).engine.run(episodes)
    narrow = in_process(layout, max_batch_size=4)
    rows, decode = [], running_batch.RunningBatch.decode

    def counting(batch):
        rows.append(batch.num_alive)
        decode(batch)

    monkeypatch.setattr(running_batch.RunningBatch, "decode", counting)
    for completion, expected in zip(narrow.engine.run(episodes), wide, strict=True):
        assert np.array_equal(completion.token_ids, expected.token_ids)
    # The long response has 29 tokens after its first; all others fit beside it.
    assert len(rows) == 29 and max(rows) <= 4 and rows.count(4) > 2


def test_how_long_tools_take_changes_no_batch_and_no_bit(layout, monkeypatch):
    """Two turns with a tool between them; the tools end in one order, and then in the other one."""
    prompts = contract.prompts_of(in_process(layout), 6)
    params = SamplingParams(4, ())
    joined, add = [], running_batch.RunningBatch.add

    def recording(batch, requests):
        joined.append([request.id for request in requests])
        add(batch, requests)

    monkeypatch.setattr(running_batch.RunningBatch, "add", recording)

    def run(seconds):
        def episode_of(number, tokens):
            async def episode(client):
                first = await client.sample(tokens, params, seed=number, request_id=f"e{number}.0")
                await asyncio.sleep(seconds[number])
                tokens_so_far = np.concatenate([tokens, first.token_ids, [2]])
                return first, await client.sample(tokens_so_far, params, seed=number + 9, request_id=f"e{number}.1")

            return episode

        joined.clear()
        engine = in_process(layout, max_batch_size=4).engine  # two requests wait at a time
        turns = engine.run([episode_of(number, tokens) for number, tokens in enumerate(prompts)])
        return list(joined), [(c.token_ids.tolist(), c.log_probs.tolist()) for episode in turns for c in episode]

    upwards = [0.02 * number for number in range(6)]
    batches, completions = run(upwards)
    assert (batches, completions) == run(upwards[::-1])
    assert sorted(name for batch in batches for name in batch) == [f"e{n}.{turn}" for n in range(6) for turn in (0, 1)]


def long_conversation(tokens: np.ndarray, number: int, params: SamplingParams):
    async def episode(client):
        turns = []
        for turn in range(2):
            prompt = tokens if not turns else np.concatenate([*turns[-1][:1], turns[-1][1].token_ids, [2]])
            completion = await client.sample(prompt, params, seed=number, request_id=f"u{number}.{turn}")
            turns.append((prompt, completion))
        return turns

    return episode


@pytest.mark.parametrize("async_mode", ["one_step_off", "partial_rollout"])
def test_weights_change_in_the_middle_of_an_episode(make_served, servers, async_mode):
    subject = make_served()
    params = SamplingParams(9, ())
    stalled = threading.Event()

    def hold(body, n) -> bool:
        """Until the update, first turns stop before their last token (or second turns before their first one)."""
        old = servers[0].weight_version.endswith("-0")
        held = old and (n == 8 if async_mode == "partial_rollout" else ".1~" in body["rid"])
        if held:
            stalled.set()
        return held and async_mode == "partial_rollout"

    for server in servers:
        server.holds = hold
    prompts = contract.prompts_of(subject, 4)
    subject.engine.start({str(n): long_conversation(tokens, n, params) for n, tokens in enumerate(prompts)})
    assert stalled.wait(60)
    subject.engine.pause(interrupt=async_mode == "partial_rollout")
    subject.update()
    conversations = subject.engine.wait(lambda ended: len(ended) == 4).values()
    spans = set()
    for turns in conversations:
        for prompt, completion in turns:
            contract.check_record(subject, prompt, completion, params)
            assert completion.finish_reason == "length"
            spans.add(tuple(span.version for span in completion.weight_versions))
    assert spans <= {(0,), (1,), (0, 1)}
    if async_mode == "partial_rollout":
        assert (0, 1) in spans and (1,) in spans
    else:  # requests in flight are waited for
        assert (0, 1) not in spans


def test_failing_servers_delay_episodes_only(make_served, servers):
    subject = make_served()
    servers[0].faults.extend(["500"] * 6)
    servers[1].faults.extend(["500"] * 6)
    contract.check_turns(subject)
    assert not servers[0].faults and not servers[1].faults


def test_requests_wait_by_priority(make_served, servers):
    subject = make_served(max_concurrent_requests=1)
    servers[1].holds = servers[0].holds = lambda body, n: False
    order = [5, 3, 4, 0, 2, 1]
    episodes = [
        contract.one_request(np.array([1 + number]), SamplingParams(2, ()), number, priority=number) for number in order
    ]
    before = [len(server.log) for server in servers]
    subject.engine.run(episodes)
    sent = [
        int(body["rid"].partition("~")[0][1:])
        for server, first in zip(servers, before, strict=True)
        for path, body in server.log[first:]
        if path == "/generate" and isinstance(body["rid"], str)
    ]
    assert sorted(sent) == sorted(order)
    # Two requests may be in flight: the first two go as they come, the other four by priority.
    assert len(sent) == 6
