"""File systems that are slower, fuller or stranger than a local disk: NFS, read-only, full in the middle."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil

import pytest

from megatron_s2d.artifacts import files
from megatron_s2d.artifacts.files import (
    NoSpace,
    atomic_directory,
    atomic_write_text,
    file_digest,
    read_json,
    remaining_disk_errors,
    rename,
    tree_digest,
)
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.cli import main
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.manifest import check_manifest


@pytest.fixture
def lost_replies(monkeypatch):
    """Renames happen, and the repeated request reports that there is nothing to rename."""
    replace = os.replace

    def replace_twice(source, target):
        replace(source, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_twice)


def test_rename_whose_reply_was_lost_has_happened(tmp_path, lost_replies):
    atomic_write_text(tmp_path / "file", "old")
    atomic_write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    with atomic_directory(tmp_path / "directory") as directory:
        (directory / "content").touch()
    stage = StageDirectory(tmp_path / "stage")
    stage.path.mkdir()
    assert stage.archive("changed").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".archive", "directory", "file"]


def test_rename_that_has_not_happened_is_an_error(tmp_path, monkeypatch):
    def vanish(source, target):
        os.unlink(source)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("of somebody else")
    monkeypatch.setattr(os, "replace", vanish)
    with pytest.raises(FileNotFoundError):
        rename(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("failures", "succeeds"), [(2, True), (3, False)])
def test_file_that_another_client_replaced_is_opened_again(tmp_path, monkeypatch, failures, succeeds):
    path = tmp_path / "results.json"
    path.write_text('{"a": 1}')
    digest, stale = file_digest(path), [failures]

    def fail_first(original):
        def call(*args, **kwargs):
            if stale[0]:
                stale[0] -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr("pathlib.Path.read_bytes", fail_first(type(path).read_bytes))
    monkeypatch.setattr(files.hashlib, "file_digest", fail_first(files.hashlib.file_digest))
    for read, expected in ((read_json, {"a": 1}), (file_digest, digest)):
        stale[0] = failures
        if succeeds:
            assert read(path) == expected
        else:
            with pytest.raises(UserError, match="results.json: cannot be read .Stale file handle"):
                read(path)


def test_files_that_nfs_keeps_for_a_reader_belong_to_nothing(tmp_path):
    (tmp_path / ".metadata").write_text("x")
    (tmp_path / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": {".metadata": "digest"}}))
    digest = tree_digest(tmp_path)
    (tmp_path / ".nfs00000000000a1b2c00000001").write_text("open elsewhere")
    assert tree_digest(tmp_path) == digest and list(check_manifest(tmp_path)) == [".metadata"]


def test_old_checkpoint_that_a_reader_keeps_does_not_end_the_run(tmp_path, monkeypatch):
    stage = StageDirectory(tmp_path)
    for number in (1, 2):
        stage.checkpoint_path(number).mkdir(parents=True)
        (stage.checkpoint_path(number) / "shard").touch()
    unlink = os.unlink

    def busy(path, **options):
        if str(path) == "shard":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        stage.retain_checkpoints(1)
    assert stage.checkpoints() == [stage.checkpoint_path(2)]
    stage.retain_checkpoints(1)  # the next time it goes
    assert [path.name for path in stage.checkpoints_path.iterdir()] == ["step_00000002"]


def test_checkpoint_that_may_not_be_deleted_is_an_error(tmp_path, monkeypatch):
    stage = StageDirectory(tmp_path)
    for number in (1, 2):
        stage.checkpoint_path(number).mkdir(parents=True)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(PermissionError):
        stage.retain_checkpoints(1)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "plot.png: No space left on device; earlier files are intact, so free space and run again"),
        (errno.EDQUOT, "plot.png: Disk quota exceeded"),
        (errno.EROFS, "plot.png: Read-only file system; make it accessible and run again"),
        (errno.EACCES, "plot.png: Permission denied"),
    ],
)
def test_errors_of_the_disk_anywhere_in_a_command_are_one_line(monkeypatch, capsys, code, message):
    def run(_):
        raise OSError(code, os.strerror(code), "plot.png")

    kind = NoSpace if code in (errno.ENOSPC, errno.EDQUOT) else UserError
    with pytest.raises(kind, match=message), remaining_disk_errors():
        run(None)
    monkeypatch.setattr("megatron_s2d.cli.tools._doctor", run)
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_directory_that_turned_read_only_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "finished.json"
    atomic_write_text(path, "old")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("replace", "unlink", "fsync"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(UserError, match="finished.json: cannot be written .Read-only file system.*make it writable"):
        atomic_write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    shutil.rmtree(tmp_path)


def test_directory_that_another_process_writes_is_left_alone(tmp_path):
    path = tmp_path / "export"
    with atomic_directory(path) as first:
        (first / "weights").write_text("of the first")
        with (
            pytest.raises(UserError, match="export: another process is writing it; wait for it"),
            atomic_directory(path),
        ):
            pass
        assert (first / "weights").read_text() == "of the first"
    assert [entry.name for entry in path.iterdir()] == ["weights"]


def test_writer_that_loses_the_race_for_a_directory_is_refused(tmp_path, monkeypatch):
    """The other one deletes and makes the directory again between this one's making and locking it."""
    path, mkdir = tmp_path / "export", files.Path.mkdir

    def made_again(self, *args, **kwargs):
        mkdir(self, *args, **kwargs)
        self.rmdir()
        mkdir(self)
        other.append(os.open(self, os.O_RDONLY))
        fcntl.flock(other[-1], fcntl.LOCK_EX)

    other = []
    monkeypatch.setattr(files.Path, "mkdir", made_again)
    with pytest.raises(UserError, match="another process is writing it"), atomic_directory(path):
        pass
    monkeypatch.undo()
    assert (tmp_path / ".export.partial").exists()  # the other one's
    os.close(other[0])


def test_file_system_without_locks_of_directories_still_writes(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with atomic_directory(tmp_path / "export") as directory:
        (directory / "weights").touch()
    assert (tmp_path / "export" / "weights").exists()
