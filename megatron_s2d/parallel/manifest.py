"""The manifest of a checkpoint directory: a SHA-256 of every file, in Megatron-Core's format. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    files = manifest.get("files")
    if manifest.get("algorithm") != "sha256" or not isinstance(files, dict) or ".metadata" not in files:
        raise DamagedCheckpoint(f"{directory}/{MANIFEST_NAME}: damaged; write the checkpoint again")
    names = {path.name for path in directory.iterdir() if path.is_file()}
    if missing := sorted(set(files) - names):
        raise DamagedCheckpoint(f"{directory}: {missing[0]} is missing; write or fetch the checkpoint again")
    if unlisted := sorted(names - set(files) - {MANIFEST_NAME}):
        raise DamagedCheckpoint(f"{directory}/{MANIFEST_NAME} does not list {unlisted[0]}; write the checkpoint again")
    return files


def read_json_object(directory: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raise ``DamagedCheckpoint`` for anything else."""
    try:
        content = json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{directory}: not a checkpoint (no {name})") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{directory}/{name}: damaged ({error})") from None
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{directory}/{name}: damaged (a {type(content).__name__}, not an object)")
    return content
