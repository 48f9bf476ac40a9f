"""A student that is taught by itself as it was some steps ago: a copy of its weights that is renewed now and then.

The copy is written when it is renewed, because a checkpoint between two renewals has other weights: a resumed run reads
the copy that its checkpoint trained with, and continues bit for bit.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.train.loop import SampleSource, StepData
from megatron_s2d.train.megatron_model import MegatronModel

FOLDER = "lagged_teacher"


@dataclasses.dataclass(frozen=True, eq=False)
class LaggedTeacherSource:
    """The samples of ``source``, before which the teacher is renewed every ``lag`` steps; methods are collective."""

    source: SampleSource
    student: MegatronModel
    teacher: MegatronModel  # frozen, of the student's layout; as the student began
    lag: int
    stage: StageDirectory

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``; the teacher gets the weights that it had after that step."""
        self.source.resume(state)
        renewed = state["step"] // self.lag * self.lag
        if 0 < renewed < state["step"]:  # else it is as it began, or is renewed before the next step
            path = self._path(renewed)
            if not broadcast_from_rank0(path.is_dir):
                raise UserError(f"{path}: the teacher of the checkpoint is missing: remove the stage's directory")
            self.teacher.load(path)

    def step(self, step: int) -> StepData:
        """See ``train.loop.SampleSource``."""
        done = step - 1
        if done and done % self.lag == 0:
            self._renew(done)
        return self.source.step(step)

    @torch.no_grad()
    def _renew(self, done: int) -> None:
        for of_teacher, of_student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            of_teacher.copy_(of_student)
        path = self._path(done)
        if dist.get_rank() == 0:  # of a run that was killed after it: no checkpoint is that new
            shutil.rmtree(path, ignore_errors=True)
        dist.barrier()
        self.teacher.save(path, {"step": done}, with_optimizer=False)
        if dist.get_rank() == 0:
            self._remove_unused(done)

    def _remove_unused(self, done: int) -> None:
        """Remove the copies from before the one that the oldest checkpoint trained with."""
        oldest = min((int(path.name.rpartition("_")[2]) for path in self.stage.checkpoints()), default=0)
        needed = min(oldest, done) // self.lag * self.lag
        for path in (self.stage.path / FOLDER).iterdir():
            if path.name.isdecimal() and int(path.name) < needed:
                shutil.rmtree(path)

    def remove_copies(self) -> None:
        """Remove all copies, which a finished stage does not need."""
        if dist.get_rank() == 0:
            shutil.rmtree(self.stage.path / FOLDER, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.stage.path / FOLDER / str(step)
