"""Seconds and traffic of one step of a workflow's stage, phase by phase. No torch here.

Lengths are those of ``StageShape``: every response at its limit, so times are upper ends, and of two layouts the
comparison is fair. Phases run one after the other, as in ``train/loop.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from megatron_s2d.config.algorithm import ExpoConfig, OpdConfig, TeacherCacheConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.workflow.arithmetic import Build, model_flops
from megatron_s2d.workflow.estimate import Workload, workload
from megatron_s2d.workflow.stage_estimate import BYTES, StageShape, frozen_roles
from megatron_s2d.workflow.timing import Machine, Placed, Traffic


@dataclasses.dataclass(frozen=True)
class StageTime:
    """One step (a round, for a cache) of a stage."""

    seconds: Mapping[str, float]  # phase -> seconds; updates of a step together
    traffic: Mapping[str, Traffic]  # kind -> what one rank sends in a step
    tokens: int  # prompt and response tokens of the step, over all data ranks
    flops: float  # of the trained model: forward and backward passes, nothing recomputed, over all ranks

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    def mfu(self, machine: Machine, ranks: int) -> float:
        """Share of the data sheet's peak that the trained model's operations would make of the whole step."""
        return self.flops / (self.total * ranks * machine.gpu.bf16_flops) if self.total else 0.0


def stage_time(
    config: WorkflowConfig, name: str, specs: Mapping[str, ModelSpec], shape: StageShape, machine: Machine
) -> StageTime:
    """The step of stage ``name`` on ``machine``."""
    stage, model = config.stages[name], config.model_of(name)
    if isinstance(stage, ExpoConfig):
        return StageTime({}, {}, 0, 0.0)
    parallel = config.parallel
    if isinstance(stage, TeacherCacheConfig):
        parallel = config.frozen_parallel(stage.teacher)
    build = Build(BYTES[config.precision], True, config.models[model].recompute)
    student = Placed(specs[model], parallel, build, machine)
    seconds = _generation(config, stage, shape, student)
    if isinstance(stage, TeacherCacheConfig):
        work = _work(shape, shape.requests, stage, parallel)
        seconds["score"] = student.score_seconds(work, outputs=stage.kind != "hidden")
        return StageTime(seconds, _times(student.pass_traffic(work, trains=False), work.num_micro_batches),
                         shape.requests * shape.length, 0.0)  # fmt: skip
    work = _work(shape, shape.responses, stage, parallel)
    teacher, traffic = None, {}
    for role, other, layout in frozen_roles(config, name):
        spec = specs[config.model_of(other)]
        scorer = Placed(spec, layout, dataclasses.replace(build, recompute="none"), machine)
        exact = isinstance(stage, OpdConfig) and stage.granularity != "sampled"
        at = _work(shape, shape.responses, stage, layout)
        seconds[f"{role} forward"] = seconds.get(f"{role} forward", 0.0) + shape.updates * scorer.score_seconds(
            at, outputs=not exact
        )
        if exact:
            teacher = spec
            if layout != parallel:
                traffic |= _travel(role, spec, shape, build, parallel)
    if shape.updates > 1 and shape.requests:
        seconds["old log-probabilities"] = shape.updates * student.score_seconds(work, outputs=True)
    for phase, value in student.train_seconds(work, teacher).items():
        seconds[phase] = shape.updates * value
    if traffic:
        seconds["teacher states"] = sum(item.seconds(machine) for item in traffic.values())
    traffic |= _times(student.train_traffic(work), shape.updates)
    tokens = shape.updates * shape.responses * shape.length
    flops = 3 * model_flops(specs[model], tokens, shape.length / 2)
    flops += 3 * shape.updates * shape.responses * shape.response_length * output_flops(specs[model])
    return StageTime(seconds, traffic, tokens, flops)


def output_flops(spec: ModelSpec) -> float:
    """Operations of the output layer for one position."""
    return 2.0 * spec.hidden_size * spec.vocab_size


def _work(shape: StageShape, responses: int, stage, parallel: ParallelConfig) -> Workload:
    return workload(
        responses, shape.length, shape.response_length, max_tokens=stage.micro_batch.max_tokens, parallel=parallel
    )


def _generation(config: WorkflowConfig, stage, shape: StageShape, student: Placed) -> dict[str, float]:
    if not shape.requests:
        return {}
    data, rollout = student.parallel.data_parallel_size, config.rollout
    requests, prompts = -(-shape.requests // data), -(-shape.prompts // data)
    rows = max(1, min(requests, rollout.max_batch_size, rollout.max_batch_tokens // shape.length))
    batches = math.ceil(requests / rows)
    return {
        "prefill": student.prefill_seconds(max(prompts, batches), shape.prompt_length),
        "decode": batches * student.decode_seconds(requests / batches, shape.prompt_length, shape.response_length),
    }


def _travel(
    role: str, spec: ModelSpec, shape: StageShape, build: Build, parallel: ParallelConfig
) -> dict[str, Traffic]:
    """Hidden states of the whole update to every rank, and the output layer (``stages/teachers.py``)."""
    states = shape.updates * shape.responses * shape.length * spec.hidden_size * build.bytes_per_value
    weight = shape.updates * spec.vocab_size * spec.hidden_size * build.bytes_per_value
    world = parallel.world_size
    return {
        f"{role} states": Traffic(states, shape.updates, world),
        f"{role} output layer": Traffic(weight, shape.updates, world),
    }


def _times(traffic: Mapping[str, Traffic], count: int) -> dict[str, Traffic]:
    return {
        name: Traffic(item.bytes_sent * count, item.calls * count, item.span) for name, item in traffic.items()
    }
