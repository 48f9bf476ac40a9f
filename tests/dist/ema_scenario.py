"""A student taught by a moving average of itself, stopped and resumed, at any layout (test_training_layouts.py)."""

from __future__ import annotations

import tempfile
import types
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.stages.lagged_teacher import LaggedTeacherSource
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter

DECAY, STEPS, STOP = 0.75, 4, 2


class Run:
    """Steps of a student, of which the first reads the start of the average or the checkpoint after ``resumed``."""

    def __init__(self, layout: Layout, directory: StageDirectory, resumed: int = 0):
        import training_worker as worker
        import view_scenarios

        self.worker, self.batch = worker, view_scenarios.batch()
        self.directory = directory
        self.student, self.teacher = (view_scenarios.untrained_student(layout) for _ in range(2))
        self.teacher.freeze()
        self.student.prepare_training(worker.OPTIMIZER, STEPS)
        inner = types.SimpleNamespace(step=lambda step: None, resume=lambda state: None)
        self.source = LaggedTeacherSource(inner, self.student, self.teacher, 1, directory, DECAY)
        if resumed:
            state = self.student.load(directory.checkpoint_path(resumed), with_optimizer=True)
            self.source.resume(state)
        self.distributions = FullTeacher(self.student, TeacherRouter({None: self.teacher}, view_scenarios.views()))
        self.columns = {"divergence_weight": worker.weights(self.batch, "token_mean")}

    def step(self, step: int) -> dict[str, float]:
        """Renew the average, train, and write a checkpoint after ``STOP``."""
        self.source.step(step)
        batch = self.worker.keep_own(self.batch, self.student.layout)
        objective = divergence_objective("reverse_kl")
        row = self.worker.update(self.student, batch, objective, self.columns, self.distributions)
        if step == STOP:
            self.source.before_checkpoint(step)
            self.student.save(
                self.directory.checkpoint_path(step), {"step": step, "updates": step}, with_optimizer=True
            )
        return row

    def weights(self) -> list[torch.Tensor]:
        """Copies of this rank's weights: the student's, then the average's."""
        return [p.detach().clone() for model in (self.student, self.teacher) for p in model.parameters()]


def ema(layout: Layout) -> dict:
    """Metrics of all steps, those after a resume, whether both ended with the same bits, and the average's error."""
    directory = StageDirectory(Path(broadcast_from_rank0(tempfile.mkdtemp)))
    unbroken, expected = Run(layout, directory), []
    rows = []
    for step in range(1, STEPS + 1):
        before = [p.detach().double() for p in unbroken.student.parameters()]
        # Before the first step nothing is renewed: the average is the start.
        expected = [DECAY * e + (1 - DECAY) * b for e, b in zip(expected, before, strict=True)] if expected else before
        rows.append(unbroken.step(step))
    error = max(
        float((p.detach().double() - e).abs().max())
        for p, e in zip(unbroken.teacher.parameters(), expected, strict=True)
    )
    moved = max(
        float((p - other).abs().max().detach())
        for p, other in zip(unbroken.teacher.parameters(), unbroken.student.parameters(), strict=True)
    )
    resumed = Run(layout, directory, STOP)
    again = [resumed.step(step) for step in range(STOP + 1, STEPS + 1)]
    same = all(map(torch.equal, unbroken.weights(), resumed.weights()))
    on_ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(on_ranks, (same, error, moved))
    return {
        "rows": rows,
        "resumed": again,
        "same_bits": all(item[0] for item in on_ranks),
        "error": max(item[1] for item in on_ranks),
        "moved": max(item[2] for item in on_ranks),
    }
