"""Requests to servers that misbehave: replies are checked, no sample is lost or duplicated, attempts are bounded."""

from __future__ import annotations

import collections
import json
import resource
import time

import numpy as np
import pytest

pytest.importorskip("aiohttp")

from fake_sglang import FakeServer, log_prob_table

from megatron_s2d.config.base import UserError
from megatron_s2d.config.training import ServerConfig
from megatron_s2d.records import Prompt, WeightVersionSpan
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.sampling_client import single_turn
from megatron_s2d.rollout.served import server_pool
from megatron_s2d.rollout.served.backend import PartialRollout
from megatron_s2d.rollout.served.episodes import EpisodeTask
from megatron_s2d.rollout.served.generation import generate_all
from megatron_s2d.rollout.served.replies import ReplyContract, to_partial
from megatron_s2d.rollout.served.server_pool import ServerPool
from megatron_s2d.rollout.sglang.protocol import SglangProtocol

VOCAB_SIZE, EOS = 19, 3
PROTOCOL = SglangProtocol(VOCAB_SIZE)
EXPECTED = ReplyContract("v7", 7, VOCAB_SIZE)
SETTINGS = ServerConfig(max_attempts=3, request_timeout_seconds=30.0, max_concurrent_requests=8)
IMPATIENT = SETTINGS.model_copy(update={"request_timeout_seconds": 2.0})


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(server_pool, "_FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def servers():
    embedding = np.random.default_rng(0).normal(0, 0.1, (VOCAB_SIZE, 6)).astype(np.float32)
    fakes = [FakeServer(embedding, "v7") for _ in range(2)]
    yield fakes
    for server in fakes:
        server.close()


def make_requests(prompts=4, groups=3, **params) -> list[Request]:
    params = SamplingParams(**{"max_new_tokens": 6, "stop_token_ids": (EOS,), **params})
    generator = np.random.default_rng(1)
    requests = []
    for number in range(prompts):
        prompt = Prompt(f"p{number}", generator.integers(0, VOCAB_SIZE, 2 + number), "", "math", None, None)
        requests += [
            Request(f"p{number}#{group}@0", prompt, f"p{number}@0.0", sample_seed(1, 0, prompt.id, group), params)
            for group in range(groups)
        ]
    return requests


def generate(servers, requests, settings=SETTINGS, progress=None):
    pool = ServerPool([server.url for server in servers], settings, PROTOCOL)
    return pool, generate_all(pool, requests, EXPECTED, progress)


def posts(server, path="/generate") -> list[dict]:
    return [body for where, body in server.log if where == path]


def same(left, right) -> bool:
    """Whether the samples and their indices are equal."""
    return left.keys() == right.keys() and all(
        a.id == b.id
        and a.token_ids.tolist() == b.token_ids.tolist()
        and a.rollout_log_probs.tolist() == b.rollout_log_probs.tolist()
        and a.finish_reason == b.finish_reason
        for a, b in ((left[index], right[index]) for index in left)
    )


def test_samples_are_the_replies_to_their_requests(servers):
    requests = make_requests(groups=10)
    steps = []
    _, result = generate(servers, requests, progress=lambda done, total: steps.append((done, total)))
    assert sorted(result.samples) == list(range(40)) and not result.failures
    assert steps[-1] == (40, 40) and len(steps) == 40
    table = log_prob_table(servers[0].embedding)
    for index, sample in result.samples.items():
        request, start = requests[index], len(requests[index].prompt.token_ids)
        assert (sample.id, sample.seed, sample.group_id) == (request.id, request.seed, request.group_id)
        assert sample.token_ids[:start].tolist() == request.prompt.token_ids.tolist()
        expected = table[sample.token_ids[start - 1 : -1], sample.token_ids[start:]]
        assert sample.rollout_log_probs[start:] == pytest.approx(expected, rel=1e-6)
        assert sample.weight_versions == (WeightVersionSpan(start, len(sample.token_ids), 7),)
        assert sample.response_mask.tolist() == [False] * start + [True] * (len(sample.token_ids) - start)
    reasons = collections.Counter(sample.finish_reason for sample in result.samples.values())
    assert reasons["stop"] and reasons["length"]


def test_requests_of_a_group_go_to_one_server_with_different_seeds(servers):
    generate(servers, make_requests())
    seen = [collections.Counter(tuple(body["input_ids"]) for body in posts(server)) for server in servers]
    assert not seen[0].keys() & seen[1].keys()
    assert [sorted(counter.values()) for counter in seen] == [[3, 3], [3, 3]]
    bodies = [body for server in servers for body in posts(server)]
    assert len({body["sampling_params"]["sampling_seed"] for body in bodies}) == 12
    assert len({body["rid"] for body in bodies}) == 12


def test_stop_token_at_the_length_limit_is_a_stop(servers):
    # SGLang itself calls this "length", and the verifier would count the response as truncated.
    requests = make_requests(groups=12, max_new_tokens=2)
    _, result = generate(servers, requests)
    last = [sample for sample in result.samples.values() if sample.response_length == 2]
    ended = [sample for sample in last if sample.token_ids[-1] == EOS]
    assert ended and len(ended) < len(last)
    assert {sample.finish_reason for sample in ended} == {"stop"}
    assert {sample.finish_reason for sample in last if sample.token_ids[-1] != EOS} == {"length"}


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("500", "status 500"),
        ("503", "status 503"),
        ("malformed", "EOF"),
        ("no field", "weight_version"),
        ("fewer log-probs", "log-probabilities for"),
        ("nan", "is nan"),
        ("positive", "is 0.5"),
        ("other token", "where token"),
        ("abort", "out of memory"),
        ("prompt", "prompt tokens"),
        ("vocabulary", "vocabulary"),
    ],
)
def test_invalid_reply_is_retried_a_bounded_number_of_times(servers, fault, word):
    requests = make_requests()
    _, clean = generate(servers, requests)
    servers[0].faults.extend([fault] * 3)
    pool, result = generate(servers, requests)
    assert same(result.samples, clean.samples) and not result.failures and not pool.problems

    for server in servers:
        server.log.clear()
        server.faults.extend([fault] * 1000)
    _, result = generate(servers, requests)
    assert not result.samples and sorted(result.failures) == list(range(12))
    assert all(word in reason and "\n" not in reason for reason in result.failures.values())
    assert sum(len(posts(server)) for server in servers) == 12 * SETTINGS.max_attempts


def test_refused_request_is_an_error_at_once(servers):
    servers[0].faults.extend(["400"] * 100)
    with pytest.raises(UserError, match="refused a request: the reason"):
        generate(servers, make_requests())


def test_truncated_response_is_an_error_that_names_the_context(servers):
    servers[0].faults.append("short")
    with pytest.raises(UserError, match="1 tokens of 6: the server's context is too short"):
        generate(servers, make_requests(stop_token_ids=()))


def test_server_with_other_weights_gets_no_more_requests(servers):
    requests = make_requests()
    _, clean = generate(servers, requests)
    servers[0].log.clear()
    servers[0].faults.extend(["stale"] * 1000)
    settings = SETTINGS.model_copy(update={"max_concurrent_requests": 1})
    pool, result = generate(servers, requests, settings)
    assert same(result.samples, clean.samples)
    assert "'older' instead of 'v7'" in pool.problems[servers[0].url]
    assert len(posts(servers[0])) <= 2  # those in flight when the first reply came


def test_requests_of_a_server_that_is_gone_go_to_another(servers):
    requests = make_requests()
    _, clean = generate(servers, requests)
    servers[0].faults.extend(["drop"] * 1000)
    servers[0].control_faults["/abort_request"] = "drop"
    pool, result = generate(servers, requests)
    assert same(result.samples, clean.samples)
    assert "connection failed" in pool.problems[servers[0].url]


def test_broken_connection_does_not_mark_a_server_failed(servers):
    requests = make_requests()
    _, clean = generate(servers, requests)
    servers[0].faults.append("drop")
    pool, result = generate(servers, requests)
    assert same(result.samples, clean.samples) and not pool.problems


def test_without_servers_every_request_fails_with_the_reason(servers):
    requests = make_requests()
    for server in servers:
        server.close()
    pool, result = generate(servers, requests)
    assert not result.samples and len(result.failures) == 12 and len(pool.problems) == 2
    assert all("connection failed" in reason for reason in result.failures.values())


def test_attempt_that_hangs_is_aborted_and_answered_once(servers):
    requests = make_requests(prompts=2, groups=2)
    _, clean = generate(servers, requests)
    servers[0].faults.append("hang")
    pool, result = generate(servers, requests, IMPATIENT)
    assert same(result.samples, clean.samples) and not pool.problems
    hung = {body["rid"] for body in posts(servers[0])} & {body["rid"] for body in posts(servers[0], "/abort_request")}
    assert len(hung) == 1


def test_server_that_does_not_answer_aborts_is_marked_failed(servers, monkeypatch):
    monkeypatch.setattr(server_pool, "_ABORT_SECONDS", 0.3)
    requests = make_requests(prompts=2, groups=2)
    _, clean = generate(servers, requests)
    servers[0].faults.extend(["hang"] * 100)
    servers[0].control_faults["/abort_request"] = "hang"
    pool, result = generate(servers, requests, IMPATIENT)
    assert same(result.samples, clean.samples)
    assert pool.problems == {servers[0].url: "it hangs"}


INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "raised", "concurrency"),
    [
        ((1024, 4096), 2048 + 512, 2048),
        ((1024, INFINITE), 2048 + 512, 2048),
        ((1024, 1512), 1512, 1000),  # as many as allowed
        ((1024, 1024), 1024, 512),
        ((4096, 4096), None, 2048),
        ((INFINITE, INFINITE), None, 2048),
    ],
)
def test_connections_stay_below_the_limit_of_open_files(monkeypatch, capsys, limits, raised, concurrency):
    """Otherwise servers would be marked failed and restarted."""
    calls = []
    monkeypatch.setattr(server_pool.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(server_pool.resource, "setrlimit", lambda _, new: calls.append(new))
    urls = [f"http://10.0.0.{number}:30000" for number in range(8)]
    assert ServerPool(urls, ServerConfig(max_concurrent_requests=256), PROTOCOL).concurrency == concurrency
    assert calls == ([] if raised is None else [(raised, limits[1])])
    assert ("instead of 2048 requests in flight" in capsys.readouterr().out) == (concurrency < 2048)


def test_requests_in_flight_are_bounded(servers):
    servers[0].faults.extend(["slow"] * 1000)
    settings = SETTINGS.model_copy(update={"max_concurrent_requests": 2})
    busy, max_busy = 0, 0
    original = servers[0].generate

    def counted(body):
        nonlocal busy, max_busy
        busy += 1
        max_busy = max(max_busy, busy)
        try:
            return original(body)
        finally:
            busy -= 1

    servers[0].generate = counted
    generate(servers[:1], make_requests(prompts=3, groups=3), settings)
    assert max_busy == 2


class Words:
    def decode(self, ids):
        return "x" * len(ids)


def test_an_interrupted_response_with_stop_strings_starts_again(servers):
    stalled = set()
    servers[0].holds = lambda body, n: n == 2 and not stalled.add(body["rid"])
    (request,) = make_requests(prompts=1, groups=1, stop_token_ids=(), stop_strings=("y",))
    contract = ReplyContract("v7", 7, VOCAB_SIZE, Words())
    task = EpisodeTask(ServerPool([servers[0].url], SETTINGS, PROTOCOL), contract, lambda request: None)
    task.add({"response": single_turn(request)})
    while not stalled:
        time.sleep(0.01)
    task.pause(interrupt=True)
    servers[0].holds = lambda body, n: False
    task.resume(contract)
    assert task.wait(lambda ended: "response" in ended) == []
    sample = task.take()["response"]
    assert sample.response_length == request.params.max_new_tokens and task.take_measurements()[1] == 2
    task.close()


@pytest.mark.parametrize("ids", [[1, EOS, 2], [1, 99], [1] * 7])
def test_interrupted_reply_is_checked_like_any_other(ids):
    (request,) = make_requests(prompts=1, groups=1)
    reply = PROTOCOL.parse_reply(
        json.dumps(
            {
                "output_ids": ids,
                "meta_info": {
                    "finish_reason": {"type": "abort"},
                    "completion_tokens": len(ids),
                    "weight_version": "v7",
                    "output_token_logprobs": [[-1.0, token, None] for token in ids],
                },
            }
        ).encode()
    )
    assert to_partial(request, reply, EXPECTED) is None
    before = PartialRollout.empty().extended([5], np.array([-2.0], np.float32), 6)
    reply.output_ids, reply.num_output_tokens = [4], 1
    reply.output_log_probs = [(-1.0, 4, None)]
    longer = to_partial(request, reply, EXPECTED, before)
    assert longer.token_ids.tolist() == [5, 4]
    assert (longer.log_probs.tolist(), longer.versions.tolist()) == ([-2, -1], [6, 7])
