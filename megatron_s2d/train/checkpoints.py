"""The resumable checkpoints of one stage: resume from the newest, save synchronously or not, delete the oldest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch.distributed as dist

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.training import CheckpointConfig
from megatron_s2d.parallel.checkpoint import CheckpointSave
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.manifest import DamagedCheckpoint
from megatron_s2d.train.megatron_model import MegatronModel


class CheckpointManager:
    """Saves and resumes checkpoints of one stage; every method is collective."""

    def __init__(
        self,
        model: MegatronModel,
        stage: StageDirectory,
        settings: CheckpointConfig,
        pinned: Callable[[Sequence[int]], Collection[int]] = lambda steps: (),
        before_save: Callable[[int], None] = lambda step: None,
    ):
        """pinned: see ``StageDirectory.retain_checkpoints``. before_save: called with the step of a new checkpoint."""
        self._model, self._stage, self._settings, self._pinned = model, stage, settings, pinned
        self._before_save = before_save
        self._pending: CheckpointSave | None = None

    def resume(self) -> dict[str, Any]:
        """Load the newest intact checkpoint into the model and return its trainer state; without one, return zeros.

        A damaged checkpoint is renamed to ``<name>.damaged`` and the one before it is loaded; the last one that is left
        raises its error.
        """
        names = broadcast_from_rank0(
            lambda: [path.name for path in self._stage.checkpoints()]
        )  # nodes may see older ones
        checkpoints = [self._stage.checkpoints_path / name for name in names]
        if not checkpoints:
            return {"step": 0, "updates": 0}
        while True:
            newest = checkpoints.pop()
            try:
                return self._model.load(newest, with_optimizer=True)
            except DamagedCheckpoint as error:
                if not checkpoints:
                    raise
                if dist.get_rank() == 0:
                    print(f"{error}; resuming from {checkpoints[-1].name} instead", flush=True)
                    self._stage.set_aside_damaged(newest)
                dist.barrier()

    def save(self, trainer_state: dict[str, Any]) -> None:
        """Save the current state, after waiting for a save that is still running."""
        self.finish()
        path = self._stage.checkpoint_path(trainer_state["step"])
        if not broadcast_from_rank0(path.exists):
            self._before_save(trainer_state["step"])
            async_save = self._settings.async_save
            self._pending = self._model.start_saving(path, trainer_state, with_optimizer=True, async_save=async_save)
            if not async_save:
                self.finish()

    def poll(self) -> None:
        """Finish an asynchronous save whose files are written; do not wait for one that is still writing."""
        if self._pending is not None and self._pending.is_written():
            self.finish()

    def finish(self) -> None:
        """Wait for the running save and delete the oldest checkpoints; ``UserError`` if the save failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.finish()
        if dist.get_rank() == 0:
            self._stage.retain_checkpoints(self._settings.keep_last_n, self._pinned)
        dist.barrier()
