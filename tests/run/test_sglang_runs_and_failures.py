"""Real SGLang servers in whole runs, in groups of two, at other addresses, and when they fail. All tests are slow."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed (extra `sglang`)"),
]

torch = pytest.importorskip("torch")

import httpx
from s2d import metrics, s2d
from sglang_model import (
    WORKFLOW,
    change,
    make_engine,
    make_requests,
    rollout_gap,
)

from megatron_s2d.rollout.sglang.api_key import authorization, read_api_key

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("sglang_router") is None, reason="sglang-router is not installed")
def test_router_serves_two_servers_and_skips_a_failed_one(policy, tokenizer, url, key_file, tmp_path):
    second = make_engine(policy, tokenizer, tmp_path / "second", api_key_file=key_file)
    urls, settings = [url, *second.urls], {"router": True, "max_restarts": 1, "api_key_file": key_file}
    engine = make_engine(policy, tokenizer, tmp_path / "engine", urls=urls, **settings)
    headers = authorization(read_api_key(key_file))
    try:
        server_group = engine._server_group
        workers = f"{server_group.pool.router.url}/workers"
        samples = engine.generate(make_requests(prompts=12, groups=2))
        assert rollout_gap(policy, samples) < 1e-4
        assert {worker["url"] for worker in httpx.get(workers, headers=headers).json()["workers"]} == set(urls)
        change(policy, 0.02)
        engine.update_weights(policy.chunks, 3)
        assert rollout_gap(policy, engine.generate(make_requests(prompts=12, groups=2))) < 1e-4
        # A server that missed an update gets no traffic.
        server_group.pool.servers[1].problem = "it missed an update"
        server_group._route()
        assert [worker["url"] for worker in httpx.get(workers, headers=headers).json()["workers"]] == [url]
        assert rollout_gap(policy, engine.generate(make_requests())) < 1e-4
        engine.update_weights(policy.chunks, 4)
        assert len(httpx.get(workers, headers=headers).json()["workers"]) == 2
        body = {"input_ids": [2, 3], "sampling_params": {"max_new_tokens": 1}}
        assert httpx.post(f"{server_group.pool.router.url}/generate", json=body).status_code == 401
        log, key = (tmp_path / "engine" / "router.log").read_text(), read_api_key(key_file)
        assert key not in log + subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True).stdout
    finally:
        engine.close()
        second.close()


def external_address() -> str | None:
    """Return an address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return None if probe.getsockname()[0].startswith("127.") else probe.getsockname()[0]


@pytest.mark.skipif(external_address() is None, reason="this machine has no address but loopback")
def test_weight_update_to_a_server_at_another_address(policy, tokenizer, tmp_path):
    """As with another machine: the trainer and the server reach each other over the network."""
    first = make_engine(policy, tokenizer, tmp_path / "first", extra_args=["--host", "0.0.0.0"])
    try:
        port = first.urls[0].rpartition(":")[2]
        urls, key_file = [f"http://{external_address()}:{port}"], tmp_path / "first" / "api-key"
        engine = make_engine(policy, tokenizer, tmp_path / "second", "distributed", urls=urls, api_key_file=key_file)
        change(policy, 0.02)
        engine.update_weights(policy.chunks, 5)
        assert rollout_gap(policy, engine.generate(make_requests())) < 1e-4
        engine.close()
    finally:
        first.close()


@pytest.mark.parametrize(
    "method", [{"kl_estimator": "sampled_token"}, {"kl_estimator": "top_k", "top_k_source": "teacher", "top_k": 6}]
)
def test_served_teacher_trains_the_same_student_as_a_local_one(url, key_file, tmp_path, method):
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
        config["rollout"] = {"sglang": {"urls": {"student": [url]}, "api_key_file": str(key_file)}}
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
    pattern = f"^[^ ]+ [^ ]+/with_api_key.py [^ ]+ sglang.launch_server .*--port {url.rpartition(':')[2]} "
    (pid,) = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout.split()
    return int(pid)


def test_weight_update_waits_for_a_request_abandoned_by_its_client(policy, server_engine, attach, url, key_file):
    """A stopped scheduler still runs the abandoned request when the weights arrive; SGLang would then exit."""
    engine = attach()
    command = ["pgrep", "-P", str(server_pid(url)), "-f", "sglang::scheduler"]
    scheduler = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    body = {"input_ids": [2, 3], "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}
    os.kill(scheduler, signal.SIGSTOP)
    try:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/generate", json=body, headers=authorization(read_api_key(key_file)), timeout=1.0)
        os.kill(scheduler, signal.SIGCONT)
        time.sleep(0.02)  # the request starts
        os.kill(scheduler, signal.SIGSTOP)
        time.sleep(6.0)  # the server notices that the client is gone
        threading.Timer(1.0, os.kill, (scheduler, signal.SIGCONT)).start()
        engine.update_weights(policy.chunks, 3)
    finally:
        os.kill(scheduler, signal.SIGCONT)
    assert server_engine._server_group._processes[0].is_alive and not engine._server_group.pool.problems
    assert rollout_gap(policy, engine.generate(make_requests())) < 1e-4


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


def test_killed_server_is_restarted_and_the_batch_completed(policy, server_engine):
    """Kills the server of this file, so it must be the last test."""
    requests = make_requests(prompts=8, groups=4, temperature=0.0, max_new_tokens=200, stop_token_ids=())
    change(policy, 0.02)
    server_engine.update_weights(policy.chunks, 77)
    clean = server_engine.generate(requests)
    (process,), (server,) = server_engine._server_group._processes, server_engine._server_group.pool.servers
    old_url = server.url
    threading.Timer(0.2, os.kill, (server_pid(old_url), signal.SIGKILL)).start()
    again = server_engine.generate(requests)
    assert server.url != old_url and server_engine._server_group._processes[0] is not process
    with pytest.raises(httpx.ConnectError):
        httpx.get(old_url)
    assert [sample.token_ids.tolist() for sample in again] == [sample.token_ids.tolist() for sample in clean]
    assert rollout_gap(policy, again) < 1e-4 and {s.weight_versions[0].version for s in again} == {77}
