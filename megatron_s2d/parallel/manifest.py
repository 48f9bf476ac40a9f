"""The manifest of a checkpoint directory: a SHA-256 of every file, in Megatron-Core's format. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_s2d.artifacts import files
from megatron_s2d.errors import UserError

MANIFEST_NAME = "integrity.json"


class DamagedCheckpoint(UserError):
    """Files of a checkpoint are missing, incomplete or changed; an older one may be intact."""


def check_manifest(directory: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of a checkpoint's manifest; raise ``DamagedCheckpoint`` unless it covers every file.

    The digests themselves are compared where the files are read. Folders, such as the tokenizer's files beside a
    converted checkpoint, are not part of the checkpoint.
    """
    manifest = read_json_object(directory, MANIFEST_NAME)
    digests = manifest.get("files")
    if manifest.get("algorithm") != "sha256" or not isinstance(digests, dict) or ".metadata" not in digests:
        raise DamagedCheckpoint(f"{directory}/{MANIFEST_NAME}: damaged; write the checkpoint again")
    names = {path.name for path in directory.iterdir() if path.is_file()}
    names = {name for name in names if not name.startswith(files.NFS_PREFIX)}
    if missing := sorted(set(digests) - names):
        raise DamagedCheckpoint(f"{directory}: {missing[0]} is missing; write or fetch the checkpoint again")
    if unlisted := sorted(names - set(digests) - {MANIFEST_NAME}):
        raise DamagedCheckpoint(f"{directory}/{MANIFEST_NAME} does not list {unlisted[0]}; write the checkpoint again")
    return digests


def read_json_object(directory: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raise ``DamagedCheckpoint`` for anything else."""
    if not (directory / name).exists():
        raise DamagedCheckpoint(f"{directory}: not a checkpoint (no {name})")
    try:
        return files.read_json_object(directory / name)
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from None
