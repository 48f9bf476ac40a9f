"""A teacher that is the student of some steps ago: renewed on time, and the same after a resume from any step."""

from __future__ import annotations

import types

import pytest
import torch

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.layout import initialize_distributed
from megatron_s2d.stages.lagged_teacher import FOLDER, LaggedTeacherSource


class Model:
    def __init__(self, value: float):
        self.weight = torch.nn.Parameter(torch.tensor([value]))

    def parameters(self):
        yield self.weight

    def save(self, path, state, *, with_optimizer):
        path.mkdir(parents=True)
        torch.save(self.weight.data, path / "w")

    def load(self, path):
        self.weight.data.copy_(torch.load(path / "w"))


class Run:
    """Steps of a student whose weight after step n is n; ``seen`` has the teacher's weight in each step."""

    def __init__(self, directory: StageDirectory, step: int = 0, lag: int = 3):
        initialize_distributed()
        self.directory, self.student, self.teacher = directory, Model(float(step)), Model(0.0)
        self.seen: dict[int, float] = {}
        inner = types.SimpleNamespace(step=self._look, resume=lambda state: None)
        self.source = LaggedTeacherSource(inner, self.student, self.teacher, lag, directory)
        self.source.resume({"step": step})

    def _look(self, step: int):
        self.seen[step] = float(self.teacher.weight)

    def steps(self, first: int, last: int, every: int = 1) -> None:
        for step in range(first, last + 1):
            self.source.step(step)
            self.student.weight.data.fill_(float(step))
            if step % every == 0:
                self.directory.checkpoint_path(step).mkdir(parents=True)
                self.directory.retain_checkpoints(2)


EXPECTED = {1: 0, 2: 0, 3: 0, 4: 3, 5: 3, 6: 3, 7: 6, 8: 6, 9: 6, 10: 9}


def test_the_teacher_is_the_student_of_the_last_multiple(tmp_path):
    run = Run(StageDirectory(tmp_path))
    run.steps(1, 10)
    assert run.seen == EXPECTED
    # Copies from before the oldest checkpoint, that of step 9, are gone.
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["6", "9"]
    run.source.remove_copies()
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("stopped", range(1, 10))
def test_a_resumed_run_has_the_teacher_of_the_unbroken_one(tmp_path, stopped):
    """A checkpoint every two steps; the run is killed after ``stopped`` and goes on from the newest one."""
    Run(StageDirectory(tmp_path)).steps(1, stopped, every=2)
    resumed = stopped // 2 * 2
    run = Run(StageDirectory(tmp_path), resumed)
    run.steps(resumed + 1, 10, every=20)
    assert run.seen == {step: value for step, value in EXPECTED.items() if step > resumed}


def test_a_missing_copy_is_named(tmp_path):
    with pytest.raises(UserError, match="the teacher of the checkpoint is missing"):
        Run(StageDirectory(tmp_path), 4)
