"""Served generation beside training, carried-over groups, and sleeping servers, over toy servers."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

pytest.importorskip("torch")

from fake_sglang import log_prob_table
from served_helpers import change_weights, embedding_of, finish, make_engine, make_requests, max_difference, start

from megatron_s2d.config.base import UserError
from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.sampling_client import single_turn, together

pytestmark = pytest.mark.usefixtures("short_pauses")


def spans(samples) -> set[tuple[int, ...]]:
    return {tuple(span.version for span in sample.weight_versions) for sample in samples}


def max_difference_by_version(tables, samples) -> float:
    """Largest difference from the log-probabilities under the weights that a sample's spans name."""
    largest = 0.0
    for sample in samples:
        for span in sample.weight_versions:
            indices = np.arange(span.start, span.stop)
            expected = tables[span.version][sample.token_ids[indices - 1], sample.token_ids[indices]]
            largest = max(largest, float(np.abs(sample.rollout_log_probs[indices] - expected).max()))
    return largest


def long_requests() -> list[Request]:
    return [
        dataclasses.replace(request, params=SamplingParams(8, ())) for request in make_requests(prompts=2, groups=2)
    ]


@pytest.mark.parametrize("async_mode", ["one_step_off", "partial_rollout"])
def test_next_step_is_generated_while_the_trainer_works(chunks, layout, servers, tmp_path, async_mode):
    engine = make_engine(chunks, layout, tmp_path, servers, async_mode=async_mode)
    tables = {0: log_prob_table(embedding_of(chunks))}
    stalled = set()

    def hold(body, n) -> bool:
        old = async_mode == "partial_rollout" and servers[0].weight_version.endswith("-0")
        return old and n == 3 and not stalled.add(body["rid"])

    for server in servers:
        server.holds = hold
    start(engine, long_requests())
    while async_mode == "partial_rollout" and len(stalled) < 4:
        time.sleep(0.01)
    change_weights(chunks)
    tables[1] = log_prob_table(embedding_of(chunks))
    engine.pause(interrupt=async_mode == "partial_rollout")
    engine.update_weights(chunks, 1)
    samples = finish(engine, long_requests())
    assert [sample.id for sample in samples] == [request.id for request in long_requests()]
    assert spans(samples) == ({(0,)} if async_mode == "one_step_off" else {(0, 1)})
    assert max_difference_by_version(tables, samples) < 1e-5
    engine.close()


def of_step(step: int) -> list[Request]:
    """Four requests of 8 tokens, with ids of their own."""
    return [
        dataclasses.replace(request, id=f"{request.id}.{step}", group_id=f"{request.group_id}.{step}")
        for request in long_requests()
    ]


@pytest.mark.parametrize("async_mode", ["one_step_off", "partial_rollout"])
def test_several_steps_are_generated_ahead(chunks, layout, servers, tmp_path, async_mode):
    """Steps come in order; each token has the version that was current when it was sampled."""
    engine = make_engine(chunks, layout, tmp_path, servers)
    tables, lags = {0: log_prob_table(embedding_of(chunks))}, []
    samples = engine.generate(of_step(1))
    for step in range(2, 5):
        start(engine, of_step(step))
    for step in range(1, 5):
        lags += [step - 1 - span.version for sample in samples for span in sample.weight_versions]
        assert max_difference_by_version(tables, samples) < 1e-5
        assert [sample.id for sample in samples] == [request.id for request in of_step(step)]
        if step == 4:
            break
        change_weights(chunks)
        tables[step] = log_prob_table(embedding_of(chunks))
        engine.pause(interrupt=async_mode == "partial_rollout")
        engine.update_weights(chunks, step)
        samples = finish(engine, of_step(step + 1))
    assert min(lags) >= 0 and max(lags) <= 3
    if async_mode == "one_step_off":  # what was started was complete at the first update
        assert max(lags) == 3
    first, again = engine.measurements(), engine.measurements()
    assert set(first) == {"rollout/producer_wait_seconds", "rollout/discarded_tokens"}
    assert 0 < again["rollout/producer_wait_seconds"] < first["rollout/producer_wait_seconds"]
    engine.close()


def test_validation_samples_beside_what_is_in_flight(chunks, layout, servers, tmp_path):
    """Responses of a step wait at a server; those of a validation are generated meanwhile, with the same weights."""
    engine = make_engine(chunks, layout, tmp_path, servers, async_mode="partial_rollout")
    released = threading.Event()
    for server in servers:
        server.holds = lambda body, n: not released.is_set() and n == 3 and "." in body["rid"]
    start(engine, of_step(1))
    samples = engine.generate(long_requests())
    assert [sample.id for sample in samples] == [request.id for request in long_requests()]
    assert spans(samples) == {(0,)} and not released.is_set()
    released.set()
    assert [sample.id for sample in finish(engine, of_step(1))] == [request.id for request in of_step(1)]
    engine.close()


def test_requests_that_are_given_up_are_discarded_tokens(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers[:1])
    servers[0].holds = lambda body, n: body["rid"].startswith("p0#0") and n == 3
    requests = long_requests()
    start(engine, requests)
    complete = engine.wait(lambda ended: len(ended) == 3)
    assert "p0#0@0" not in complete and len(complete) == 3
    engine.pause(interrupt=True)
    engine.cancel(["p0#0@0", "p0#1@0"])  # of which one was taken
    assert engine.measurements()["rollout/discarded_tokens"] == 3
    servers[0].holds = lambda body, n: False
    start(engine, requests[:1])  # again, under the same name
    engine.update_weights(chunks, 1)
    (sample,) = finish(engine, requests[:1])
    assert spans([sample]) == {(1,)} and sample.response_length == 8
    assert engine.measurements()["rollout/discarded_tokens"] == 0
    engine.close()


def test_server_that_dies_during_training_costs_no_sample(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    servers[0].faults.extend(["drop"] * 100)
    servers[0].control_faults["/abort_request"] = "drop"
    start(engine, make_requests())
    time.sleep(0.2)
    servers[0].faults.clear()
    servers[0].control_faults.clear()
    engine.pause(interrupt=True)
    engine.update_weights(chunks, 1)
    samples = finish(engine, make_requests())
    assert [sample.id for sample in samples] == [request.id for request in make_requests()]
    assert not engine._server_group.pool.problems
    engine.close()


def test_request_refused_during_training_raises_in_wait(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    servers[0].faults.append("400")
    start(engine, make_requests())
    engine.pause(interrupt=False)
    engine.update_weights(chunks, 1)
    with pytest.raises(UserError, match="refused a request"):
        finish(engine, make_requests())
    engine.close()


def test_incomplete_groups_go_on_with_the_next_weights(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers[:1])
    tables = {0: log_prob_table(embedding_of(chunks))}
    servers[0].holds = lambda body, n: len(body["input_ids"]) in (2, 5) and n == 2
    requests = [dataclasses.replace(r, params=SamplingParams(6, ())) for r in make_requests(prompts=4, groups=3)]
    groups = {f"p{n}@0.0": [r for r in requests if r.prompt.id == f"p{n}"] for n in range(4)}
    engine.start({name: together([single_turn(r) for r in group]) for name, group in groups.items()})
    taken = engine.wait(lambda ended: len(ended) == 2)
    assert sorted(taken) == ["p1@0.0", "p2@0.0"]
    engine.pause(interrupt=True)
    change_weights(chunks)
    tables[1] = log_prob_table(embedding_of(chunks))
    engine.update_weights(chunks, 1)
    servers[0].holds = lambda body, n: False
    first = [sample for group in taken.values() for sample in group]
    second = [sample for group in engine.wait(lambda ended: len(ended) == 2).values() for sample in group]
    assert sorted(sample.id for sample in first + second) == sorted(request.id for request in requests)
    assert (0, 1) in spans(second) and max_difference_by_version(tables, first + second) < 1e-5
    engine.close()


def test_servers_sleep_between_generation_and_update(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, enable_memory_saver=True)
    for server in servers:
        server.log.clear()
    engine.sleep()
    engine.sleep()
    engine.update_weights(chunks, 1)
    assert max_difference(chunks, engine.generate(make_requests())) < 1e-5
    control = [(path, body.get("tags")) for path, body in servers[0].log if path != "/generate"]
    assert control == [
        ("/flush_cache?timeout=120", None),
        ("/release_memory_occupation", None),
        ("/resume_memory_occupation", ["weights", "cuda_graph"]),
        ("/pause_generation", None),
        ("/flush_cache?timeout=120", None),
        ("/update_weights_from_disk", None),
        ("/resume_memory_occupation", ["kv_cache"]),
        ("/continue_generation", None),
        ("/weights_checker", None),
    ]
    engine.sleep()
    assert max_difference(chunks, engine.generate(make_requests())) < 1e-5  # woken up without an update
    engine.close()
