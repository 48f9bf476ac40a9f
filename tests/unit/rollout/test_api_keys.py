"""Servers answer only requests with their key, all requests carry it, and no process list, log or error shows it."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

pytest.importorskip("torch")

from served_helpers import change_weights, make_engine, make_requests, max_difference, start

from megatron_s2d.config.training import SglangConfig, is_loopback
from megatron_s2d.errors import UserError
from megatron_s2d.rollout.engine import SamplingParams
from megatron_s2d.rollout.served.backend import ServerRequirements
from megatron_s2d.rollout.sglang.api_key import read_api_key, write_api_key

pytestmark = pytest.mark.usefixtures("short_pauses")


def command_lines() -> str:
    return subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("router", [False, True])
def test_started_servers_have_a_key_that_nothing_shows(chunks, layout, interpreter, tmp_path, router, capsys):
    directory = tmp_path / "engine"
    engine = make_engine(chunks, layout, directory, python=str(interpreter), router=router, num_servers=2)
    key_file = directory / "api-key"
    key = read_api_key(key_file)
    assert len(key) == 64 and stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert str(key_file) in command_lines() and key not in command_lines()
    change_weights(chunks)
    engine.update_weights(chunks, 1)
    assert max_difference(chunks, engine.generate(make_requests())) < 1e-5
    url = engine.urls[0]
    for path, body in (("/generate", {"input_ids": [1]}), ("/update_weights_from_disk", {"model_path": "/"})):
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": key}):
            assert httpx.post(url + path, json=body, headers=headers).status_code == 401
    engine.close()
    assert not key_file.exists()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert not written and key not in capsys.readouterr().out
    assert "'--api-key', '***'" in (directory / "server-0.log").read_text()


def test_every_request_to_running_servers_carries_their_key(chunks, layout, servers, tmp_path, capsys):
    for server in servers:
        server.api_key = "of the user".replace(" ", "-")
    (tmp_path / "key").write_text("of-the-user\n")
    (tmp_path / "key").chmod(0o600)
    engine = make_engine(
        chunks,
        layout,
        tmp_path / "engine",
        servers,
        api_key_file=tmp_path / "key",
        enable_memory_saver=True,
        requirements=ServerRequirements(20, SamplingParams(8, (3,)), top_k=2),
    )
    samples = engine.generate(make_requests())
    engine.score(samples)
    engine.sleep()
    change_weights(chunks)
    servers[0].faults.append("hang")  # aborted by the interruption
    engine.update_weights(chunks, 1)
    start(engine, make_requests())
    engine.wait(lambda ended: len(ended) >= 2)
    engine.pause(interrupt=True)
    engine.close()
    for server in servers:
        assert server.refused == ["/model_info"]  # once without the key, on purpose
        paths = {path.partition("?")[0] for path, _ in server.log}
        assert {"/generate", "/flush_cache", "/release_memory_occupation", "/resume_memory_occupation"} <= paths
        assert {"/pause_generation", "/update_weights_from_disk", "/continue_generation"} <= paths
    assert "of-the-user" not in capsys.readouterr().out
    assert not (tmp_path / "engine" / "api-key").exists()


@pytest.mark.parametrize("content", [None, "another"])
def test_wrong_key_is_one_line_that_does_not_show_it(chunks, layout, servers, tmp_path, content):
    servers[0].api_key = "right"
    path = None
    if content is not None:
        path = write_api_key(tmp_path, content)
    with pytest.raises(UserError, match="refuses requests without its API key.*api_key_file") as error:
        make_engine(chunks, layout, tmp_path, servers[:1], api_key_file=path)
    assert "\n" not in str(error.value) and "another" not in str(error.value) and "right" not in str(error.value)


def test_key_that_changes_during_the_run_is_one_line(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers[:1])
    servers[0].api_key = "new"
    with pytest.raises(UserError, match="refuses requests without its API key"):
        engine.generate(make_requests())


def test_running_server_without_a_key_and_readable_file_are_reported(chunks, layout, servers, tmp_path, capsys):
    (tmp_path / "key").write_text("abc\n")
    (tmp_path / "key").chmod(0o644)
    make_engine(chunks, layout, tmp_path / "engine", servers[:1], api_key_file=tmp_path / "key")
    lines = capsys.readouterr().out.splitlines()
    assert sum(f"chmod 600 {tmp_path / 'key'}" in line for line in lines) == 1
    assert sum("also answers requests without the API key" in line for line in lines) == 1


@pytest.mark.parametrize("content", [b"", b" \n", b"two words\n", b"two\nlines\n", b"\xff\xfe", None])
def test_file_without_a_key_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(UserError, match="api_key_file: .*key: (expected one line|cannot be read)") as error:
        read_api_key(tmp_path / "key")
    assert "\n" not in str(error.value) and "words" not in str(error.value)


def test_key_file_that_a_killed_run_left_is_replaced(tmp_path):
    (tmp_path / "api-key").write_text("old")
    (tmp_path / "api-key").chmod(0o644)
    path = write_api_key(tmp_path, "new")
    assert read_api_key(path) == "new" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["api-key"]


def test_only_addresses_of_this_machine_are_loopback():
    local = ["http://127.0.0.1:1", "http://127.8.0.3", "https://localhost:2", "http://[::1]:3"]
    others = ["http://10.0.0.7:30000", "http://0.0.0.0:1", "http://node1:2", "http://[fe80::1]:3", "http://localhost.x"]
    assert [url for url in [*local, *others] if is_loopback(url)] == local
    config = SglangConfig(urls={"student": [local[0], others[0]], "teacher": [others[2]]})
    assert config.unprotected_urls == [others[0], others[2]]
    assert not config.model_copy(update={"api_key_file": Path("key")}).unprotected_urls


@pytest.mark.parametrize("settings", [{"extra_args": ["--api-key=x"]}, {"extra_args": ["--admin-api-key", "x"]}])
def test_keys_in_arguments_are_refused(settings):
    with pytest.raises(ValidationError, match="is set by the run: leave it out"):
        SglangConfig(**settings)
    with pytest.raises(ValidationError, match="give keys in api_key_file"):
        SglangConfig(urls={"student": ["http://user:password@10.0.0.7:30000"]})


def test_records_of_every_logger_hide_the_key(tmp_path):
    (tmp_path / "key").write_text("the-secret\n")
    (tmp_path / "toy_module.py").write_text(
        "import logging, sys\n"
        "logging.basicConfig(level=logging.INFO, force=True)\n"
        "logging.info('args %s', sys.argv[1:]); logging.getLogger('x').warning('the-' + 'secret')\n"
        "logging.info('%d', 'no')\n"
    )
    script = Path(sys.modules["megatron_s2d.rollout.sglang.api_key"].__file__).with_name("with_api_key.py")
    command = [sys.executable, script, tmp_path / "key", "toy_module", "--port", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, check=True)
    assert "args ['--port', '1', '--api-key', '***']" in done.stderr and "WARNING:x:***" in done.stderr
    assert not re.search("the-secret", done.stdout + done.stderr)
