"""Time of a distillation step with the exact full-vocabulary KL, relative to one with sampled tokens only.

    python benchmarks/opd_step.py [--json OUT]

Both sides: one teacher forward pass, student forward and backward, no optimizer (it is the same for both). ``exact``:
the teacher's hidden states, and the KL over the full vocabulary inside the student's loss. ``sampled``: the teacher's
log-probabilities of the sampled tokens, and a policy loss. Rounds are interleaved. Target on one H200: exact at most
1.05 times sampled. Student and teacher have the shapes of Qwen3-1.7B and Qwen3-8B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from device_common import ON_GPU, begin, random_policy, random_samples, seconds_of, spec_of

from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.objectives.distill import divergence_objective, policy_distillation_objective
from megatron_s2d.objectives.policy import Surrogate
from megatron_s2d.parallel import device
from megatron_s2d.records import Sample
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter
from megatron_s2d.train.megatron_model import MegatronModel


def exact_step(student: MegatronModel, teacher: MegatronModel, samples: list[Sample], kind: str) -> Callable[[], float]:
    """Return a function that runs one step and returns the loss."""
    weights = {"divergence_weight": [1 / sum(sample.response_length for sample in samples)] * len(samples)}
    source = FullTeacher(student, TeacherRouter({None: teacher}))
    update, objective = MiniBatch(samples, weights), divergence_objective(kind)

    def step() -> float:
        batches = student.pack(samples, weights)
        distributions = source.distributions(update, batches)
        return student.forward_backward(batches, objective, distributions, num_tokens=update.num_tokens)["loss"].value()

    return step


def sampled_step(student: MegatronModel, teacher: MegatronModel, samples: list[Sample]) -> Callable[[], float]:
    """Return the same with log p_teacher(token) as the advantage; neither side subtracts the student's log p."""
    weights = {"policy_weight": [1 / sum(sample.response_length for sample in samples)] * len(samples)}
    objective = policy_distillation_objective(Surrogate(on_policy=True))

    def step() -> float:
        scored = [
            dataclasses.replace(sample, advantages=score.astype(np.float32), teacher_log_probs=score)
            for sample, score in zip(samples, teacher.score(samples), strict=True)
        ]
        batches = student.pack(scored, weights)
        update = MiniBatch(scored, weights)
        return student.forward_backward(batches, objective, num_tokens=update.num_tokens)["loss"].value()

    return step


def main(arguments: list[str] | None = None) -> None:
    setup = begin(__doc__.splitlines()[0], arguments, repeats=5)
    student_preset, teacher_preset = ("qwen3-1.7b", "qwen3-8b") if ON_GPU else ("tiny-student", "tiny-teacher")
    lengths = ((8, 1024), (4, 4096)) if ON_GPU else ((3, 24),)
    student = random_policy(spec_of(student_preset), setup.layout)
    teacher = random_policy(spec_of(teacher_preset), setup.layout)
    teacher.freeze()
    student.prepare_training(OptimizerConfig(), 100)
    for count, length in lengths:
        student.max_tokens = teacher.max_tokens = max(length, 8192) if ON_GPU else 48
        samples = random_samples(student.spec, count, length, prompt=length // 8)
        steps = {
            "sampled": sampled_step(student, teacher, samples),
            "exact forward_kl": exact_step(student, teacher, samples, "forward_kl"),
            "exact reverse_kl": exact_step(student, teacher, samples, "reverse_kl"),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(setup.repeats):
            for name, step in steps.items():
                times[name].append(seconds_of(step, 1, warm_up=2 if number == 0 else 0))
        seconds = {name: float(np.median(values)) for name, values in times.items()}
        for name, value in seconds.items():
            setup.add(
                student=student_preset,
                teacher=teacher_preset,
                sequences=count,
                length=length,
                loss=name,
                transformer_engine=device.capabilities().transformer_engine,
                seconds=value,
                against_sampled=value / seconds["sampled"],
                tokens_per_second=count * length / value,
            )


if __name__ == "__main__":
    main()
