"""Servers and routers that the engine starts: restarted without losing samples, and ended with the trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

pytest.importorskip("torch")

from fake_sglang import read_embedding
from served_helpers import VOCAB_SIZE, change_weights, make_engine, make_requests, max_difference, tokens

from megatron_s2d.config.base import UserError

pytestmark = pytest.mark.usefixtures("short_pauses")


def processes(word: str) -> list[int]:
    pids = subprocess.run(["pgrep", "-f", "--", word], capture_output=True, text=True, check=False).stdout.split()
    return [int(number) for number in pids if int(number) != os.getpid()]


def test_servers_start_with_the_weights_and_end_with_the_engine(chunks, layout, interpreter, tmp_path):
    engine = make_engine(chunks, layout, tmp_path / "engine", python=str(interpreter), num_servers=2)
    samples = engine.generate(make_requests())
    assert max_difference(chunks, samples) < 1e-5
    assert len(processes(str(tmp_path / "engine"))) == 4  # two servers, each with its watchdog
    log = (tmp_path / "engine" / "server-1.log").read_text()
    assert "serving" in log and log.count("frozen") == 1
    engine.close()
    assert not processes(str(tmp_path / "engine"))


def test_server_that_dies_mid_batch_is_restarted_with_the_current_weights(chunks, layout, interpreter, tmp_path):
    engine = make_engine(chunks, layout, tmp_path / "engine", python=str(interpreter))
    change_weights(chunks)
    engine.update_weights(chunks, 1)
    clean = engine.generate(make_requests())
    (server,) = engine._server_group.pool.servers
    old = server.url
    for kind, count in (("slow", 4), ("die", 1)):
        httpx.post(f"{old}/fault", json={"kind": kind, "count": count})
    again = engine.generate(make_requests())
    assert server.url != old
    assert tokens(again) == tokens(clean) and [s.id for s in again] == [r.id for r in make_requests()]
    assert max_difference(chunks, again) < 1e-5
    engine.close()


def test_one_of_two_servers_dies_and_is_restarted_by_the_next_update(chunks, layout, interpreter, tmp_path):
    engine = make_engine(chunks, layout, tmp_path / "engine", python=str(interpreter), num_servers=2)
    clean = engine.generate(make_requests())
    old = [server.url for server in engine._server_group.pool.servers]
    httpx.post(f"{old[1]}/fault", json={"kind": "die"})
    assert tokens(engine.generate(make_requests())) == tokens(clean)  # the other one answered
    assert [bool(server.problem) for server in engine._server_group.pool.servers] == [False, True]
    change_weights(chunks)
    engine.update_weights(chunks, 1)
    new = [server.url for server in engine._server_group.pool.servers]
    assert not engine._server_group.pool.problems and new[0] == old[0] and new[1] != old[1]
    samples = engine.generate(make_requests())
    assert max_difference(chunks, samples) < 1e-5
    engine.close()


def test_server_that_cannot_start_is_one_clear_line(chunks, layout, interpreter, tmp_path):
    with pytest.raises(UserError, match="ended while it started .RuntimeError: no such device.") as error:
        make_engine(chunks, layout, tmp_path / "engine", python=str(interpreter), extra_args=["--fail-at-start"])
    assert "\n" not in str(error.value) and "server-0.log" in str(error.value)


def test_server_that_stays_alive_without_its_port_is_not_waited_for(chunks, layout, interpreter, tmp_path):
    with pytest.raises(UserError, match="another program took the port"):
        make_engine(chunks, layout, tmp_path / "engine", python=str(interpreter), extra_args=["--port-is-taken"])


def test_stale_reply_behind_a_router_updates_every_server(chunks, layout, servers, interpreter, tmp_path):
    engine = make_engine(chunks, layout, tmp_path / "engine", servers, router=True, python=str(interpreter))
    change_weights(chunks)
    engine.update_weights(chunks, 1)
    servers[1].faults.append("stale")  # the router does not say which server answered
    samples = engine.generate(make_requests())
    assert [sample.id for sample in samples] == [request.id for request in make_requests()]
    assert max_difference(chunks, samples) < 1e-5 and not engine._server_group.pool.problems
    for server in servers:
        paths = [path for path, body in server.log if path == "/update_weights_from_disk"]
        assert len(paths) == 3  # at the start, by the update, after the stale reply
        assert any(isinstance(body.get("rid"), str) for path, body in server.log if path == "/generate")
    engine.close()


def test_router_that_dies_mid_batch_is_restarted_without_losing_samples(chunks, layout, servers, interpreter, tmp_path):
    engine = make_engine(chunks, layout, tmp_path / "engine", servers, router=True, python=str(interpreter))
    clean = engine.generate(make_requests())
    old = engine._server_group.pool.router.url
    httpx.post(f"{old}/fault", json={"die_after": 5})
    again = engine.generate(make_requests())
    router = engine._server_group.pool.router
    assert router.url != old and not engine._server_group.pool.problems
    assert tokens(again) == tokens(clean)
    workers = httpx.get(f"{router.url}/workers").json()["workers"]
    assert {worker["url"] for worker in workers} == {server.url for server in servers}
    engine.close()


def test_servers_end_with_a_killed_trainer(interpreter, tmp_path):
    embedding = np.zeros((VOCAB_SIZE, 4), np.float32)
    info = {"dtype": "F32", "shape": [VOCAB_SIZE, 4], "data_offsets": [0, embedding.nbytes]}
    text = json.dumps({"model.embed_tokens.weight": info}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + embedding.tobytes())
    index = {"weight_map": {"model.embed_tokens.weight": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_embedding(tmp_path).shape == (VOCAB_SIZE, 4)
    (tmp_path / "key").write_text("secret")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from megatron_s2d.config.training import SglangConfig\n"
        "from megatron_s2d.rollout.sglang.server import SglangServer\n"
        f"server = SglangServer(SglangConfig(python={str(interpreter)!r}), Path({str(tmp_path)!r}),\n"
        f"    Path({str(tmp_path / 'log')!r}), Path({str(tmp_path / 'key')!r}), number=0, weight_version='x',\n"
        "    max_positions=8, dtype='float32', max_tokens=9)\n"
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
