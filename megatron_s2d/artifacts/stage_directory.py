"""The directory that a stage leaves on disk: resolved config, lineage, metrics, checkpoints, final model. No torch."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_s2d.artifacts.files import (
    PARTIAL_SUFFIX,
    atomic_write_json,
    atomic_write_text,
    fsync_path,
    read_json,
    read_jsonl,
)
from megatron_s2d.artifacts.versions import code_version, library_versions, timestamp
from megatron_s2d.errors import UserError


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
        return sorted(path for path in found if path.is_dir() and not path.name.endswith(PARTIAL_SUFFIX))

    def retain_checkpoints(self, keep: int) -> None:
        """Delete all but the ``keep`` newest checkpoints, and what an interrupted deletion or save left."""
        if keep < 1:
            raise ValueError("at least one checkpoint must stay")
        for path in self.checkpoints()[:-keep]:
            # Renamed first: a half-deleted directory must not look like a checkpoint.
            path.rename(path.with_name(path.name + PARTIAL_SUFFIX))
        for path in self.checkpoints_path.glob(f"*{PARTIAL_SUFFIX}"):
            shutil.rmtree(path)

    def supersede(self, reason: str) -> Path | None:
        """Move the directory to ``.archive/<name>-<n>`` beside it, with ``reason.txt``; None where it is absent."""
        if not self.path.exists():
            return None
        shelf = self.path.parent / ".archive"
        shelf.mkdir(exist_ok=True)
        atomic_write_text(self.path / "reason.txt", f"{timestamp()} {reason}\n")
        taken = {path.name for path in shelf.iterdir()}
        number = next(n for n in range(1, len(taken) + 2) if f"{self.path.name}-{n}" not in taken)
        target = shelf / f"{self.path.name}-{number}"
        self.path.rename(target)
        fsync_path(self.path.parent)
        return target
