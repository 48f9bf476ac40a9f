"""Rollouts from a real SGLang server on this machine, started once; skipped if sglang is not installed."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="sglang is not installed (extra `sglang`)"
)

torch = pytest.importorskip("torch")

import httpx
from s2d import metrics, s2d
from sglang_model import (
    EOS,
    SPEC,
    VOCAB_SIZE,
    change,
    make_policy,
    make_requests,
    rollout_gap,
    rollout_settings,
)

from megatron_s2d.config.base import UserError
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.rollout.served.backend import NO_REQUIREMENTS, ServerRequirements
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.served.startup_checks import StartupChecks
from megatron_s2d.rollout.sglang.backend import sglang_server_group
from megatron_s2d.rollout.sglang.compatibility import SglangCompatibility
from megatron_s2d.rollout.sglang.protocol import SglangProtocol
from megatron_s2d.teachers.frozen import ServedTeachers, TeacherRouter, TopKTeacher
from megatron_s2d.teachers.served import ServedTopK

ROOT = Path(__file__).parents[2]
WORKFLOW = """
name: served
seed: 1
tokenizer: task:modular_arithmetic
precision: float32
lengths: {max_prompt_length: 16}
models:
  student: {preset: tiny-student}
data:
  corpus: {type: task, split: corpus, num_operations: 2}
  pool: {type: task, split: pool, num_operations: 2, num_prompts: 64}
  problems: {type: task, split: eval, num_operations: 2, num_prompts: 32}
rollout: {engine: sglang, max_mismatch_kl: 1.0e-6}
stages:
  base: {type: sft, model: student, data: corpus, steps: 40, global_batch_size: 64, optimizer: {lr: 5.0e-3}}
  grpo:
    type: grpo
    init: base
    prompts: pool
    steps: 3
    train_batch_size: 8
    num_generations: 4
    sampling: &sampling {temperature: 1.0, max_response_length: 8}
    optimizer: {lr: 1.0e-3}
  opd:
    {type: opd, init: grpo, teacher: base, prompts: pool, steps: 2, train_batch_size: 4, num_generations: 2,
     num_mini_batches: 2, sampling: *sampling, optimizer: {lr: 1.0e-3}}
arms: {opd: opd}
evaluation: {prompts: problems, samples_per_prompt: 2, sampling: *sampling}
"""


@pytest.fixture(scope="module")
def policy():
    initialize_distributed()
    return make_policy(build_layout(ParallelConfig()))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("task:modular_arithmetic", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def started(policy, tokenizer, tmp_path_factory):
    """An engine with a server of its own, which the tests below also attach to."""
    start_time = time.perf_counter()
    engine = ServedEngine(ServerGroup(
        policy.chunks, SPEC, policy.layout, policy.score, rollout_settings(), tmp_path_factory.mktemp("sglang"),
        tokenizer=tokenizer,
    ))  # fmt: skip
    print(f"the server was ready after {time.perf_counter() - start_time:.0f} s")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(started) -> str:
    return started._server_group.pool.servers[0].url


@pytest.fixture
def attach(policy, tokenizer, url, tmp_path):
    """attach(settings): an engine on the running server."""
    engines = []

    def make(
        sync: str = "disk", needs: ServerRequirements | None = None, other_tokenizer=None, **settings
    ) -> ServedEngine:
        server_group = ServerGroup(
            policy.chunks,
            SPEC,
            policy.layout,
            policy.score,
            rollout_settings(sync, **settings),
            tmp_path / str(len(engines)),
            urls=[url],
            needs=needs or ServerRequirements(),
            tokenizer=other_tokenizer or tokenizer,
        )
        engines.append(ServedEngine(server_group))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def span_gap(policy, samples, version: int) -> float:
    """Return the largest log-probability difference to the trainer over the tokens sampled by ``version``."""
    max_gap = 0.0
    for sample, score in zip(samples, policy.score(samples), strict=True):
        for span in sample.weight_versions:
            if span.version == version:
                tokens = slice(span.start, span.stop)
                max_gap = max(max_gap, float(np.abs(sample.rollout_log_probs[tokens] - score[tokens]).max()))
    return max_gap


@pytest.mark.parametrize(
    "sync",
    ["tensor", pytest.param("disk", marks=pytest.mark.slow), pytest.param("distributed", marks=pytest.mark.slow)],
)
def test_trainer_and_server_agree_after_every_weight_update(policy, attach, sync):
    engine = attach(sync)
    before = engine.generate(make_requests())
    assert rollout_gap(policy, before) < 1e-4
    for version in (1, 2):
        change(policy, 0.02)
        engine.update_weights(policy.chunks, version)
        assert engine.metrics()["weight_sync/max_log_prob_diff"] < 1e-4
        samples = engine.generate(make_requests())
        assert rollout_gap(policy, samples) < 1e-4
        assert {span.version for sample in samples for span in sample.weight_versions} == {version}
    assert rollout_gap(policy, before) > 1e-2  # the updates mattered


@pytest.mark.parametrize("params", [{"temperature": 0.7}, {"temperature": 1.5}, {"top_k": 3}, {"top_p": 0.6}])
def test_log_probs_use_the_temperature_before_top_k_and_top_p(policy, attach, params):
    assert rollout_gap(policy, attach().generate(make_requests(**params))) < 1e-4


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}, {"temperature": 1.3, "stop_strings": ("= 7",)}],
)
def test_server_meets_the_requirements_of_a_stage(attach, params):
    longest = SPEC.max_position_embeddings
    attach(requirements=ServerRequirements(longest, SamplingParams(8, (EOS,), **params), top_k=VOCAB_SIZE))


def test_incompatible_server_is_reported_and_unchanged(policy, attach, tokenizer, url, tmp_path):
    other = load_tokenizer("task:modular_arithmetic/13", tmp_path)
    with pytest.raises(UserError, match="another tokenizer than the trainer: '.*' is .* there and .* here"):
        attach(other_tokenizer=other)
    with pytest.raises(UserError, match="serves sequences of at most 518 tokens, and the stage has some of 600"):
        attach(requirements=ServerRequirements(600))
    with pytest.raises(UserError, match="did not: .* longer than the model's context length|did not: .*exceeds"):
        ServerChecks(
            dataclasses.replace(SPEC, max_position_embeddings=4096), ServerRequirements(4000, top_k=2),
            rollout_settings().server, dtype="float32", tokenizer=None, attached=True,
        ).score_max_length(url, "any")  # fmt: skip
    for size in (VOCAB_SIZE - 1, VOCAB_SIZE + 1):
        checks = ServerChecks(
            dataclasses.replace(SPEC, vocab_size=size), ServerRequirements(), rollout_settings().server,
            dtype="float32", tokenizer=tokenizer, attached=True,
        )  # fmt: skip
        with pytest.raises(UserError, match=f"vocabulary of another size than the model's {size}"):
            compatibility.check(url)
    with pytest.raises(UserError, match="has dtype float32, and the trainer computes in bfloat16"):
        SglangCompatibility(
            SPEC, ServerRequirements(), rollout_settings().server, dtype="bfloat16", tokenizer=None, attached=True
        ).check(url)
    tokenizer_here = copy.deepcopy(tokenizer)
    tokenizer_here.chat_template = "1 + {{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match="another chat template"):
        attach(other_tokenizer=tokenizer_here)
    assert rollout_gap(policy, attach().generate(make_requests())) < 1e-4


def test_greedy_responses_match_the_megatron_engine(policy, attach):
    requests = make_requests(prompts=12, groups=1, temperature=0.0)
    served = attach().generate(requests)
    local = MegatronEngine(policy.chunks, VOCAB_SIZE, policy.layout).generate(requests)
    for one, other in zip(served, local, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason
        assert one.rollout_log_probs == pytest.approx(other.rollout_log_probs, abs=1e-4)


def test_stop_conditions_match_the_megatron_engine(policy, attach, tokenizer):
    """Stop tokens and strings, also at the last token within the limit."""
    local = MegatronEngine(policy.chunks, VOCAB_SIZE, policy.layout, tokenizer=tokenizer)
    free = local.generate(make_requests(prompts=6, groups=1, temperature=0.0, stop_token_ids=()))
    token, other = (
        int(sample.token_ids[sample.prompt_length + offset]) for sample, offset in zip(free, (1, 2), strict=False)
    )
    requests = []
    for limit in (1, 2, 3, 8):
        shared = {"prompts": 6, "groups": 1, "temperature": 0.0, "max_new_tokens": limit}
        requests += make_requests(**shared, stop_token_ids=(EOS, token))
        requests += make_requests(**shared, stop_token_ids=(), stop_strings=(tokenizer.decode([other]),))
    served = attach().generate(requests)
    assert {sample.finish_reason for sample in served} == {"stop", "length"}
    for one, other in zip(served, local.generate(requests), strict=True):
        assert (one.token_ids.tolist(), one.finish_reason) == (other.token_ids.tolist(), other.finish_reason)


def test_longest_response_that_fits_is_not_truncated(attach):
    (request,) = make_requests(prompts=1, groups=1)
    max_response_length = SPEC.max_position_embeddings - len(request.prompt.token_ids)
    (sample,) = attach().generate(
        make_requests(prompts=1, groups=1, max_new_tokens=max_response_length, stop_token_ids=())
    )
    assert sample.response_length == max_response_length and sample.finish_reason == "length"


def test_first_tokens_follow_their_probabilities(policy, attach):
    requests = make_requests(prompts=1, groups=600, max_new_tokens=1, stop_token_ids=())
    samples = attach().generate(requests)
    counts = np.bincount([sample.token_ids[-1] for sample in samples], minlength=VOCAB_SIZE)
    prompt = samples[0].token_ids[:-1]
    with torch.no_grad():
        logits = policy.chunks[0](torch.from_numpy(prompt)[None], None, None)[0, -1, :VOCAB_SIZE].double()
    expected = torch.softmax(logits, 0).numpy() * len(samples)
    large = expected >= 5
    statistic = float(((counts - expected)[large] ** 2 / expected[large]).sum())
    degrees = int(large.sum()) - 1
    assert large.sum() > 4
    assert statistic < degrees + 6 * (2 * degrees) ** 0.5  # by chance less than once in 4,000 runs


def test_scores_match_the_trainer(policy, attach):
    engine = attach()
    samples = engine.generate(make_requests())
    expected = policy.score(samples)
    for scores, expected_scores in zip(engine.score(samples), expected, strict=True):
        assert scores == pytest.approx(expected_scores, abs=1e-4)
    for sample, top in zip(samples, engine.top_tokens(samples, 5), strict=True):
        with torch.no_grad():
            logits = policy.chunks[0](torch.from_numpy(sample.token_ids)[None], None, None)[0, :-1, :VOCAB_SIZE]
        best = torch.log_softmax(logits.double(), 1).topk(5)
        assert top.log_probs[1:] == pytest.approx(best.values.numpy(), abs=1e-4)
        assert (top.ids[1:] == best.indices.numpy()).mean() > 0.99  # except for ties
        log_tail = np.log1p(-best.values.exp().sum(1).numpy())
        assert top.log_tail[1:] == pytest.approx(log_tail, abs=1e-2)


@pytest.mark.parametrize("async_mode", ["one_step_off", "partial_rollout"])
def test_asynchronous_generation_continues_over_a_weight_update(policy, attach, async_mode):
    engine = attach(async_mode=async_mode)
    requests = make_requests(prompts=6, groups=12, max_new_tokens=100, stop_token_ids=())
    engine.generate(make_requests())  # warm up, so that the next call starts at once
    start_time = time.perf_counter()
    engine.generate(requests)
    seconds = time.perf_counter() - start_time
    engine.submit(requests)
    time.sleep(seconds / 3)  # so that the update comes during generation, on any machine
    old_version, old = engine.version, [parameter.detach().clone() for parameter in policy.chunks[0].parameters()]
    change(policy, 0.02)
    engine.update_weights(policy.chunks, old_version + 1)
    samples = engine.generate(requests)
    assert [sample.id for sample in samples] == [request.id for request in requests]
    assert {sample.response_length for sample in samples} == {100}
    versions = {span.version for sample in samples for span in sample.weight_versions}
    if async_mode == "partial_rollout":
        assert versions == {old_version, old_version + 1}, f"{seconds:.2f} s without an update"
    else:
        assert versions == {old_version}
    gaps = {old_version + 1: span_gap(policy, samples, old_version + 1)}
    with torch.no_grad():
        for parameter, values in zip(policy.chunks[0].parameters(), old, strict=True):
            parameter.copy_(values)
    gaps[old_version] = span_gap(policy, samples, old_version)
    assert max(gaps.values()) < 1e-4, gaps
    engine.update_weights(policy.chunks, old_version)


def test_first_complete_groups_are_returned_and_the_others_carried_over(policy, attach):
    engine = attach()
    requests = make_requests(prompts=4, groups=2, max_new_tokens=150, stop_token_ids=())
    requests = [
        dataclasses.replace(request, params=SamplingParams(3, ())) if request.prompt.id in ("p1", "p2") else request
        for request in requests
    ]
    first = engine.generate(requests, num_groups=2)
    assert {sample.group_id for sample in first} == {"p1@0.0", "p2@0.0"}
    carried = [request for request in requests if request.group_id in ("p0@0.0", "p3@0.0")]
    second = engine.generate(carried, num_groups=2)
    assert sorted(sample.id for sample in first + second) == sorted(request.id for request in requests)
    assert rollout_gap(policy, first + second) < 1e-4


def test_server_releases_and_reacquires_its_memory(policy, attach):
    engine = attach(release_memory=True)
    for version in (1, 2):
        assert rollout_gap(policy, engine.generate(make_requests())) < 1e-4
        engine.sleep()
        change(policy, 0.01)
        engine.update_weights(policy.chunks, version)
    engine.sleep()
    assert rollout_gap(policy, engine.generate(make_requests())) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sglang_router") is None, reason="sglang-router is not installed")
def test_router_serves_two_servers_and_skips_a_failed_one(policy, tokenizer, url, tmp_path):
    model = (policy.chunks, SPEC, policy.layout, policy.score)
    second = ServedEngine(ServerGroup(*model, rollout_settings(), tmp_path / "second", tokenizer=tokenizer))
    urls = [url, *second.urls]
    settings = rollout_settings(router=True, max_restarts=1)
    engine = ServedEngine(ServerGroup(*model, settings, tmp_path / "engine", urls=urls, tokenizer=tokenizer))
    try:
        server_group = engine._server_group
        workers = f"{server_group.pool.router.url}/workers"
        samples = engine.generate(make_requests(prompts=12, groups=2))
        assert rollout_gap(policy, samples) < 1e-4
        assert {worker["url"] for worker in httpx.get(workers).json()["workers"]} == set(urls)
        change(policy, 0.02)
        engine.update_weights(policy.chunks, 3)
        assert rollout_gap(policy, engine.generate(make_requests(prompts=12, groups=2))) < 1e-4
        # A server that missed an update gets no traffic.
        server_group.pool.servers[1].problem = "it missed an update"
        server_group._route()
        assert [worker["url"] for worker in httpx.get(workers).json()["workers"]] == [url]
        assert rollout_gap(policy, engine.generate(make_requests())) < 1e-4
        engine.update_weights(policy.chunks, 4)
        assert len(httpx.get(workers).json()["workers"]) == 2
    finally:
        engine.close()
        second.close()


def test_top_k_of_a_served_teacher_matches_the_local_teacher(policy, attach):
    samples = attach().generate(make_requests(prompts=6, groups=2))
    engine = attach(requirements=ServerRequirements(40, top_k=6))
    batches, update = policy.pack(samples, {}), MiniBatch(samples, {})
    served = ServedTopK(policy, ServedTeachers({None: engine}), 6, "bucket").distributions(update, batches)
    local = TopKTeacher(policy, TeacherRouter({None: policy}), 6, "teacher", "bucket").distributions(update, batches)
    for batch, one, other in zip(batches, served, local, strict=True):
        rows = batch.response_mask
        assert rows.any() and (one.ids[rows] == other.ids[rows]).float().mean() > 0.99  # except for ties
        assert torch.allclose(one.log_probs[rows], other.log_probs[rows].float(), atol=1e-4)
        assert torch.allclose(one.log_tail_mass[rows].exp(), other.log_tail_mass[rows].float().exp(), atol=1e-5)


def test_training_layouts_of_two_ranks_update_the_server(url, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [url, tmp_path, tmp_path / "out.json"]
    with open(tmp_path / "log", "w+") as log:  # not a pipe, which torch's shared-memory daemon would hold open
        finished = subprocess.run(
            [*command, str(Path(__file__).with_name("sglang_layout_worker.py")), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, timeout=1500,
        )  # fmt: skip
    assert finished.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert len(results) == 9
    for case, result in results.items():
        assert result["gap"] < 1e-4 and result["weight_sync/max_log_prob_diff"] < 1e-4, case
        assert result["samples"] == 12, case


def test_workflow_runs_with_served_rollouts(url, tmp_path):
    config = yaml.safe_load(WORKFLOW)
    config["rollout"]["sglang"] = {"urls": {"student": [url]}}
    path = tmp_path / "served.yaml"
    path.write_text(yaml.safe_dump(config))
    finished = s2d("run", path, "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    rows = metrics(tmp_path / "run", "stages/grpo")
    assert len(rows) == 3
    for row in rows:
        assert (
            row["mismatch/k3_kl"] < 1e-6
            and row["weight_sync/max_log_prob_diff"] < 1e-4
            and row["weight_sync/gb_per_s"] > 0
        )
    for row in rows + metrics(tmp_path / "run", "stages/opd"):
        assert row["mismatch/log_prob_abs_diff_mean"] <= row["mismatch/log_prob_abs_diff_max"] < 1e-4
        assert sum(share for name, share in row.items() if name.startswith("mismatch/hist/")) == pytest.approx(1)
    assert "GB/s" in (tmp_path / "run" / "stages" / "grpo" / "log.txt").read_text()


def external_address() -> str | None:
    """Return an address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return None if probe.getsockname()[0].startswith("127.") else probe.getsockname()[0]


@pytest.mark.slow
@pytest.mark.skipif(external_address() is None, reason="this machine has no address but loopback")
def test_weight_update_to_a_server_at_another_address(policy, tokenizer, tmp_path):
    """As with another machine: the trainer and the server reach each other over the network."""
    model = (policy.chunks, SPEC, policy.layout, policy.score)
    settings = rollout_settings(extra_args=["--host", "0.0.0.0"])
    first = ServedEngine(ServerGroup(*model, settings, tmp_path / "first", tokenizer=tokenizer))
    try:
        port = first._server_group.pool.servers[0].url.rpartition(":")[2]
        urls = [f"http://{external_address()}:{port}"]
        engine = ServedEngine(
            ServerGroup(*model, rollout_settings("distributed"), tmp_path / "second", urls=urls, tokenizer=tokenizer)
        )
        change(policy, 0.02)
        engine.update_weights(policy.chunks, 5)
        assert rollout_gap(policy, engine.generate(make_requests())) < 1e-4
        engine.close()
    finally:
        first.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [{"kl_estimator": "sampled_token"}, {"kl_estimator": "top_k", "top_k_source": "teacher", "top_k": 6}]
)
def test_served_teacher_trains_the_same_student_as_a_local_one(url, tmp_path, method):
    config = yaml.safe_load(WORKFLOW)
    shared = {key: config["stages"]["grpo"][key] for key in ("prompts", "train_batch_size", "sampling", "optimizer")}
    config["stages"]["teacher"] = {"extends": "base", "steps": 60}
    config["stages"]["opd"] = shared | {
        "type": "opd", "init": "base", "teacher": "teacher", "steps": 3, "num_generations": 2,
    } | method  # fmt: skip
    config["arms"] = {"opd": "opd"}
    rows = {}
    for engine in ("trainer", "sglang"):
        config["stages"]["opd"]["teacher_engine"] = engine
        config["rollout"] = {"sglang": {"urls": {"student": [url]}}}
        path = tmp_path / f"{engine}.yaml"
        path.write_text(yaml.safe_dump(config))
        finished = s2d("run", path, "--out", tmp_path / engine)
        assert finished.returncode == 0, finished.stderr
        rows[engine] = metrics(tmp_path / engine, "stages/opd")
    assert len(rows["sglang"]) == 3
    for one, other in zip(rows["trainer"], rows["sglang"], strict=True):
        assert one["response_length"] == other["response_length"]
        for name in ("loss", "grad_norm", "kl", *[name for name in one if "advantage" in name or "captured" in name]):
            assert other[name] == pytest.approx(one[name], abs=1e-4), name
    assert any(abs(row["kl"]) > 0.01 for row in rows["trainer"])


def server_pid(url: str) -> int:
    """Return the process id of the server behind ``url``, not of its watchdog."""
    pattern = f"^[^ ]+ -m sglang.launch_server .*--port {url.rpartition(':')[2]} "
    (pid,) = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout.split()
    return int(pid)


@pytest.mark.slow
def test_weight_update_waits_for_a_request_abandoned_by_its_client(policy, started, attach, url):
    """A stopped scheduler still runs the abandoned request when the weights arrive; SGLang would then exit."""
    engine = attach()
    command = ["pgrep", "-P", str(server_pid(url)), "-f", "sglang::scheduler"]
    scheduler = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    body = {"input_ids": [2, 3], "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}
    os.kill(scheduler, signal.SIGSTOP)
    try:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/generate", json=body, timeout=1.0)
        os.kill(scheduler, signal.SIGCONT)
        time.sleep(0.02)  # the request starts
        os.kill(scheduler, signal.SIGSTOP)
        time.sleep(6.0)  # the server notices that the client is gone
        threading.Timer(1.0, os.kill, (scheduler, signal.SIGCONT)).start()
        engine.update_weights(policy.chunks, 3)
    finally:
        os.kill(scheduler, signal.SIGCONT)
    assert started._server_group._processes[0].is_alive and not engine._server_group.pool.problems
    assert rollout_gap(policy, engine.generate(make_requests())) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("async_mode", ["sync", "partial_rollout"])
def test_smoke_workflow_gives_the_same_results_with_servers(tmp_path, async_mode):
    """With other random numbers, so accuracies and training rewards agree within four standard errors."""
    config = {"defaults": str(ROOT / "configs" / "smoke.yaml"), "evaluation": {"samples_per_prompt": 8}}
    truncate = {"rollout_correction": {"mode": "tis"}}
    config["stages"] = dict.fromkeys(("rl_teacher", "student_grpo", "stage3"), truncate)
    arms = {}
    for engine in ("megatron", "sglang"):
        settings = {"async_mode": async_mode, "over_sampling_ratio": 1.0 if async_mode == "sync" else 1.25}
        config["rollout"] = {"engine": engine, "max_mismatch_kl": 1e-6 if async_mode == "sync" else None} | (
            settings if engine == "sglang" else {}
        )
        path = tmp_path / f"{engine}.yaml"
        path.write_text(yaml.safe_dump(config))
        finished = s2d("run", path, "--out", tmp_path / engine, timeout=1500)
        assert finished.returncode == 0, finished.stderr
        arms[engine] = json.loads((tmp_path / engine / "results.json").read_text())["arms"]
        print(engine, async_mode, {name: (arm["avg_at_k"], arm["std_err"]) for name, arm in arms[engine].items()})
    for name, arm in arms["megatron"].items():
        other = arms["sglang"][name]
        error = (arm["std_err"] ** 2 + other["std_err"] ** 2) ** 0.5
        assert abs(arm["avg_at_k"] - other["avg_at_k"]) < 4 * error, name
    rewards = {
        engine: np.mean([row["reward"] for row in metrics(tmp_path / engine, "stages/rl_teacher")]) for engine in arms
    }
    mean_reward = np.mean(list(rewards.values()))  # of 8 steps of 128 responses each
    assert abs(rewards["megatron"] - rewards["sglang"]) < 4 * (2 * mean_reward * (1 - mean_reward) / 1024) ** 0.5, (
        rewards
    )
    rows = metrics(tmp_path / "sglang", "stages/rl_teacher")
    assert all(row["policy_lag_max"] == 0 for row in rows) if async_mode == "sync" else rows[-1]["policy_lag_max"] >= 1


@pytest.mark.slow
def test_killed_server_is_restarted_and_the_batch_completed(policy, started):
    """Kills the server of this file, so it must be the last test."""
    requests = make_requests(prompts=8, groups=4, temperature=0.0, max_new_tokens=200, stop_token_ids=())
    change(policy, 0.02)
    started.update_weights(policy.chunks, 77)
    clean = started.generate(requests)
    (process,), (server,) = started._server_group._processes, started._server_group.pool.servers
    old_url = server.url
    threading.Timer(0.2, os.kill, (server_pid(old_url), signal.SIGKILL)).start()
    again = started.generate(requests)
    assert server.url != old_url and started._server_group._processes[0] is not process
    with pytest.raises(httpx.ConnectError):
        httpx.get(old_url)
    assert [sample.token_ids.tolist() for sample in again] == [sample.token_ids.tolist() for sample in clean]
    assert rollout_gap(policy, again) < 1e-4 and {s.weight_versions[0].version for s in again} == {77}
