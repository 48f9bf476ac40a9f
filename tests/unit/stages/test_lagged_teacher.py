"""A teacher that is the student of some steps ago, or its average: on time, and the same after a resume."""

from __future__ import annotations

import types

import pytest
import torch

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.layout import initialize_distributed
from megatron_s2d.stages.lagged_teacher import FOLDER, LaggedTeacherSource


class Model:
    def __init__(self, value: float, dtype: torch.dtype = torch.float32):
        self.weight = torch.nn.Parameter(torch.tensor([value], dtype=dtype))

    def parameters(self):
        yield self.weight

    def save(self, path, state, *, with_optimizer):
        path.mkdir(parents=True)
        torch.save(self.weight.data, path / "w")

    def load(self, path):
        saved = torch.load(path / "w")
        assert saved.dtype == self.weight.dtype
        self.weight.data.copy_(saved)


class Run:
    """Steps of a student whose weight after step n is n; ``seen`` has the teacher's weight in each step."""

    def __init__(self, directory: StageDirectory, step: int = 0, lag: int = 3, ema_decay=None, dtype=torch.float32):
        initialize_distributed()
        self.directory, self.student, self.teacher = directory, Model(float(step), dtype), Model(0.0, dtype)
        self.seen: dict[int, float] = {}
        inner = types.SimpleNamespace(step=self._look, resume=lambda state: None)
        self.source = LaggedTeacherSource(inner, self.student, self.teacher, lag, directory, ema_decay)
        self.source.resume({"step": step})

    def _look(self, step: int):
        self.seen[step] = float(self.teacher.weight)

    def steps(self, first: int, last: int, every: int = 1) -> None:
        for step in range(first, last + 1):
            self.source.step(step)
            self.student.weight.data.fill_(float(step))
            if step % every == 0:
                self.source.before_checkpoint(step)
                self.directory.checkpoint_path(step).mkdir(parents=True)
                self.directory.retain_checkpoints(2)


EXPECTED = {1: 0, 2: 0, 3: 0, 4: 3, 5: 3, 6: 3, 7: 6, 8: 6, 9: 6, 10: 9}


def averages(decay: float, lag: int) -> dict[int, float]:
    """The teacher's weight in each of 20 steps, in float64."""
    teacher, result = 0.0, {}
    for step in range(1, 21):
        if (step - 1) % lag == 0:
            teacher = decay * teacher + (1 - decay) * (step - 1)
        result[step] = teacher
    return result


def test_the_teacher_is_the_student_of_the_last_multiple(tmp_path):
    run = Run(StageDirectory(tmp_path))
    run.steps(1, 10)
    assert run.seen == EXPECTED
    # Copies of checkpoints that are gone are removed before the next one, and a renewal needs none.
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["10", "8"]
    run.source.remove_copies()
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("stopped", range(1, 10))
def test_a_resumed_run_has_the_teacher_of_the_unbroken_one(tmp_path, stopped):
    """A checkpoint every two steps; the run is killed after ``stopped`` and continues from the newest one."""
    Run(StageDirectory(tmp_path)).steps(1, stopped, every=2)
    resumed = stopped // 2 * 2
    run = Run(StageDirectory(tmp_path), resumed)
    run.steps(resumed + 1, 10, every=20)
    assert run.seen == {step: value for step, value in EXPECTED.items() if step > resumed}


@pytest.mark.parametrize(("decay", "lag"), [(0.9, 1), (0.5, 3)])
def test_the_teacher_is_a_moving_average(tmp_path, decay, lag):
    run = Run(StageDirectory(tmp_path), lag=lag, ema_decay=decay)
    run.steps(1, 20)
    assert run.seen == pytest.approx(averages(decay, lag), rel=1e-6)


def test_an_average_in_bfloat16_keeps_what_a_step_adds(tmp_path):
    """Of 1024 and a thousandth of a difference of 8: less than half of bfloat16's last digit, so rounding loses it."""
    run = Run(StageDirectory(tmp_path), lag=1, ema_decay=0.999, dtype=torch.bfloat16)
    run.source._averages[0].fill_(1024.0)
    run.student.weight.data.fill_(1032.0)
    for step in range(2, 1000):
        run.source.step(step)
    assert float(run.source._averages[0]) == pytest.approx(1032 - 8 * 0.999**998, rel=1e-5)
    assert float(run.teacher.weight) == 1032.0 and run.teacher.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stopped", [1, 2, 5, 12])
def test_a_resumed_average_is_that_of_the_unbroken_run(tmp_path, stopped, dtype):
    settings = {"lag": 2, "ema_decay": 0.7, "dtype": dtype}
    unbroken = Run(StageDirectory(tmp_path / "unbroken"), **settings)
    unbroken.steps(1, 20)
    Run(StageDirectory(tmp_path / "killed"), **settings).steps(1, stopped, every=1)
    run = Run(StageDirectory(tmp_path / "killed"), stopped, **settings)
    run.steps(stopped + 1, 20, every=40)
    assert run.seen == {step: value for step, value in unbroken.seen.items() if step > stopped}
    assert float(run.source._averages[0]) == float(unbroken.source._averages[0])


def test_a_missing_copy_is_named(tmp_path):
    with pytest.raises(UserError, match="the teacher of the checkpoint is missing"):
        Run(StageDirectory(tmp_path), 4)
