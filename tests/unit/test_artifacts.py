"""Crash-safe files: kills, a full disk, concurrent processes."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_s2d.artifacts import files as artifacts
from megatron_s2d.artifacts import shapes
from megatron_s2d.artifacts.files import (
    NoSpace,
    append_line,
    atomic_directory,
    atomic_write_json,
    atomic_write_text,
    file_digest,
    json_digest,
    read_json,
    read_jsonl,
    tree_digest,
    truncate_jsonl_after,
)
from megatron_s2d.artifacts.lock import directory_lock
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.artifacts.versions import check_torch
from megatron_s2d.errors import UserError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 64 KiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount_point)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


@pytest.fixture
def failing_fsync(monkeypatch):
    """Make every fsync fail as on a full quota."""

    def fail(_descriptor):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(artifacts.os, "fsync", fail)


def test_atomic_write_replaces_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "made" / "a.json"
    atomic_write_json(path, {"x": 1})
    atomic_write_json(path, {"x": [2, "ü"]})
    assert read_json(path) == {"x": [2, "ü"]}
    assert names(path.parent) == ["a.json"]
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(path, {"x": float("nan")})
    assert read_json(path) == {"x": [2, "ü"]}


def test_write_below_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        atomic_write_text(tmp_path / "file" / "a.txt", "text")


def test_full_disk_leaves_the_previous_file_intact(tiny_disk):
    path = tiny_disk / "good.txt"
    atomic_write_text(path, "good")
    with pytest.raises(NoSpace, match="good.txt: no space left on the disk") as caught:
        atomic_write_text(path, "x" * 200_000)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "good"
    assert names(tiny_disk) == ["good.txt"]
    with pytest.raises(NoSpace), atomic_directory(tiny_disk / "d") as directory:
        (directory / "a").write_bytes(b"x" * 200_000)
    assert names(tiny_disk) == ["good.txt"]


def test_full_disk_leaves_complete_lines(tiny_disk):
    path = tiny_disk / "metrics.jsonl"
    row = json.dumps({"step": 1, "text": "x" * 3000})
    with pytest.raises(NoSpace, match="metrics.jsonl"):
        for _ in range(100):
            append_line(path, row)
    content = path.read_text()
    assert content.endswith("}\n") and 10 < len(read_jsonl(path)) < 100


def test_full_quota_leaves_the_previous_file_intact(tmp_path, failing_fsync):
    path = tmp_path / "good.txt"
    path.write_text("good")
    with pytest.raises(NoSpace, match="good.txt: disk quota exceeded"):
        atomic_write_text(path, "new")
    with pytest.raises(NoSpace, match="d: disk quota exceeded"), atomic_directory(tmp_path / "d") as directory:
        (directory / "a").write_text("a")
    assert path.read_text() == "good"
    assert names(tmp_path) == ["good.txt"]


def test_atomic_directory_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "result"
    with pytest.raises(RuntimeError), atomic_directory(path) as directory:
        (directory / "a").write_text("half")
        raise RuntimeError("stop")
    assert names(path.parent) == []
    (path.parent / ".result.partial").mkdir()
    (path.parent / ".result.partial" / "stale").write_text("left by a killed writer")
    with atomic_directory(path) as directory:
        assert not path.exists()
        (directory / "sub").mkdir()
        (directory / "sub" / "a").write_text("complete")
    assert names(path.parent) == ["result"] and names(path) == ["sub"]
    with pytest.raises(UserError, match="already exists"), atomic_directory(path):
        pass


def test_append_repairs_an_incomplete_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    append_line(path, '{"step": 1}')
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]
    append_line(path, '{"step": 2}')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}')
    append_line(path, '{"step": 2}')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    with pytest.raises(ValueError):
        append_line(path, "a\nb")


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers()), min_size=1), st.data())
def test_truncated_jsonl_file_loses_only_its_last_row(tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("cut") / "m.jsonl"
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    content = b"".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    num_complete, position = 0, 0
    for line in lines:
        position += len(line)
        num_complete += position - 1 <= cut  # the newline itself may be missing
    assert read_jsonl(path) == rows[:num_complete]


def test_damage_before_the_last_line_raises(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2: damaged file, not valid JSON"):
        read_jsonl(path)
    path.write_text('{"step": 1}\n{"st\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2"):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="expected a JSON object, got a list"):
        read_jsonl(path)
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_truncate_jsonl_after_a_step(tmp_path):
    path = tmp_path / "m.jsonl"
    assert truncate_jsonl_after(path, last=3) == 0
    path.write_text("".join(f'{{"step": {n}}}\n' for n in (1, 2, 3, 4, 5)) + '{"ste')
    assert truncate_jsonl_after(path, last=3) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    before = path.stat().st_mtime_ns
    assert truncate_jsonl_after(path, last=3) == 0
    assert path.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="without an integer 'other'"):
        truncate_jsonl_after(path, "other", last=1)


def test_digests(tmp_path):
    assert json_digest({"a": 1, "b": [1.5]}) == json_digest({"b": [1.5], "a": 1}) != json_digest({"a": 1, "b": [1.25]})
    (tmp_path / "one" / "sub").mkdir(parents=True)
    (tmp_path / "one" / "a").write_text("abc")
    assert file_digest(tmp_path / "one" / "a").startswith("ba7816bf8f01cfea")  # SHA-256 test vector of FIPS 180
    (tmp_path / "one" / "sub" / "b").write_text("b")
    first = tree_digest(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert tree_digest(tmp_path / "two") == first
    with directory_lock(tmp_path / "two"):
        assert tree_digest(tmp_path / "two") == first
    (tmp_path / "two" / "sub" / "b").rename(tmp_path / "two" / "b")
    assert tree_digest(tmp_path / "two") != first
    with pytest.raises(UserError, match="no such directory"):
        tree_digest(tmp_path / "absent")


HOLDER = textwrap.dedent("""
    import sys, time
    from megatron_s2d.artifacts.lock import directory_lock
    with directory_lock(sys.argv[1]):
        print("locked", flush=True)
        time.sleep(60)
""")


@contextlib.contextmanager
def lock_in_other_process(directory):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_lock_excludes_another_process_until_it_is_killed(tmp_path):
    with lock_in_other_process(tmp_path) as process:
        with pytest.raises(UserError, match=f"in use by process {process.pid}"), directory_lock(tmp_path):
            pass
        messages = []
        with pytest.raises(UserError), directory_lock(tmp_path, wait_seconds=0.3, announce=messages.append):
            pass
        assert len(messages) == 1 and "waiting" in messages[0]
        process.send_signal(signal.SIGKILL)
        with directory_lock(tmp_path, wait_seconds=10):
            pass
    with directory_lock(tmp_path):
        pass


def test_stage_directory_begin_resume_finish(tmp_path):
    stage = StageDirectory(tmp_path / "run" / "grpo")
    config, inputs = {"type": "grpo", "lr": 1e-6}, {"init": "ab12"}
    stage.begin(config, inputs, {"seed": 3})
    assert not stage.is_finished() and stage.metrics() == []
    with pytest.raises(UserError, match="has not finished"):
        stage.finished()
    stage.begin(config, inputs, {"seed": 3})
    with pytest.raises(UserError, match="another configuration"):
        stage.begin(config | {"lr": 1e-5}, inputs, {"seed": 3})
    with pytest.raises(UserError, match="another configuration"):
        stage.begin(config, {"init": "cd34"}, {"seed": 3})
    append_line(stage.metrics_path, '{"step": 1, "loss": 0.5}')
    stage.finish({"weights": "ef56", "seconds": 1.0})
    lineage = stage.lineage()
    assert lineage["inputs"] == inputs and lineage["seeds"] == {"seed": 3} and len(lineage["resumed"]) == 1
    assert lineage["libraries"]["torch"].startswith("2.") and len(lineage["code"]["source_digest"]) == 64
    assert lineage["started"] <= lineage["finished"]
    assert stage.is_finished() and stage.finished() == {"weights": "ef56", "seconds": 1.0}
    assert stage.config() == config and stage.metrics() == [{"step": 1, "loss": 0.5}]


def test_archive_moves_the_whole_directory(tmp_path):
    stage = StageDirectory(tmp_path / "grpo")
    assert stage.archive("nothing there") is None
    targets = []
    for number in (1, 2):
        stage.begin({"number": number}, {}, {})
        targets.append(stage.archive(f"lr changed {number}"))
    assert [path.name for path in targets] == ["grpo-1", "grpo-2"]
    assert names(tmp_path) == [".archive"]
    assert read_json(targets[0] / "config.json") == {"number": 1}
    assert "lr changed 2" in (targets[1] / "reason.txt").read_text()


def test_checkpoint_retention(tmp_path):
    stage = StageDirectory(tmp_path / "grpo")
    assert stage.checkpoints() == []
    for step in (5, 10, 15):
        stage.checkpoint_path(step).mkdir(parents=True)
        (stage.checkpoint_path(step) / "w").write_text("w")
    (stage.checkpoints_path / "step_00000020.partial").mkdir()
    assert stage.checkpoints()[-1] == stage.checkpoint_path(15)
    stage.retain_checkpoints(2)
    assert names(stage.checkpoints_path) == ["step_00000010", "step_00000015"]


def test_another_minor_version_of_torch_is_refused():
    pinned = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]
    (version,) = [line.removeprefix("torch==") for line in pinned if line.startswith("torch==")]
    check_torch(version)
    check_torch(f"{version}+cu128")
    for other in ("2.12.0", "2.1.1", "3.11.0"):
        with pytest.raises(UserError, match=rf"torch 2\.11 is needed, and {other} is installed"):
            check_torch(other)


def test_a_row_of_a_conversation_is_read():
    row = {"step": 1, "problem_id": "p", "prompt": "1 + 1 =", "response": "[ 2 ]", "answer": "2", "reward": 1.0}
    row |= {"verifier_label": "correct", "finish_reason": "stop", "episode": [{"role": "environment", "text": "2"}]}
    assert shapes.ResponseRow.model_validate(row).episode == row["episode"]
