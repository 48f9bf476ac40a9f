"""Files that survive a kill: atomic writes of files and directories, JSON, JSON lines, SHA-256 digests.

A file or directory written here appears under its name complete or not at all, so a kill or a full disk at any moment
leaves the previous content intact. One process writes a directory at a time: on several ranks rank 0 writes. No torch.
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
_MISPLACED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


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


def fsync_path(path: Path) -> None:
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
