"""The served engine over a toy server: weights are pushed and proven, faults and restarts cost no sample."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import httpx
from fake_sglang import FakeServer, log_prob_table, read_embedding

from megatron_s2d.config.base import UserError
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import RolloutConfig, ServerConfig, SglangConfig
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.models.build import build_model
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Prompt, WeightVersionSpan
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.served import server_pool
from megatron_s2d.rollout.served.backend import NO_REQUIREMENTS, ServerRequirements, WeightUpdateFailed
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.sglang.backend import sglang_server_group
from megatron_s2d.rollout.sglang.weight_sync import refuse_remote, trainer_address

VOCAB_SIZE = 27
SPEC = dataclasses.replace(ModelConfig(preset="tiny-student").resolve(VOCAB_SIZE), initializer_range=0.1)
SGLANG = SglangConfig(startup_timeout_seconds=60.0)
SERVER = ServerConfig(max_attempts=2, request_timeout_seconds=30.0)


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


@pytest.fixture
def chunks(layout):
    return build_model(SPEC, layout, seed=3)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(server_pool, "_FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def servers():
    found = [FakeServer(np.zeros((VOCAB_SIZE, 4), np.float32)) for _ in range(2)]
    yield found
    for server in found:
        server.close()


def embedding_of(chunks) -> np.ndarray:
    return chunks[0].embedding.word_embeddings.weight.detach()[:VOCAB_SIZE].numpy()


def toy_score(chunks):
    """The trainer's own forward, for the toy model."""

    def score(samples):
        found = []
        for sample in samples:
            table = log_prob_table(embedding_of(chunks), sample.temperature or 1.0).astype(np.float32)
            values = np.zeros(len(sample.token_ids), np.float32)
            values[1:] = table[sample.token_ids[:-1], sample.token_ids[1:]]
            found.append(np.where(sample.response_mask, values, 0))
        return found

    return score


def make_engine(
    chunks, layout, directory, servers=(), requirements=NO_REQUIREMENTS, tokenizer=None, **settings
) -> ServedEngine:
    parts = {
        kind: {name: value for name, value in settings.items() if name in kind.model_fields}
        for kind in (SglangConfig, ServerConfig, RolloutConfig)
    }
    rollout = RolloutConfig(
        engine="sglang",
        sglang=SGLANG.model_copy(update=parts[SglangConfig]),
        server=SERVER.model_copy(update=parts[ServerConfig]),
        **parts[RolloutConfig],
    )
    urls = [server.url for server in servers]
    return ServedEngine(
        sglang_server_group(
            chunks, SPEC, layout, toy_score(chunks), rollout, directory, urls=urls,
            requirements=requirements, tokenizer=tokenizer
        )
    )


def make_requests(prompts=4, groups=3) -> list[Request]:
    params = SamplingParams(6, (3,))
    generator = np.random.default_rng(1)
    found = []
    for number in range(prompts):
        prompt = Prompt(f"p{number}", generator.integers(0, VOCAB_SIZE, 2 + number), "", "math", None, None)
        for group in range(groups):
            seed = sample_seed(1, 0, prompt.id, group)
            found.append(Request(f"p{number}#{group}@0", prompt, f"p{number}@0.0", seed, params))
    return found


def change(chunks) -> None:
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.add_(0.05)


def tokens(samples) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in samples]


def gap(chunks, samples) -> float:
    pairs = zip(samples, toy_score(chunks)(samples), strict=True)
    return max(float(np.abs(sample.rollout_log_probs - score).max()) for sample, score in pairs)


def test_what_is_pushed_is_what_is_sampled_from(chunks, layout, servers, tmp_path, capsys):
    engine = make_engine(chunks, layout, tmp_path, servers, bucket_bytes=4000)
    first = engine.generate(make_requests())
    assert gap(chunks, first) < 1e-5
    change(chunks)
    engine.update_weights(chunks, 5)
    second = engine.generate(make_requests())
    assert gap(chunks, second) < 1e-5 < gap(chunks, first)
    assert {span for sample in second for span in sample.weight_versions} == {
        WeightVersionSpan(sample.prompt_length, len(sample.token_ids), 5) for sample in second
    }
    assert engine.metrics()["weight_sync/max_log_prob_diff"] < 1e-5 and engine.metrics()["weight_sync/gb_per_s"] > 0
    assert "GB/s" in capsys.readouterr().out
    paths = [path for path, _ in servers[0].log if path != "/generate"]
    push = ["/pause_generation", "/flush_cache?timeout=120", "/update_weights_from_disk", "/continue_generation"]
    assert paths == [*push, "/weights_checker"] * 2
    engine.close()
    assert not (tmp_path / "weights").exists()


def test_replicas_whose_digests_differ_get_the_weights_again(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    servers[0].digests, servers[1].digests = itertools.repeat("a"), itertools.chain(["b"], itertools.repeat("a"))
    for server in servers:
        server.log.clear()
    engine.update_weights(chunks, 1)
    assert not engine._server_group.pool.problems and next(servers[1].digests) == "a"
    for server in servers:
        assert [path for path, _ in server.log].count("/update_weights_from_disk") == 2
    servers[1].digests = itertools.repeat("c")
    with pytest.raises(UserError, match="digest of its weights is not that of the other servers"):
        engine.update_weights(chunks, 2)


def test_progress_counts_every_response(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    calls = []
    engine.generate(make_requests(), lambda done, total: calls.append((done, total)))
    assert calls == [(done, 12) for done in range(1, 13)]
    engine.close()


def test_the_files_of_a_push_are_a_whole_checkpoint(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, bucket_bytes=4000)
    engine.update_weights(chunks, 1)
    (directory,) = (tmp_path / "weights").iterdir()  # the older version is gone
    checkpoint = HfCheckpoint(directory)
    assert checkpoint.spec == dataclasses.replace(SPEC) and len(checkpoint.shards) > 3
    for name, tensor in chain.from_iterable(export_buckets(chunks, SPEC, layout)):
        assert torch.equal(checkpoint.read(name), tensor), name
    engine.close()


def test_the_servers_of_another_run_do_not_share_its_versions(chunks, layout, servers, tmp_path):
    one, other = (make_engine(chunks, layout, tmp_path / name, servers) for name in "ab")
    with pytest.raises(UserError, match="instead of"):
        one._rollout = one._rollout.model_copy(update={"server": SERVER.model_copy(update={"max_restarts": 0})})
        one.generate(make_requests())
    assert len(other.generate(make_requests())) == 12


def test_a_server_that_says_it_updated_and_did_not_gets_no_requests(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    servers[0].control_faults["/update_weights_from_disk"] = "ignore"
    change(chunks)
    engine.update_weights(chunks, 1)
    servers[0].log.clear()
    samples = engine.generate(make_requests())
    assert gap(chunks, samples) < 1e-5
    assert not [path for path, _ in servers[0].log if path == "/generate"]
    # It is given the weights again with the next push, and used.
    servers[0].control_faults.clear()
    engine.update_weights(chunks, 2)
    engine.generate(make_requests())
    assert [path for path, _ in servers[0].log if path == "/generate"]


@pytest.mark.parametrize("fault", ["500", "ignore"])
def test_a_push_that_reaches_no_server_is_an_error(chunks, layout, servers, tmp_path, fault):
    engine = make_engine(chunks, layout, tmp_path, servers)
    change(chunks)
    for server in servers:
        server.control_faults["/update_weights_from_disk"] = fault
    with pytest.raises(UserError, match="no SGLang server holds the current weights") as error:
        engine.update_weights(chunks, 1)
    assert ("status 500" if fault == "500" else "nats") in str(error.value) and "\n" not in str(error.value)


def test_a_server_with_stale_weights_is_updated_again(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    clean = engine.generate(make_requests())
    for server in servers:
        server.weight_version = "restored from somewhere"
        server.embedding = np.zeros_like(server.embedding)
    again = engine.generate(make_requests())
    assert tokens(again) == tokens(clean) and gap(chunks, again) < 1e-5


def test_requests_that_keep_failing_stop_with_one_line(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, max_restarts=1)
    for server in servers:
        server.faults.extend(["nan"] * 1000)
    with pytest.raises(UserError, match="after 1 recoveries too.*is nan") as error:
        engine.generate(make_requests())
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_weights_come_only_once_nothing_runs(chunks, layout, servers, tmp_path):
    """SGLang ends itself when it has to forget old keys and values and a request still runs."""
    engine = make_engine(chunks, layout, tmp_path, servers, max_restarts=0)
    for server in servers:
        server.log.clear()
        server.control_faults["/flush_cache?timeout=120"] = "400"
    with pytest.raises(UserError, match="no SGLang server holds the current weights .*flush_cache"):
        engine.update_weights(chunks, 1)
    assert not [path for server in servers for path, _ in server.log if path.startswith("/update")]


def test_weights_stay_until_every_server_has_read_newer_ones(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, max_restarts=0)
    engine.update_weights(chunks, 1)
    assert len(servers[0].seen_versions) == 2  # the older ones, and those that are read now
    (kept,) = (path.name for path in (tmp_path / "weights").iterdir())
    servers[1].control_faults["/update_weights_from_disk"] = "500"
    for version in (2, 3, 4):  # servers that are in trouble may still read; older versions do not pile up
        engine.update_weights(chunks, version)
        assert len(list((tmp_path / "weights").iterdir())) == 2
    servers[1].control_faults.clear()
    engine.update_weights(chunks, 4)
    assert len({kept, *(path.name for path in (tmp_path / "weights").iterdir())}) == 2


def test_a_slow_server_is_not_given_up(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, max_restarts=0)
    servers[0].weight_version = "another"  # so that it is looked after
    servers[0].health_faults.extend(["503", "503"])
    engine.generate(make_requests())
    engine.update_weights(chunks, 1)
    assert not engine._server_group.pool.problems and not servers[0].health_faults
    servers[0].weight_version = "another"
    servers[0].health_faults.extend(["503"] * 3)
    engine.generate(make_requests())
    engine.update_weights(chunks, 2)
    assert list(engine._server_group.pool.problems) == [servers[0].url]


def test_a_prompt_that_would_harm_a_server_is_refused_here(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    request = make_requests()[0]
    prompt = dataclasses.replace(request.prompt, token_ids=np.array([1, VOCAB_SIZE]))
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        engine.generate([dataclasses.replace(request, prompt=prompt)])


def test_given_tokens_are_scored_with_the_pushed_weights(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    samples = engine.generate(make_requests())
    change(chunks)
    engine.update_weights(chunks, 1)
    for found, expected in zip(engine.score(samples), toy_score(chunks)(samples), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    table = log_prob_table(embedding_of(chunks))
    for sample, top in zip(samples, engine.top_tokens(samples, 4), strict=True):
        for place in range(1, len(sample.token_ids)):
            row = table[sample.token_ids[place - 1]]
            assert top.ids[place].tolist() == np.argsort(-row)[:4].tolist()
            assert top.log_probs[place] == pytest.approx(np.sort(row)[::-1][:4], rel=1e-5)
            rest = 1 - np.exp(np.sort(row)[::-1][:4]).sum()
            if rest > 1e-3:
                assert top.log_tail[place] == pytest.approx(np.log(rest), abs=1e-3)
            assert np.exp(top.log_tail[place]) == pytest.approx(rest, abs=2e-6)
    whole = engine.top_tokens(samples, VOCAB_SIZE)
    assert all(np.isneginf(top.log_tail[1:]).all() for top in whole)


@pytest.mark.parametrize("fault", ["500", "shifted", "fewer", "nan", "stale", "fewer replies"])
def test_a_wrong_score_is_asked_for_again(chunks, layout, servers, tmp_path, fault):
    engine = make_engine(chunks, layout, tmp_path, servers)
    samples = engine.generate(make_requests())
    servers[0].score_faults.extend([fault] * 2)
    for found, expected in zip(engine.score(samples), toy_score(chunks)(samples), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_server_that_caps_the_likeliest_tokens_is_named(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, max_restarts=0)
    samples = engine.generate(make_requests())
    for server in servers:
        server.score_faults.extend(["capped"] * 1000)
    with pytest.raises(UserError, match="3 likeliest tokens instead of 4: does the server cap them"):
        engine.top_tokens(samples, 4)


def test_samples_of_a_temperature_are_not_scored(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    samples = [dataclasses.replace(sample, temperature=0.7) for sample in engine.generate(make_requests())]
    with pytest.raises(UserError, match="sampled at temperature 0.7"):
        engine.score(samples)


def test_tensors_stay_on_this_machine():
    with pytest.raises(UserError, match="http://10.0.0.2:30000 is another machine"):
        refuse_remote(["http://localhost:1", "http://10.0.0.2:30000"])


def test_a_group_is_met_where_its_servers_reach_the_trainer():
    assert trainer_address(["http://127.0.0.1:1", "http://localhost:2"]) == "127.0.0.1"
    assert trainer_address(["http://127.0.0.1:1", "http://127.0.0.2:2"]) == "127.0.0.1"
    with pytest.raises(WeightUpdateFailed, match="no route to that machine"):
        trainer_address(["http://no-such-machine.invalid:1"])


# ---------------------------------------------------------------- what a server must be


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("task:modular_arithmetic", tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"is_generation": False}}, "serves embeddings"),
        ({"model": {"architectures": ["LlamaForCausalLM"]}}, "a LlamaForCausalLM, and the model is a Qwen3ForCausalLM"),
        ({"model": {"preferred_sampling_params": {"temperature": 0.6, "min_p": 0.1}}}, r"of its own .*\(min_p\)"),
        ({"info": {"max_req_input_len": 90}}, "sequences of at most 94 tokens, and the stage has some of 100.* 108"),
        ({"info": {"dtype": "bfloat16"}}, "has dtype bfloat16, and the trainer computes in float32"),
        ({"info": {"dtype": "auto", "quantization": "fp8"}}, "has quantization fp8"),
    ],
)
def test_a_server_that_differs_is_named_before_it_gets_weights(chunks, layout, servers, tmp_path, fields, message):
    for name, value in fields.items():
        setattr(servers[1], name, value)
    with pytest.raises(UserError, match=message) as error:
        make_engine(chunks, layout, tmp_path, servers, requirements=ServerRequirements(max_length=100))
    assert servers[1].url in str(error.value) and "\n" not in str(error.value)
    assert not [path for server in servers for path, _ in server.log if path.startswith("/update")]


@pytest.mark.parametrize("size", [VOCAB_SIZE - 1, VOCAB_SIZE + 1])
def test_a_server_of_another_vocabulary_is_named(chunks, layout, servers, tmp_path, size):
    servers[0].embedding = np.zeros((size, 4), np.float32)
    with pytest.raises(UserError, match=f"vocabulary of another size than the model's {VOCAB_SIZE}"):
        make_engine(chunks, layout, tmp_path, servers)


def test_a_precision_may_differ_where_the_tolerance_is_given(chunks, layout, servers, tmp_path):
    servers[0].info = {"dtype": "bfloat16"}
    make_engine(chunks, layout, tmp_path, servers, weight_check_tolerance=0.1)


class OtherTokenizer:
    """As ``tokenizer``, but for the ids of two tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text):
        return {"input_ids": [{9: 10, 10: 9}.get(token, token) for token in self.tokenizer(text)["input_ids"]]}


def test_tokenizer_and_template_are_compared(chunks, layout, servers, tmp_path, tokenizer):
    for server in servers:
        server.tokenizer, server.template = tokenizer, ""
    requirements = ServerRequirements(params=SamplingParams(4, (1,), stop_strings=("7 8",)))
    make_engine(chunks, layout, tmp_path, servers, requirements, tokenizer).close()
    servers[1].template = "3 "
    with pytest.raises(UserError, match="another chat template"):
        make_engine(chunks, layout, tmp_path, servers, requirements, tokenizer)
    servers[1].template, servers[1].tokenizer = None, OtherTokenizer(tokenizer)
    with pytest.raises(UserError, match=r"another tokenizer .*'7 8' is \[10, 9\] there and \[9, 10\] here"):
        make_engine(chunks, layout, tmp_path, servers, requirements, tokenizer)
    servers[1].tokenizer = None
    with pytest.raises(UserError, match="no tokenizer, which stop strings need"):
        make_engine(chunks, layout, tmp_path, servers, requirements, tokenizer)


def test_the_temperature_is_proven_before_the_first_step(chunks, layout, servers, tmp_path):
    requirements = ServerRequirements(params=SamplingParams(6, (3,), temperature=0.7))
    make_engine(chunks, layout, tmp_path, servers, requirements).close()
    servers[1].original_log_probs = True
    for tolerance in (None, 50.0):  # a wide one does not hide it
        with pytest.raises(UserError, match="at temperature 0.7 .*those of temperature 1") as error:
            make_engine(chunks, layout, tmp_path, servers, requirements, weight_check_tolerance=tolerance)
        assert servers[1].url in str(error.value)
    # At temperature 1 both are the same.
    make_engine(chunks, layout, tmp_path, servers, ServerRequirements(params=SamplingParams(6, (3,)))).close()


def test_caps_of_a_teachers_server_are_found_before_the_first_step(chunks, layout, servers, tmp_path):
    requirements = ServerRequirements(max_length=60, top_k=8)
    make_engine(chunks, layout, tmp_path, servers, requirements).close()
    servers[0].cap = 7
    with pytest.raises(UserError, match="60 tokens, with the 8 likeliest at each, and did not: .* 7 likeliest tokens"):
        make_engine(chunks, layout, tmp_path, servers, requirements)
    servers[0].cap, servers[0].longest = None, 59
    for top_k in (0, 8):
        with pytest.raises(UserError, match="sequences of 60 tokens.* longer than the model's context") as error:
            make_engine(chunks, layout, tmp_path, servers, dataclasses.replace(requirements, top_k=top_k))
    assert servers[0].url in str(error.value)


# ---------------------------------------------------------------- servers that the engine starts


@pytest.fixture
def interpreter(tmp_path) -> Path:
    """A program that takes the place of the interpreter with sglang and starts the toy server, or the toy router."""
    path, here = tmp_path / "interpreter", Path(__file__).parent
    path.write_text(
        f'#!/bin/sh\ncase "$2" in sglang_router*) file=fake_router.py ;; *) file=fake_sglang.py ;; esac\n'
        f'exec {sys.executable} {here}/$file "$@"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def processes(word: str) -> list[int]:
    found = subprocess.run(["pgrep", "-f", "--", word], capture_output=True, text=True, check=False).stdout.split()
    return [int(number) for number in found if int(number) != os.getpid()]


def test_servers_are_started_with_the_weights_and_end_with_the_engine(chunks, layout, interpreter, tmp_path):
    engine = make_engine(chunks, layout, tmp_path / "engine", python=str(interpreter), num_servers=2)
    samples = engine.generate(make_requests())
    assert gap(chunks, samples) < 1e-5
    assert len(processes(str(tmp_path / "engine"))) == 4  # two servers, each with its watch
    said = (tmp_path / "engine" / "server-1.log").read_text()
    assert "serving" in said and said.count("frozen") == 1
    engine.close()
    assert not processes(str(tmp_path / "engine"))


def test_a_server_that_dies_mid_batch_is_started_anew_with_the_current_weights(chunks, layout, interpreter, tmp_path):
    engine = make_engine(chunks, layout, tmp_path / "engine", python=str(interpreter))
    change(chunks)
    engine.update_weights(chunks, 1)
    clean = engine.generate(make_requests())
    (server,) = engine._server_group.pool.servers
    old = server.url
    for kind, count in (("slow", 4), ("die", 1)):
        httpx.post(f"{old}/fault", json={"kind": kind, "count": count})
    again = engine.generate(make_requests())
    assert server.url != old
    assert tokens(again) == tokens(clean) and [s.id for s in again] == [r.id for r in make_requests()]
    assert gap(chunks, again) < 1e-5
    engine.close()


def test_one_of_two_servers_dies_and_is_back_with_the_next_push(chunks, layout, interpreter, tmp_path):
    engine = make_engine(chunks, layout, tmp_path / "engine", python=str(interpreter), num_servers=2)
    clean = engine.generate(make_requests())
    old = [server.url for server in engine._server_group.pool.servers]
    httpx.post(f"{old[1]}/fault", json={"kind": "die"})
    assert tokens(engine.generate(make_requests())) == tokens(clean)  # the other one answered
    assert [bool(server.problem) for server in engine._server_group.pool.servers] == [False, True]
    change(chunks)
    engine.update_weights(chunks, 1)
    new = [server.url for server in engine._server_group.pool.servers]
    assert not engine._server_group.pool.problems and new[0] == old[0] and new[1] != old[1]
    samples = engine.generate(make_requests())
    assert gap(chunks, samples) < 1e-5
    engine.close()


def test_an_attached_server_that_is_gone_does_not_hold_up_a_push(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    servers[0].close()
    engine.generate(make_requests())
    change(chunks)
    engine.update_weights(chunks, 1)
    assert gap(chunks, engine.generate(make_requests())) < 1e-5
    assert list(engine._server_group.pool.problems) == [servers[0].url]


def test_a_server_that_cannot_start_is_one_clear_line(chunks, layout, interpreter, tmp_path):
    with pytest.raises(UserError, match="ended while it started .RuntimeError: no such device.") as error:
        make_engine(chunks, layout, tmp_path / "engine", python=str(interpreter), extra_args=["--fail-at-start"])
    assert "\n" not in str(error.value) and "server-0.log" in str(error.value)


def test_a_server_that_stays_alive_without_its_port_is_not_waited_for(chunks, layout, interpreter, tmp_path):
    with pytest.raises(UserError, match="another program took the port"):
        make_engine(chunks, layout, tmp_path / "engine", python=str(interpreter), extra_args=["--port-is-taken"])


def test_behind_a_router_a_stale_reply_has_every_server_updated(chunks, layout, servers, interpreter, tmp_path):
    engine = make_engine(chunks, layout, tmp_path / "engine", servers, router=True, python=str(interpreter))
    change(chunks)
    engine.update_weights(chunks, 1)
    servers[1].faults.append("stale")  # the router does not say who answered
    samples = engine.generate(make_requests())
    assert [sample.id for sample in samples] == [request.id for request in make_requests()]
    assert gap(chunks, samples) < 1e-5 and not engine._server_group.pool.problems
    for server in servers:
        paths = [path for path, body in server.log if path == "/update_weights_from_disk"]
        assert len(paths) == 3  # at the start, by the push, after the stale reply
        assert any(isinstance(body.get("rid"), str) for path, body in server.log if path == "/generate")
    engine.close()


def test_a_router_that_dies_mid_batch_is_started_anew_and_costs_no_sample(
    chunks, layout, servers, interpreter, tmp_path
):
    engine = make_engine(chunks, layout, tmp_path / "engine", servers, router=True, python=str(interpreter))
    clean = engine.generate(make_requests())
    old = engine._server_group.pool.router.url
    httpx.post(f"{old}/fault", json={"die_after": 5})
    again = engine.generate(make_requests())
    router = engine._server_group.pool.router
    assert router.url != old and not engine._server_group.pool.problems
    assert tokens(again) == tokens(clean)
    found = httpx.get(f"{router.url}/workers").json()["workers"]
    assert {worker["url"] for worker in found} == {server.url for server in servers}
    engine.close()


def test_servers_do_not_outlive_a_killed_trainer(interpreter, tmp_path):
    embedding = np.zeros((VOCAB_SIZE, 4), np.float32)
    info = {"dtype": "F32", "shape": [VOCAB_SIZE, 4], "data_offsets": [0, embedding.nbytes]}
    text = json.dumps({"model.embed_tokens.weight": info}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + embedding.tobytes())
    index = {"weight_map": {"model.embed_tokens.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_embedding(tmp_path).shape == (VOCAB_SIZE, 4)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from megatron_s2d.config.training import SglangConfig\n"
        "from megatron_s2d.rollout.sglang.server import SglangServer\n"
        f"server = SglangServer(SglangConfig(python={str(interpreter)!r}), Path({str(tmp_path)!r}),\n"
        f"    Path({str(tmp_path / 'log')!r}), number=0, weight_version='x', max_positions=8, dtype='float32',\n"
        "    max_tokens=9)\n"
        "server.wait(time.monotonic() + 60); print('ready', flush=True); time.sleep(100)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "ready\n"
    assert processes(f"--model-path {tmp_path}")
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    deadline = time.monotonic() + 20
    while processes(f"--model-path {tmp_path}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(f"--model-path {tmp_path}")


# ---------------------------------------------------------------------- beside training, carried over, resting


def spans(samples) -> set[tuple[int, ...]]:
    return {tuple(span.version for span in sample.weight_versions) for sample in samples}


def split_gap(tables, samples) -> float:
    """Largest difference from the log-probabilities under the weights that a sample's spans name."""
    worst = 0.0
    for sample in samples:
        for span in sample.weight_versions:
            places = np.arange(span.start, span.stop)
            expected = tables[span.version][sample.token_ids[places - 1], sample.token_ids[places]]
            worst = max(worst, float(np.abs(sample.rollout_log_probs[places] - expected).max()))
    return worst


def long_requests() -> list[Request]:
    return [
        dataclasses.replace(request, params=SamplingParams(8, ())) for request in make_requests(prompts=2, groups=2)
    ]


@pytest.mark.parametrize("async_mode", ["one_step_off", "partial_rollout"])
def test_what_the_next_step_needs_is_generated_while_the_trainer_works(chunks, layout, servers, tmp_path, async_mode):
    engine = make_engine(chunks, layout, tmp_path, servers, async_mode=async_mode)
    tables = {0: log_prob_table(embedding_of(chunks))}
    held = set()

    def hold(body, n) -> bool:
        old = async_mode == "partial_rollout" and servers[0].weight_version.endswith("-0")
        return old and n == 3 and not held.add(body["rid"])

    for server in servers:
        server.holds = hold
    engine.submit(long_requests())
    while async_mode == "partial_rollout" and len(held) < 4:
        time.sleep(0.01)
    change(chunks)
    tables[1] = log_prob_table(embedding_of(chunks))
    engine.update_weights(chunks, 1)
    samples = engine.generate(long_requests())
    assert [sample.id for sample in samples] == [request.id for request in long_requests()]
    assert spans(samples) == ({(0,)} if async_mode == "one_step_off" else {(0, 1)})
    assert split_gap(tables, samples) < 1e-5
    with pytest.raises(RuntimeError, match="other requests were submitted"):
        engine.submit(long_requests())
        engine.generate(make_requests())
    engine.close()


def test_generation_beside_the_trainer_is_off_unless_asked_for(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    engine.submit(long_requests())
    asked = [body.get("rid") for server in servers for path, body in server.log if path == "/generate"]
    assert asked and not any(isinstance(rid, str) for rid in asked)  # checks and probes alone
    engine.close()


def test_a_server_that_dies_beside_the_trainer_costs_no_sample(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, async_mode="partial_rollout")
    servers[0].faults.extend(["drop"] * 100)
    servers[0].control_faults["/abort_request"] = "drop"
    engine.submit(make_requests())
    time.sleep(0.2)
    servers[0].faults.clear()
    servers[0].control_faults.clear()
    engine.update_weights(chunks, 1)
    samples = engine.generate(make_requests())
    assert [sample.id for sample in samples] == [request.id for request in make_requests()]
    assert not engine._server_group.pool.problems
    engine.close()


def test_a_refused_request_beside_the_trainer_is_an_error_when_it_is_asked_for(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, async_mode="one_step_off")
    servers[0].faults.append("400")
    engine.submit(make_requests())
    engine.update_weights(chunks, 1)
    with pytest.raises(UserError, match="refused a request"):
        engine.generate(make_requests())
    engine.close()


def test_groups_that_are_late_are_carried_over_whole(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers[:1])
    tables = {0: log_prob_table(embedding_of(chunks))}
    servers[0].holds = lambda body, n: len(body["input_ids"]) in (2, 5) and n == 2
    requests = [dataclasses.replace(r, params=SamplingParams(6, ())) for r in make_requests(prompts=4, groups=3)]
    first = engine.generate(requests, num_groups=2)
    assert [sample.group_id for sample in first] == ["p1@0.0"] * 3 + ["p2@0.0"] * 3
    change(chunks)
    tables[1] = log_prob_table(embedding_of(chunks))
    engine.update_weights(chunks, 1)
    servers[0].holds = lambda body, n: False
    rest = [request for request in requests if request.group_id in ("p0@0.0", "p3@0.0")]
    second = engine.generate(rest, num_groups=2)
    assert sorted(sample.id for sample in first + second) == sorted(request.id for request in requests)
    assert (0, 1) in spans(second) and split_gap(tables, first + second) < 1e-5
    engine.close()


def test_servers_rest_between_generation_and_push(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, enable_memory_saver=True)
    for server in servers:
        server.log.clear()
    engine.sleep()
    engine.sleep()
    engine.update_weights(chunks, 1)
    assert gap(chunks, engine.generate(make_requests())) < 1e-5
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
    assert gap(chunks, engine.generate(make_requests())) < 1e-5  # the weights come back without a push, too
    engine.close()
