"""Rollouts from a real SGLang server on this machine, started once; skipped if sglang is not installed."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import stat
import subprocess
import sys
import types
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="sglang is not installed (extra `sglang`)"
)

torch = pytest.importorskip("torch")

from s2d import metrics, s2d
from sglang_model import (
    EOS,
    SPEC,
    VOCAB_SIZE,
    WORKFLOW,
    change,
    make_requests,
    rollout_gap,
    rollout_settings,
)

from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.errors import UserError
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.megatron.engine import MegatronEngine
from megatron_s2d.rollout.sampling_client import single_turn, together
from megatron_s2d.rollout.served.backend import ServerRequirements
from megatron_s2d.rollout.served.startup_checks import StartupChecks
from megatron_s2d.rollout.sglang.api_key import authorization, read_api_key
from megatron_s2d.rollout.sglang.compatibility import SglangCompatibility
from megatron_s2d.rollout.sglang.protocol import SglangProtocol
from megatron_s2d.teachers.frozen import TeacherRouter, TopKTeacher
from megatron_s2d.teachers.served import ServedTeachers, ServedTopK


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


def test_server_refuses_requests_without_its_key_which_nothing_shows(attach, url, key_file, tmp_path):
    key = key_file.read_text().strip()
    calls = {
        "GET": ["/model_info", "/server_info", "/v1/models"],
        "POST": [
            "/generate", "/v1/chat/completions", "/abort_request", "/flush_cache", "/freeze_gc", "/pause_generation",
            "/continue_generation", "/release_memory_occupation", "/resume_memory_occupation",
            "/update_weights_from_disk", "/update_weights_from_tensor", "/init_weights_update_group",
            "/update_weights_from_distributed", "/weights_checker",
        ],
    }  # fmt: skip
    for method, paths in calls.items():
        for path in paths:
            for headers in ({}, {"Authorization": "Bearer 0"}, {"Authorization": f"Bearer {key[:-1]}"}):
                assert httpx.request(method, url + path, json={}, headers=headers).status_code == 401, path
    assert httpx.get(f"{url}/model_info", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    (tmp_path / "other").write_text("0" * 64)
    for other in (None, tmp_path / "other"):
        with pytest.raises(UserError, match="refuses requests without its API key"):
            attach(api_key_file=other)
    assert key not in subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True).stdout
    log = (key_file.parent / "server-0.log").read_text()
    assert key not in log and "api_key='***'" in log
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600


def test_incompatible_server_is_reported_and_unchanged(policy, attach, tokenizer, url, key_file, tmp_path):
    headers = authorization(read_api_key(key_file))
    other = load_tokenizer("task:modular_arithmetic/13", tmp_path)
    with pytest.raises(UserError, match="another tokenizer than the trainer: '.*' is .* there and .* here"):
        attach(other_tokenizer=other)
    with pytest.raises(UserError, match="serves sequences of at most 518 tokens, and the stage has some of 600"):
        attach(requirements=ServerRequirements(600))
    with pytest.raises(UserError, match="did not: .* longer than the model's context length|did not: .*exceeds"):
        backend = types.SimpleNamespace(protocol=SglangProtocol(VOCAB_SIZE, read_api_key(key_file)))
        spec = dataclasses.replace(SPEC, max_position_embeddings=4096)
        checks = StartupChecks(backend, spec, ServerRequirements(4000, top_k=2), rollout_settings().server)
        checks.score_max_length(url, "any")
    for size in (VOCAB_SIZE - 1, VOCAB_SIZE + 1):
        spec = dataclasses.replace(SPEC, vocab_size=size)
        compatibility = SglangCompatibility(
            spec,
            ServerRequirements(),
            rollout_settings().server,
            dtype="float32",
            tokenizer=tokenizer,
            attached=True,
            headers=headers,
        )
        with pytest.raises(UserError, match=f"vocabulary of another size than the model's {size}"):
            compatibility.check(url)
    with pytest.raises(UserError, match="has dtype float32, and the trainer computes in bfloat16"):
        SglangCompatibility(
            SPEC,
            ServerRequirements(),
            rollout_settings().server,
            dtype="bfloat16",
            tokenizer=None,
            attached=True,
            headers=headers,
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
        start = sample.prompt_length  # of the tokens that are asked for
        best = torch.log_softmax(logits.double(), 1)[start - 1 :].topk(5)
        assert top.log_probs[start:] == pytest.approx(best.values.numpy(), abs=1e-4)
        assert (top.ids[start:] == best.indices.numpy()).mean() > 0.99  # except for ties
        log_tail = np.log1p(-best.values.exp().sum(1).numpy())
        assert top.log_tail[start:] == pytest.approx(log_tail, abs=1e-2)


@pytest.mark.parametrize("async_mode", ["one_step_off", "partial_rollout"])
def test_asynchronous_generation_continues_over_a_weight_update(policy, attach, async_mode):
    engine = attach()
    first, *others = make_requests(prompts=6, groups=12, max_new_tokens=100, stop_token_ids=())
    first = dataclasses.replace(first, params=dataclasses.replace(first.params, max_new_tokens=10))
    old_version, old = engine.version, [parameter.detach().clone() for parameter in policy.chunks[0].parameters()]
    change(policy, 0.02)
    engine.start({request.id: single_turn(request) for request in (first, *others)})
    engine.wait(lambda ended: first.id in ended)  # then the others have most of their tokens before them
    engine.pause(interrupt=async_mode == "partial_rollout")
    engine.update_weights(policy.chunks, old_version + 1)
    samples = list(engine.wait(lambda ended: len(ended) == len(others)).values())
    assert [sample.id for sample in samples] == [request.id for request in others]
    assert {sample.response_length for sample in samples} == {100}
    versions = {span.version for sample in samples for span in sample.weight_versions}
    if async_mode == "partial_rollout":
        assert versions == {old_version, old_version + 1}
    else:
        assert versions == {old_version}
    gaps = {old_version + 1: span_gap(policy, samples, old_version + 1)}
    with torch.no_grad():
        for parameter, values in zip(policy.chunks[0].parameters(), old, strict=True):
            parameter.copy_(values)
    gaps[old_version] = span_gap(policy, samples, old_version)
    assert max(gaps.values()) < 1e-4, gaps
    engine.update_weights(policy.chunks, old_version)


GROUPS = [f"p{number}@0.0" for number in range(4)]


def test_first_complete_groups_are_returned_and_the_others_carried_over(policy, attach):
    engine = attach()
    requests = make_requests(prompts=4, groups=2, max_new_tokens=150, stop_token_ids=())
    requests = [
        dataclasses.replace(request, params=SamplingParams(3, ())) if request.prompt.id in ("p1", "p2") else request
        for request in requests
    ]
    groups = {name: [request for request in requests if request.group_id == name] for name in GROUPS}
    engine.start({name: together([single_turn(request) for request in group]) for name, group in groups.items()})
    complete = engine.wait(lambda ended: len(ended) >= 2)
    assert set(complete) == {"p1@0.0", "p2@0.0"}
    engine.pause(interrupt=True)
    first = [sample for group in complete.values() for sample in group]
    second = [sample for group in engine.wait(lambda ended: len(ended) == 2).values() for sample in group]
    assert sorted(sample.id for sample in first + second) == sorted(request.id for request in requests)
    assert rollout_gap(policy, first + second) < 1e-4


def test_server_releases_and_reacquires_its_memory(policy, attach):
    engine = attach(enable_memory_saver=True)
    for version in (1, 2):
        assert rollout_gap(policy, engine.generate(make_requests())) < 1e-4
        engine.sleep()
        change(policy, 0.01)
        engine.update_weights(policy.chunks, version)
    engine.sleep()
    assert rollout_gap(policy, engine.generate(make_requests())) < 1e-4


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


def test_training_layouts_of_two_ranks_update_the_server(url, key_file, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [url, key_file, tmp_path, tmp_path / "out.json"]
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


def test_workflow_runs_with_served_rollouts(url, key_file, tmp_path):
    config = yaml.safe_load(WORKFLOW)
    config["rollout"]["sglang"] = {"urls": {"student": [url]}, "api_key_file": str(key_file)}
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
