"""A student that is taught by itself as it was some steps ago, or by a moving average (EMA) of its weights.

The teacher is a copy of the weights that is renewed now and then. It is written with every checkpoint of the student:
a resumed run has the teacher that its checkpoint trained with, and continues bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
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


@dataclasses.dataclass(eq=False)
class LaggedTeacherSource:
    """The samples of ``source``, before which the teacher is renewed every ``lag`` steps; methods are collective.

    ema_decay: at a renewal the teacher becomes ``ema_decay`` of itself and the rest of the student, in float32, because
    a bfloat16 weight would not move by the small share of a small difference; None: it becomes the student.
    """

    source: SampleSource
    student: MegatronModel
    teacher: MegatronModel  # frozen, of the student's layout; as the student began
    lag: int
    stage: StageDirectory
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        self._averages: list[torch.Tensor] = []  # of each parameter of the teacher; a float32 one is its own
        if self.ema_decay is not None:
            self._averages = [parameter.detach().float() for parameter in self.teacher.parameters()]

    def resume(self, state: Mapping[str, Any]) -> None:
        """See ``train.loop.SampleSource``; the teacher gets the weights that it had after that step."""
        self.source.resume(state)
        step = state["step"]
        if not self._is_written(step):
            return
        if not broadcast_from_rank0(self._path(step).is_dir):
            raise UserError(
                f"{self._path(step)}: the teacher of the checkpoint is missing: remove the stage's directory"
            )
        with self._in_float32():
            self.teacher.load(self._path(step))
        self._round_averages()

    def step(self, step: int) -> StepData:
        """See ``train.loop.SampleSource``."""
        done = step - 1
        if done and done % self.lag == 0:
            self._renew()
        return self.source.step(step)

    def before_checkpoint(self, step: int) -> None:
        """Write the teacher of the checkpoint after ``step``, and remove those of checkpoints that are gone."""
        if not self._is_written(step):
            return
        path = self._path(step)
        if dist.get_rank() == 0:  # of a run that was killed after it: no checkpoint is that new
            shutil.rmtree(path, ignore_errors=True)
            self._remove_unused()
        dist.barrier()
        with self._in_float32():
            self.teacher.save(path, {"step": step}, with_optimizer=False)

    def remove_copies(self) -> None:
        """Remove all copies, which a finished stage does not need."""
        if dist.get_rank() == 0:
            shutil.rmtree(self.stage.path / FOLDER, ignore_errors=True)

    def _is_written(self, step: int) -> bool:
        """Whether a run that resumes after ``step`` needs the teacher: it has changed, and is not replaced at once."""
        return step > self.lag and (self.ema_decay is not None or step % self.lag != 0)

    @torch.no_grad()
    def _renew(self) -> None:
        if self.ema_decay is not None:
            for average, of_student in zip(self._averages, self.student.parameters(), strict=True):
                average.lerp_(of_student.float(), 1 - self.ema_decay)
            self._round_averages()
            return
        for of_teacher, of_student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            of_teacher.copy_(of_student)

    @torch.no_grad()
    def _round_averages(self) -> None:
        """Give the teacher the averages, in its precision."""
        for average, of_teacher in zip(
            self._averages, self.teacher.parameters() if self._averages else (), strict=True
        ):
            of_teacher.copy_(average)

    @contextlib.contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Give the teacher's parameters the averages themselves, for files that have all of their digits."""
        parameters = list(self.teacher.parameters()) if self._averages else []
        rounded = [parameter.data for parameter in parameters]
        for parameter, average in zip(parameters, self._averages, strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, data in zip(parameters, rounded, strict=True):
                parameter.data = data

    def _remove_unused(self) -> None:
        kept = {int(path.name.rpartition("_")[2]) for path in self.stage.checkpoints()}
        folder = self.stage.path / FOLDER
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.isdecimal() and int(path.name) not in kept:
                shutil.rmtree(path)

    def _path(self, step: int) -> Path:
        return self.stage.path / FOLDER / str(step)
