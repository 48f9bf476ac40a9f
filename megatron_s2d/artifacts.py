"""Files that survive a kill: atomic writes, JSON lines, digests, a lock, and the directory that a stage leaves behind.

A file or directory written here appears under its name complete or not at all, so a process may be killed (or the disk
may fill up) at any moment without harm to what was there before. One process writes a directory at a time: on several
ranks rank 0 writes. Left out: model weights (``parallel/checkpoint.py``) and the decision what to re-run
(``workflow/plan.py``). No torch here.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_s2d.config.base import UserError

LOCK_NAME = ".lock"
_PARTIAL = ".partial"
_MISPLACED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
_LIBRARIES = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "datasets", "math-verify", "numpy")


class NoSpace(UserError):
    """The disk or the quota is full; what was on disk before is intact."""


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn "disk full" and "may not write here" inside the block into one ``UserError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "disk quota exceeded" if error.errno == errno.EDQUOT else "no space left on the disk"
            raise NoSpace(f"{path}: {what}; what was saved before is intact: free space and run again") from error
        if error.errno in _MISPLACED:
            where = error.filename or path
            raise UserError(f"{where}: cannot be written ({error.strerror}); choose another place") from error
        raise


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Replace ``path`` with ``content`` in one rename; parent directories are made.

    Raises ``NoSpace`` or ``UserError`` (not writable); then ``path`` still holds what it held.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_PARTIAL}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """``atomic_write_bytes`` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """``atomic_write_bytes`` of indented JSON; NaN and infinity are refused (``ValueError``), as JSON has neither."""
    atomic_write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory to fill; it becomes ``path`` in one rename when the block ends, or vanishes on an error.

    ``path`` must not exist. What a killed writer left behind is cleared by the next writer of the same ``path``.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: already exists; move it away first")
    temporary = path.with_name(f".{path.name}{_PARTIAL}")
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for directory, _, names in os.walk(temporary):
                for name in names:
                    _fsync(Path(directory, name))
                _fsync(Path(directory))
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _fsync(path.parent)


def append_line(path: str | Path, line: str) -> None:
    """Append one line with a single write; a line that a killed writer left torn is cut off first.

    One writer per file. A failed write (``NoSpace``) leaves the file as it was.
    """
    if "\n" in line:
        raise ValueError("append_line writes one line")
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            size = _mend_tail(file)
            content = line.encode("utf-8") + b"\n"
            try:
                written = file.write(content)
                if written != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; a missing or damaged file is a ``UserError``."""
    return _decode(_read_text(path), str(path))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn last line (no newline, not JSON) is left out, other damage refused."""
    lines = _read_text(path).split("\n")
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines[:-1], 1) if line.strip()]
    if lines[-1].strip():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(lines[-1]))
    return rows


def truncate_jsonl_after(path: str | Path, key: str = "step", *, last: int) -> int:
    """Drop the rows whose ``key`` is beyond ``last``, and a torn last line; returns how many rows went.

    For a resume from the checkpoint of step ``last``. A missing file counts as empty. The file is replaced atomically.
    """
    path = Path(path)
    if not path.exists():
        return 0
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(key), int):
            raise UserError(f"{path}:{number}: the row has no whole number '{key}'; move the file away")
    kept = [row for row in rows if row[key] <= last]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    if text.encode("utf-8") != path.read_bytes():
        atomic_write_text(path, text)
    return len(rows) - len(kept)


def json_digest(value: Any) -> str:
    """SHA-256 (hexadecimal) of the canonical JSON of ``value``: sorted keys, no spaces; NaN is refused."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 (hexadecimal) of a file's content."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def tree_digest(directory: str | Path) -> str:
    """SHA-256 over the sorted relative names and contents of all files below ``directory``; modes and times are not in.

    Symbolic links to files count by their content; lock files are left out. Nothing is cached: every byte is read.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"{root}: no such directory")
    total = hashlib.sha256()
    names = [Path(folder, name).relative_to(root) for folder, _, files in os.walk(root) for name in files]
    for name in sorted(names, key=Path.as_posix):
        if name.name != LOCK_NAME:
            total.update(f"{json.dumps(name.as_posix())} {file_digest(root / name)}\n".encode())
    return total.hexdigest()


@contextlib.contextmanager
def directory_lock(
    directory: str | Path,
    *,
    shared: bool = False,
    wait_seconds: float = 0.0,
    announce: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold ``directory`` (made if missing) for this process; the kernel releases the lock when the process ends.

    ``shared``: beside other shared holders. Another holder is waited for up to ``wait_seconds`` after one message to
    ``announce``, then it is a ``UserError`` naming the holder.
    """
    path = Path(directory) / LOCK_NAME
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, path, wait_seconds, announce)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _acquire(
    descriptor: int, kind: int, path: Path, wait_seconds: float, announce: Callable[[str], None] | None
) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace") or "another process"
        except OSError as error:
            raise UserError(f"{path}: this file system has no locks ({error.strerror}); use another one") from error
        if time.monotonic() >= deadline:
            raise UserError(f"{path.parent}: in use by {holder}; wait for it to end or choose another directory")
        if announce is not None:
            announce(f"{path.parent}: in use by {holder}, waiting")
            announce = None
        time.sleep(0.1)


def timestamp() -> str:
    """Now, in UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def format_seconds(seconds: float) -> str:
    """``42s``, ``3m05s`` or ``2h07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def code_version() -> dict[str, str]:
    """Version of this package, digest of its source files, and the commit where it runs from a git checkout."""
    package = Path(__file__).resolve().parent
    digests = {path.relative_to(package).as_posix(): file_digest(path) for path in package.rglob("*.py")}
    version = {"version": importlib.metadata.version("megatron-s2d"), "source_digest": json_digest(digests)}
    if (package.parent / ".git").exists() and shutil.which("git"):
        commit = _git(package.parent, "rev-parse", "HEAD")
        if commit:
            changed = _git(package.parent, "status", "--porcelain", "--untracked-files=no", "--", package.name)
            version["commit"] = commit + ("+changes" if changed else "")
    return version


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


class StageDirectory:
    """What one stage leaves on disk: ``config.json`` (resolved), ``lineage.json``, ``metrics.jsonl``, ``checkpoints/``.

    ``finished.json`` is written last: with it the stage is done, without it the stage is to be resumed. Nothing in here
    is deleted but checkpoints past their retention.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.lineage_path = self.path / "lineage.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints_path = self.path / "checkpoints"
        self.finished_path = self.path / "finished.json"
        self.model_path = self.path / "model"  # final weights, without optimizer state
        self.cache_path = self.path / "cache"  # of a teacher_cache stage

    def begin(self, config: Mapping[str, Any], inputs: Mapping[str, str], seeds: Mapping[str, int]) -> None:
        """Record what is about to run, or that it goes on: ``inputs`` maps a name to a digest.

        A directory that already holds another configuration or other inputs is refused: ``supersede`` it first.
        """
        now = timestamp()
        if self.config_path.exists() and self.lineage_path.exists():
            lineage = self.lineage()
            if self.config() != dict(config) or lineage["inputs"] != dict(inputs):
                raise UserError(f"{self.path}: holds a stage with another configuration; supersede it first")
            lineage["resumed"].append({"at": now, "code": code_version()})
        else:
            lineage = {
                "inputs": dict(inputs),
                "seeds": dict(seeds),
                "code": code_version(),
                "libraries": library_versions(),
                "host": socket.gethostname(),
                "started": now,
                "resumed": [],
                "finished": None,
            }
            atomic_write_json(self.config_path, dict(config))
        atomic_write_json(self.lineage_path, lineage)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the stage as done; ``summary`` (outputs with digests, seconds, ...) goes into ``finished.json``."""
        lineage = self.lineage()
        lineage["finished"] = timestamp()
        atomic_write_json(self.lineage_path, lineage)
        atomic_write_json(self.finished_path, dict(summary))

    def is_finished(self) -> bool:
        """Whether the stage ran to its end."""
        return self.finished_path.exists()

    def config(self) -> dict[str, Any]:
        """The resolved configuration that the stage ran with."""
        return read_json(self.config_path)

    def lineage(self) -> dict[str, Any]:
        """Inputs, seeds, versions and times."""
        return read_json(self.lineage_path)

    def finished(self) -> dict[str, Any]:
        """The summary given to ``finish``; a ``UserError`` where the stage is not done."""
        if not self.is_finished():
            raise UserError(f"{self.path}: the stage has not finished; run the workflow again to complete it")
        return read_json(self.finished_path)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``, one per step; none where the stage wrote none."""
        return read_jsonl(self.metrics_path) if self.metrics_path.exists() else []

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` belongs."""
        return self.checkpoints_path / f"step_{step:08d}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = self.checkpoints_path.glob("step_*") if self.checkpoints_path.is_dir() else []
        return sorted(path for path in found if path.is_dir() and not path.name.endswith(_PARTIAL))

    def retain_checkpoints(self, keep: int) -> None:
        """Delete all but the ``keep`` newest checkpoints, and what an interrupted deletion or save left."""
        if keep < 1:
            raise ValueError("at least one checkpoint must stay")
        for path in self.checkpoints()[:-keep]:
            # Renamed first: a half-deleted directory must not look like a checkpoint.
            path.rename(path.with_name(path.name + _PARTIAL))
        for path in self.checkpoints_path.glob(f"*{_PARTIAL}"):
            shutil.rmtree(path)

    def supersede(self, reason: str) -> Path | None:
        """Move the directory to ``superseded/<name>-<n>`` beside it, with ``reason.txt``; None where it is absent."""
        if not self.path.exists():
            return None
        shelf = self.path.parent / "superseded"
        shelf.mkdir(exist_ok=True)
        atomic_write_text(self.path / "reason.txt", f"{timestamp()} {reason}\n")
        taken = {path.name for path in shelf.iterdir()}
        number = next(n for n in range(1, len(taken) + 2) if f"{self.path.name}-{n}" not in taken)
        target = shelf / f"{self.path.name}-{number}"
        self.path.rename(target)
        _fsync(self.path.parent)
        return target


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mend_tail(file: Any) -> int:
    """Cut a torn last line off ``file`` (or end a complete one); returns the size that the file then has."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    try:
        json.loads(content[start:])
    except ValueError:
        file.truncate(start)
        return start
    file.write(b"\n")
    return size + 1


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); the file is damaged") from None


def _row(line: str, where: str) -> dict[str, Any]:
    row = _decode(line, where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected one JSON object a line")
    return row


def _git(directory: Path, *arguments: str) -> str | None:
    result = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=30)
    return result.stdout.strip() if result.returncode == 0 else None
