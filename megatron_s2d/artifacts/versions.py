"""Versions of the code and of the libraries that produced a result, and timestamps. No torch."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

from megatron_s2d.artifacts.files import file_digest, json_digest
from megatron_s2d.errors import UserError

_TORCH = "2.11"  # minor version; a test compares it with pyproject.toml
_LIBRARIES = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "datasets", "mpmath", "numpy")


def check_torch(version: str | None = None) -> None:
    """Raise ``UserError`` for another minor version of torch than this package is written for.

    version: by default the installed one. It reads internals of torch and Megatron-Core that change between minors.
    """
    if version is None:
        try:
            version = importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            version = "none"
    if version.split(".")[:2] != _TORCH.split("."):
        raise UserError(
            f"torch {_TORCH} is needed, and {version} is installed: pip install 'torch=={_TORCH}.*' (s2d doctor lists "
            "all versions)"
        )


def timestamp() -> str:
    """Return the current UTC time to the second in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def code_version() -> dict[str, str]:
    """Return the package version, the digest of its source files and, in a git checkout, the commit."""
    package = Path(__file__).resolve().parent.parent
    digests = {path.relative_to(package).as_posix(): file_digest(path) for path in package.rglob("*.py")}
    version = {"version": importlib.metadata.version("megatron-s2d"), "source_digest": json_digest(digests)}
    if (package.parent / ".git").exists() and shutil.which("git"):
        commit = _git(package.parent, "rev-parse", "HEAD")
        if commit:
            changed = _git(package.parent, "status", "--porcelain", "--untracked-files=no", "--", package.name)
            version["commit"] = commit + ("+changes" if changed else "")
    return version


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that results depend on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _git(directory: Path, *arguments: str) -> str | None:
    result = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=30)
    return result.stdout.strip() if result.returncode == 0 else None
