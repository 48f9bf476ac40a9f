"""Routes of served responses (routing replay): requested, checked, kept by version when a response is continued."""

import dataclasses
import time

import numpy as np
import pytest
from fake_sglang import toy_routes
from served_helpers import VOCAB_SIZE, change_weights, finish, make_engine, make_requests, start

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.errors import UserError
from megatron_s2d.models.build import build_model
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.served.backend import ServerRequirements

SPEC = dataclasses.replace(ModelConfig(preset="tiny-moe").resolve(VOCAB_SIZE), initializer_range=0.1)
ROUTING = (SPEC.num_layers, SPEC.num_experts, SPEC.num_experts_per_tok)
ROUTED = ServerRequirements(params=SamplingParams(6, ()), routed_experts=True)


@pytest.fixture
def chunks(layout):
    return build_model(SPEC, layout, seed=3)


def routed_engine(chunks, layout, directory, servers, **settings):
    for server in servers:
        server.info["enable_return_routed_experts"] = True
    return make_engine(chunks, layout, directory, servers, ROUTED, spec=SPEC, **settings)


def generate_bodies(servers) -> list[dict]:
    """The requests that are not of a check."""
    bodies = [body for server in servers for path, body in server.log if path == "/generate"]
    return [body for body in bodies if str(body.get("rid")).startswith("p")]


def assert_routes_are_of_the_sampling_version(sample) -> None:
    """Row t belongs to the version that sampled token t + 1; the prompt's to that of the first response token."""
    versions = np.full(len(sample.token_ids), sample.weight_versions[0].version)
    for span in sample.weight_versions:
        versions[span.start : span.stop] = span.version
    expected = [
        toy_routes([token], f"x-{version}", ROUTING)[0]
        for token, version in zip(sample.token_ids[:-1], versions[1:], strict=True)
    ]
    np.testing.assert_array_equal(sample.routed_experts, np.stack(expected))
    assert sample.routed_experts.dtype == np.uint8


def test_every_token_has_the_routes_of_the_server(chunks, layout, servers, tmp_path):
    engine = routed_engine(chunks, layout, tmp_path, servers)
    for sample in engine.generate(make_requests()):
        assert_routes_are_of_the_sampling_version(sample)
    assert {body["routed_experts_start_len"] for body in generate_bodies(servers)} == {0}
    engine.close()


def test_a_continued_response_keeps_the_routes_of_each_part(chunks, layout, servers, tmp_path):
    engine = routed_engine(chunks, layout, tmp_path, servers)
    requests = [dataclasses.replace(r, params=SamplingParams(6, ())) for r in make_requests(prompts=2, groups=2)]
    stalled = set()

    def hold(body, n) -> bool:
        return servers[0].weight_version.endswith("-0") and n == 3 and not stalled.add(body["rid"])

    for server in servers:
        server.holds = hold
    start(engine, requests)
    while len(stalled) < len(requests):
        time.sleep(0.01)
    for server in servers:
        server.log.clear()
    change_weights(chunks)
    engine.pause(interrupt=True)
    engine.update_weights(chunks, 1)
    samples = finish(engine, requests)
    for sample in samples:
        assert [(span.version, span.stop - span.start) for span in sample.weight_versions] == [(0, 3), (1, 3)]
        assert_routes_are_of_the_sampling_version(sample)
    for body in generate_bodies(servers):  # prompt and three tokens, of which the last one has no route yet
        assert body["routed_experts_start_len"] == len(body["input_ids"]) - 1
    engine.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no routes", "no routed experts, which the request asked for"),
        ("fewer routes", "routed experts instead of 7 tokens x 2 layers x 2"),
        ("unknown expert", "routed experts from 1 to 4 of a model with 4"),
        ("same expert", "same expert twice"),
        ("no base64", "meta_info.routed_experts: not the base64 of int32 numbers"),
    ],
)
def test_replies_with_wrong_routes_are_no_samples(chunks, layout, servers, tmp_path, short_pauses, fault, message):
    engine = routed_engine(chunks, layout, tmp_path, servers[:1], max_restarts=0)
    request = dataclasses.replace(make_requests(1, 1)[0], params=SamplingParams(6, ()))
    assert len(request.prompt.token_ids) == 2
    servers[0].faults.append(fault)
    (sample,) = engine.generate([request])  # the second attempt is right
    assert_routes_are_of_the_sampling_version(sample)
    servers[0].faults.extend([fault] * 2)
    with pytest.raises(UserError, match=message):
        engine.generate([dataclasses.replace(request, id="p9#0@1")])
    engine.close()


def test_servers_that_do_not_record_routes_are_refused(chunks, layout, servers, tmp_path):
    with pytest.raises(UserError, match="start it with --enable-return-routed-experts, or set rollout.routing_replay"):
        make_engine(chunks, layout, tmp_path, servers, ROUTED, spec=SPEC)


def test_started_servers_record_routes_only_where_they_are_replayed(chunks, layout, interpreter, tmp_path):
    logs = []
    for requirements in (ROUTED, dataclasses.replace(ROUTED, routed_experts=False)):
        directory = tmp_path / str(len(logs))
        engine = make_engine(chunks, layout, directory, (), requirements, spec=SPEC, python=str(interpreter))
        routes = [sample.routed_experts for sample in engine.generate(make_requests(2, 1))]
        logs.append((directory / "server-0.log").read_text())
        engine.close()
        assert all((route is not None) == requirements.routed_experts for route in routes)
    assert ["--enable-return-routed-experts" in log for log in logs] == [True, False]
