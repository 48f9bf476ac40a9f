"""The weights under a model's ``path``, in either format, and references to them from stages that do not train.

A stage of type ``load_checkpoint`` leaves no copy of the weights: its ``model/`` has ``reference.json`` with the path
and the SHA-256 of the files, which are compared when the weights are loaded.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_s2d.artifacts.files import atomic_write_text, file_digest, read_json_object
from megatron_s2d.config.hf_config import is_megatron_checkpoint
from megatron_s2d.errors import UserError
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.parallel.checkpoint import MANIFEST_NAME

REFERENCE_NAME = "reference.json"


def check_files(directory: Path) -> None:
    """Raise ``UserError`` if ``directory`` does not have the tensors of its model; reads headers only."""
    if not is_megatron_checkpoint(directory):
        HfCheckpoint(directory)
    elif not (directory / MANIFEST_NAME).is_file():
        raise UserError(f"{directory}: not a complete Megatron checkpoint (no {MANIFEST_NAME})")


def write_reference(model_path: Path, source: Path) -> None:
    """Make ``model_path`` stand for the weights in ``source``. Reads every byte of them."""
    content = {"path": str(source.resolve()), "sha256": weight_digests(source)}
    atomic_write_text(model_path / REFERENCE_NAME, json.dumps(content, indent=1) + "\n")


def referenced_source(model_path: Path) -> Path | None:
    """Return the directory that ``model_path`` stands for; None if it has weights itself."""
    path = model_path / REFERENCE_NAME
    return Path(read_json_object(path)["path"]) if path.is_file() else None


def verify_reference(model_path: Path) -> None:
    """Raise ``UserError`` if the files behind a reference are not those that it was written for."""
    content = read_json_object(model_path / REFERENCE_NAME)
    source, recorded = Path(content["path"]), content["sha256"]
    if not source.is_dir():
        raise UserError(f"{source}: the weights that {model_path} refers to are not there any more: restore them")
    current = weight_digests(source)
    for name in sorted(recorded | current):
        if recorded.get(name) != current.get(name):
            raise UserError(
                f"{source / name} has changed since {model_path} was written: restore it, or remove "
                f"{model_path.parent} to run the stage again"
            )


def weight_digests(source: Path) -> dict[str, str]:
    """Return file -> SHA-256 of what determines the weights; a Megatron checkpoint's manifest stands for its files."""
    if is_megatron_checkpoint(source):
        return {MANIFEST_NAME: file_digest(source / MANIFEST_NAME)}
    return HfCheckpoint(source).file_digests() | {"config.json": file_digest(source / "config.json")}
