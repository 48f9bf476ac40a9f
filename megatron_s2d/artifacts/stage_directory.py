"""The output directory of a stage: resolved config, lineage, metrics, checkpoints, final model. No torch."""

from __future__ import annotations

import itertools
import math
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_s2d.artifacts.files import (
    PARTIAL_SUFFIX,
    append_line,
    atomic_write_json,
    atomic_write_text,
    fsync_path,
    read_json_object,
    read_jsonl,
    remove_tree,
    rename,
)
from megatron_s2d.artifacts.shapes import Finished, Lineage, MetricsRow, ValidationRow, checked, checked_rows
from megatron_s2d.artifacts.versions import code_version, library_versions, timestamp
from megatron_s2d.errors import UserError


class StageDirectory:
    """Outputs of one stage: ``config.json`` (resolved), ``lineage.json``, ``metrics.jsonl``, ``checkpoints/``.

    ``finished.json`` is written last and marks the stage as done; without it the stage is resumed. Only checkpoints
    past their retention are ever deleted.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.lineage_path = self.path / "lineage.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints_path = self.path / "checkpoints"
        self.finished_path = self.path / "finished.json"
        self.model_path = self.path / "model"  # final weights, without optimizer state
        self.adapter_path = self.path / "adapter"  # of a stage that trains a LoRA adapter: a PEFT directory
        self.cache_path = self.path / "cache"  # of a teacher_cache stage
        self.validation_path = self.path / "validation.jsonl"  # one row a validation
        self._noted = -math.inf
        self.note_path = self.path / "progress.txt"  # what a round that takes long has done so far
        self.warnings_path = self.path / "warnings.txt"  # what the user should know, a line each

    def begin(self, config: Mapping[str, Any], inputs: Mapping[str, str], seeds: Mapping[str, int]) -> None:
        """Record the start of the stage, or that it resumes; ``inputs`` maps a name to a digest.

        Raises ``UserError`` if the directory belongs to another configuration or other inputs: ``archive`` it first.
        """
        now = timestamp()
        if self.config_path.exists() and self.lineage_path.exists():
            lineage = self.lineage()
            if self.config() != dict(config) or lineage["inputs"] != dict(inputs):
                raise UserError(f"{self.path}: contains a stage with another configuration; archive it first")
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
        """Mark the stage as done and write ``summary`` (outputs with digests, seconds, ...) to ``finished.json``."""
        lineage = self.lineage()
        lineage["finished"] = timestamp()
        atomic_write_json(self.lineage_path, lineage)
        atomic_write_json(self.finished_path, dict(summary))

    def is_finished(self) -> bool:
        """Return whether the stage has finished."""
        return self.finished_path.exists()

    def config(self) -> dict[str, Any]:
        """Return the resolved configuration of the stage."""
        return read_json_object(self.config_path)

    def lineage(self) -> dict[str, Any]:
        """Return inputs, seeds, versions and times."""
        return checked(read_json_object(self.lineage_path), Lineage, str(self.lineage_path))

    def finished(self) -> dict[str, Any]:
        """Return the summary passed to ``finish``; raise ``UserError`` if the stage has not finished."""
        if not self.is_finished():
            raise UserError(f"{self.path}: the stage has not finished; run the workflow again to complete it")
        return checked(read_json_object(self.finished_path), Finished, str(self.finished_path))

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of ``metrics.jsonl``, one per step; empty without such a file."""
        rows = read_jsonl(self.metrics_path) if self.metrics_path.exists() else []
        return checked_rows(rows, MetricsRow, str(self.metrics_path))

    def annotate_lineage(self, key: str, value: Any) -> None:
        """Set ``key`` of the lineage: a decision that the stage made."""
        atomic_write_json(self.lineage_path, self.lineage() | {key: value})

    def validations(self) -> list[dict[str, Any]]:
        """Return the rows of ``validation.jsonl``, by step; empty without such a file."""
        rows = read_jsonl(self.validation_path) if self.validation_path.exists() else []
        return checked_rows(rows, ValidationRow, str(self.validation_path))

    def validation_folder(self, step: int) -> Path:
        """Return the folder of the responses of the validation after ``step``."""
        return self.path / "validation" / f"step_{step:08d}"

    def validation_folders(self) -> dict[int, Path]:
        """Return step -> folder of responses, of the validations that have begun."""
        return {int(path.name.removeprefix("step_")): path for path in (self.path / "validation").glob("step_*")}

    def note(self, text: str) -> None:
        """Replace the line that the runner shows while the next row of the metrics is not there yet; once a second."""
        if time.monotonic() - self._noted >= 1.0:
            self._noted = time.monotonic()
            atomic_write_text(self.note_path, text)

    def warn(self, line: str) -> None:
        """Add a line that the runner shows while the stage runs."""
        append_line(self.warnings_path, line)

    def checkpoint_path(self, step: int) -> Path:
        """Return the path of the checkpoint after ``step``."""
        return self.checkpoints_path / f"step_{step:08d}"

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        paths = self.checkpoints_path.glob("step_*") if self.checkpoints_path.is_dir() else []
        return sorted(path for path in paths if path.is_dir() and not path.suffix)

    def set_aside_damaged(self, path: Path) -> None:
        """Rename a checkpoint so that it no longer counts as one; it is deleted with the others."""
        rename(path, path.with_name(path.name + ".damaged"))

    def retain_checkpoints(
        self, keep_last_n: int, pinned: Callable[[Sequence[int]], Collection[int]] = lambda steps: ()
    ) -> None:
        """Delete all but the newest ``keep_last_n`` checkpoints and the remains of interrupted saves or deletions.

        pinned: steps of the newest ones -> steps of further ones that are kept.
        """
        if keep_last_n < 1:
            raise ValueError("keep_last_n must be at least 1")
        paths = self.checkpoints()
        newest = [int(path.name.removeprefix("step_")) for path in paths[-keep_last_n:]]
        kept = {self.checkpoint_path(step) for step in pinned(newest)}
        for path in paths[:-keep_last_n]:
            if path in kept:
                continue
            # Renamed first: a half-deleted directory must not look like a checkpoint.
            rename(path, path.with_name(path.name + PARTIAL_SUFFIX))
        for path in self.checkpoints_path.glob(f"*{PARTIAL_SUFFIX}"):
            remove_tree(path)

    def archive(self, reason: str) -> Path | None:
        """Move the directory to ``.archive/<name>-<n>`` with a ``reason.txt``; return None if it is missing."""
        if not self.path.exists():
            return None
        archive = self.path.parent / ".archive"
        archive.mkdir(exist_ok=True)
        atomic_write_text(self.path / "reason.txt", f"{timestamp()} {reason}\n")
        # Asks for names: a listing would have the archived directories of all stages.
        target = next(path for n in itertools.count(1) if not (path := archive / f"{self.path.name}-{n}").exists())
        rename(self.path, target)
        fsync_path(self.path.parent)
        return target
