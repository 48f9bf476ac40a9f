"""Crash-safe files: atomic writes of files and directories, JSON, JSON lines, SHA-256 digests.

A file or directory written here appears under its name complete or not at all, so a kill or a full disk leaves the
previous content intact. Only one process at a time may write a directory: with several ranks, rank 0. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_s2d.errors import UserError

LOCK_NAME = ".lock"
PARTIAL_SUFFIX = ".partial"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


class NoSpace(UserError):
    """The disk or the quota is full; the previous content on disk is intact."""


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn "disk full" and "not writable" errors inside the block into a one-line ``UserError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cause = "disk quota exceeded" if error.errno == errno.EDQUOT else "no space left on the disk"
            raise NoSpace(f"{path}: {cause}; earlier files are intact, so free space and run again") from error
        if error.errno in _NOT_WRITABLE:
            location = error.filename or path
            raise UserError(f"{location}: cannot be written ({error.strerror}); choose another directory") from error
        raise


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Replace the content of ``path`` in one rename, creating parent directories.

    Raises ``NoSpace`` or ``UserError`` (not writable) and then leaves ``path`` unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL_SUFFIX}")
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
        fsync_path(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text with ``atomic_write_bytes``."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON with ``atomic_write_bytes``; NaN and infinity raise ``ValueError`` (no JSON)."""
    atomic_write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory that is renamed to ``path`` at the end of the block, or deleted on an error.

    ``path`` must not exist. The next writer of the same ``path`` deletes what a killed writer left behind.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: already exists; move it first")
    temporary = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for directory, _, names in os.walk(temporary):
                for name in names:
                    fsync_path(Path(directory, name))
                fsync_path(Path(directory))
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(path.parent)


def append_line(path: str | Path, line: str) -> None:
    """Append one line in a single write, after removing an incomplete last line left by a killed writer.

    One writer per file. A failed write (``NoSpace``) leaves the file unchanged.
    """
    if "\n" in line:
        raise ValueError("append_line takes one line without a line break")
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            size = _repair_last_line(file)
            content = line.encode("utf-8") + b"\n"
            try:
                written = file.write(content)
                if written != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file; raise ``UserError`` if the file is missing or damaged."""
    return _decode(_read_text(path), str(path))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file without an incomplete last line; other damage raises ``UserError``."""
    lines = _read_text(path).split("\n")
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines[:-1], 1) if line.strip()]
    if lines[-1].strip():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(lines[-1]))
    return rows


def truncate_jsonl_after(path: str | Path, key: str = "step", *, last: int) -> int:
    """Drop rows whose ``key`` is greater than ``last`` and an incomplete last line; return the number of dropped rows.

    Used to resume from the checkpoint of step ``last``. A missing file counts as empty. The write is atomic.
    """
    path = Path(path)
    if not path.exists():
        return 0
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(key), int):
            raise UserError(f"{path}:{number}: row without an integer '{key}'; move the file and run again")
    remaining = [row for row in rows if row[key] <= last]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in remaining)
    if text.encode("utf-8") != path.read_bytes():
        atomic_write_text(path, text)
    return len(rows) - len(remaining)


def json_digest(value: Any) -> str:
    """Return the hexadecimal SHA-256 of ``value`` as canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_digest(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def tree_digest(directory: str | Path) -> str:
    """Return the SHA-256 over sorted relative names and contents of all files below ``directory``.

    Modes, times and lock files do not count; symbolic links count by the content of their target. Reads every byte.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"{root}: no such directory")
    digest = hashlib.sha256()
    names = [Path(folder, name).relative_to(root) for folder, _, files in os.walk(root) for name in files]
    for name in sorted(names, key=Path.as_posix):
        if name.name != LOCK_NAME:
            digest.update(f"{json.dumps(name.as_posix())} {file_digest(root / name)}\n".encode())
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _repair_last_line(file: Any) -> int:
    """Remove an incomplete last line of ``file``, or end a complete one; return the new size of the file."""
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


def _decode(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{location}: damaged file, not valid JSON ({error})") from None


def _row(line: str, location: str) -> dict[str, Any]:
    row = _decode(line, location)
    if not isinstance(row, dict):
        raise UserError(f"{location}: expected one JSON object per line")
    return row
