"""Crash-safe files: atomic writes of files and directories, JSON, JSON lines, SHA-256 digests.

A file or directory written here appears under its name complete or not at all, so a kill or a full disk leaves the
previous content intact. Only one process at a time may write a directory: with several ranks, rank 0. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_s2d.errors import UserError

LOCK_NAME = ".lock"
PARTIAL_SUFFIX = ".partial"
NFS_PREFIX = ".nfs"  # files that an NFS client keeps until the last process has closed them
_STALE_ATTEMPTS = 3
_STILL_USED = (errno.EBUSY, errno.ENOTEMPTY, errno.ESTALE, errno.ENOENT)
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
            raise UserError(
                f"{location}: cannot be written ({error.strerror}); make it writable, or choose another directory"
            ) from error
        raise


@contextlib.contextmanager
def remaining_disk_errors() -> Iterator[None]:
    """Turn the errors of a disk that is full or turned read-only into a ``UserError``, wherever in a command they come.

    For the outermost blocks: libraries write files, too, and so does every ``print`` to a log.
    """
    try:
        yield
    except OSError as error:
        location = error.filename or "the directory of the run"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"{location}: {error.strerror}; earlier files are intact, so free space and run again"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(f"{location}: {error.strerror}; make it accessible and run again") from error
        raise


def atomic_write_bytes(path: str | Path, *content: bytes | memoryview) -> None:
    """Replace the content of ``path`` in one rename by that of all buffers, creating parent directories.

    Raises ``NoSpace`` or ``UserError`` (not writable) and then leaves ``path`` unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL_SUFFIX}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # a directory that turned read-only keeps it
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

    ``path`` must not exist. The next writer of the same ``path`` deletes what a killed writer left behind; while one is
    writing, others raise ``UserError``.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: already exists; move it first")
    temporary = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    with disk_errors(path), contextlib.ExitStack() as stack:
        if temporary.exists():
            with _only_writer(temporary, path):
                shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        stack.enter_context(_only_writer(temporary, path))
        try:
            yield temporary
            for directory, _, names in os.walk(temporary):
                for name in names:
                    fsync_path(Path(directory, name))
                fsync_path(Path(directory))
            rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(path.parent)


@contextlib.contextmanager
def _only_writer(directory: Path, path: Path) -> Iterator[None]:
    """Lock ``directory``, which becomes ``path``; ``UserError`` if another process is writing it."""
    busy = UserError(f"{path}: another process is writing it; wait for it to end or choose another directory")
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # the other one has finished
        raise busy from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:  # a file system that locks no directories, such as NFS: nothing can be said
            pass
        if not (directory.exists() and os.path.samestat(os.fstat(descriptor), os.stat(directory))):
            raise busy
        yield
    finally:
        os.close(descriptor)


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
    return parse_json(_read_bytes(path), str(path))


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ``UserError`` if the file is missing, damaged, or holds another value."""
    return _object(read_json(path), str(path))


def parse_json(content: bytes, location: str) -> Any:
    """Return the value of UTF-8 JSON text that anyone may have written, with or without a byte order mark.

    Raises ``UserError`` with ``location`` for damaged text and for values nested too deeply.
    """
    try:
        return json.loads(content.decode("utf-8-sig", "surrogateescape"))
    except RecursionError:
        raise UserError(f"{location}: damaged file, brackets are nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{location}: damaged file, not valid JSON ({error})") from None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file without an incomplete last line; other damage raises ``UserError``."""
    lines = _read_bytes(path).split(b"\n")
    locations = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    rows = [
        _object(parse_json(line, location), location)
        for line, location in zip(lines[:-1], locations, strict=False)
        if line.strip()
    ]
    if lines[-1].strip():
        with contextlib.suppress(UserError):
            rows.append(_object(parse_json(lines[-1], locations[-1]), locations[-1]))
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

    def digest() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        return _retry_stale(digest)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _retry_stale[Result](read: Callable[[], Result]) -> Result:
    """Return ``read()``, opened again if another NFS client replaced the file meanwhile."""
    for _ in range(_STALE_ATTEMPTS - 1):
        try:
            return read()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return read()


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
        if name.name != LOCK_NAME and not name.name.startswith(NFS_PREFIX):
            digest.update(f"{json.dumps(name.as_posix())} {file_digest(root / name)}\n".encode())
    return digest.hexdigest()


def rename(source: Path, target: Path) -> None:
    """Rename a file, which may replace another one, or a directory.

    A network file system may repeat a rename whose reply was lost and then report that ``source`` does not exist.
    """
    renamed = os.stat(source)
    try:
        os.replace(source, target)
    except FileNotFoundError:
        if not (target.exists() and os.path.samestat(os.stat(target), renamed)):
            raise


def remove_tree(path: Path) -> None:
    """Delete a directory; what cannot be deleted now, such as files that are open on NFS, stays for the next time."""

    def keep(_: object, name: str, error: BaseException) -> None:
        if not isinstance(error, OSError) or error.errno not in _STILL_USED:
            raise error

    shutil.rmtree(path, onexc=keep)


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


def _read_bytes(path: str | Path) -> bytes:
    try:
        return _retry_stale(Path(path).read_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _object(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{location}: damaged file, expected a JSON object, got {_article(value)}")
    return value


def _article(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
