"""The resumable checkpoints of a stage: which one to go on from, when the next is safe, which old ones go."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.training import CheckpointConfig
from megatron_s2d.parallel.checkpoint import CheckpointSave
from megatron_s2d.train.policy import MegatronModel


class CheckpointManager:
    """Checkpoints of one stage, written at once or in the background; every method is collective."""

    def __init__(self, policy: MegatronModel, stage: StageDirectory, settings: CheckpointConfig):
        self._policy, self._stage, self._settings = policy, stage, settings
        self._saving: CheckpointSave | None = None

    def resume(self) -> dict[str, Any]:
        """Load the newest checkpoint into the policy and return its position; at the start, zeros."""
        found = self._stage.checkpoints()
        if not found:
            return {"step": 0, "updates": 0}
        return self._policy.load(found[-1], with_optimizer=True)

    def save(self, position: dict[str, Any]) -> None:
        """Save the state as it is now; one that is still being written is waited for first."""
        self.finish()
        target = self._stage.checkpoint_path(position["step"])
        if not target.exists():
            background = self._settings.async_save
            self._saving = self._policy.start_saving(target, position, with_optimizer=True, async_save=background)
            if not background:
                self.finish()

    def poll(self) -> None:
        """Let a checkpoint appear whose files are written by now."""
        if self._saving is not None and self._saving.is_written():
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written, and drop the oldest checkpoints; raises ``UserError`` if it could not be."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.finish()
        if dist.get_rank() == 0:
            self._stage.retain_checkpoints(self._settings.keep_last_n)
        dist.barrier()
