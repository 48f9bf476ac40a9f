"""API keys of SGLang servers: a random one for those that a run starts, that of a file for running ones. No torch.

Requests carry a key as ``Authorization: Bearer``. Keys are never printed and lie in files that only their owner reads.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from megatron_s2d.artifacts.files import PARTIAL_SUFFIX, disk_errors
from megatron_s2d.errors import UserError

_FILE_NAME = "api-key"
_OTHERS_MAY_READ = stat.S_IRGRP | stat.S_IROTH


def authorization(api_key: str) -> dict[str, str]:
    """Return the headers of requests to a server with ``api_key``; empty for a server without one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def new_api_key() -> str:
    """Return a random key."""
    return secrets.token_hex(32)


def write_api_key(directory: Path, api_key: str) -> Path:
    """Write a file that only this user can read, and return its path."""
    path = directory / _FILE_NAME
    with disk_errors(path):
        directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{_FILE_NAME}{PARTIAL_SUFFIX}")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(api_key + "\n")
        os.replace(temporary, path)  # a server that starts may be reading it
    return path


def remove_api_key(directory: Path) -> None:
    """Remove the file that ``write_api_key`` has written, if any."""
    (directory / _FILE_NAME).unlink(missing_ok=True)


def read_api_key(path: Path) -> str:
    """Return the key in a user's file, its only line; ``UserError`` if there is none, which never shows the content."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(f"rollout.sglang.api_key_file: {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable() or " " in text:
        raise UserError(f"rollout.sglang.api_key_file: {path}: expected one line with a key, without blanks")
    return text


def is_readable_by_others(path: Path) -> bool:
    """Return whether other users of the machine may read the file."""
    return bool(path.stat().st_mode & _OTHERS_MAY_READ)
