"""The layout that fits a GPU and is fastest by the model of ``costs/timing.py``, for a whole workflow. No torch here.

Searched: tensor sizes up to a node, pipeline sizes that divide the layers, expert sizes that divide the experts, data
ranks as the rest, micro-batches of one, two and four of the longest samples, recomputation of nothing or of whole
layers. One layout for all stages, teachers included, because that is what ``parallel`` says; sequence parallelism
wherever there is tensor parallelism (it costs nothing by this model and saves memory). Left out: context parallelism,
which the trainer's packing and engine do not have, and layouts of teachers apart (``teacher_parallel``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.stage import StageConfig
from megatron_s2d.config.training import MicroBatchConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.roofline import Machine
from megatron_s2d.estimate.stage_memory import StageShape, stage_memory
from megatron_s2d.estimate.stage_time import stage_time
from megatron_s2d.models.families import check_layout
from megatron_s2d.workflow.preflight import Preflight

_MICRO_BATCHES = (1, 2, 4)  # longest samples
_RECOMPUTE = ("none", "full")  # selective recomputes attention, which keeps next to nothing where it is fused


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One way to run the workflow, with what it costs."""

    parallel: ParallelConfig
    recompute: str
    max_tokens: int
    seconds: float  # of all steps of all stages, one stage after the other
    memory: int  # bytes of the fullest rank of any stage
    fullest: str  # that stage

    def as_yaml(self) -> str:
        """What to write into the workflow file."""
        default = ParallelConfig().model_dump()
        sizes = {key: value for key, value in self.parallel.model_dump().items() if value != default[key]}
        inner = ", ".join(f"{key}: {str(value).lower()}" for key, value in sizes.items())
        return (
            f"parallel: {{{inner}}}; in each of `models`: recompute: {self.recompute}; "
            f"in each of `stages`: micro_batch: {{max_tokens_per_gpu: {self.max_tokens}}}"
        )


def propose(checked: Preflight, machine: Machine, num_gpus: int) -> list[Proposal]:
    """Every combination that fits, fastest first; ``UserError`` where none is possible or none fits."""
    found, closest = [], None
    possible = False
    for config, recompute, max_tokens in _candidates(checked, machine, num_gpus):
        possible = True
        memories = {
            name: stage_memory(config, name, checked.specs, checked.shapes[name], on_gpu=True)
            for name in checked.stages
        }
        fullest = max(memories, key=lambda name: memories[name].total)
        needed = memories[fullest].total
        if needed > machine.usable_memory:
            closest = min(closest or (needed, fullest), (needed, fullest))
            continue
        seconds = workflow_seconds(config, checked.stages, checked.specs, checked.shapes, machine, checked.totals)
        found.append(Proposal(config.parallel, recompute, max_tokens, seconds, needed, fullest))
    if not possible:
        raise UserError(
            f"no layout of {num_gpus} GPUs divides the models and leaves every update a response for each data rank: "
            "take another number of GPUs, or larger updates"
        )
    if not found:
        raise UserError(
            f"nothing fits {num_gpus} x {machine.gpu.name}: the smallest peak is {closest[0] / 2**30:.1f} GiB in stage "
            f"'{closest[1]}', of {machine.usable_memory / 2**30:.1f} GiB usable; take more GPUs, or shorter responses"
        )
    return sorted(found, key=lambda item: (item.seconds, item.memory))


def workflow_seconds(
    config: WorkflowConfig,
    stages: Sequence[str],
    specs: Mapping[str, ModelSpec],
    shapes: Mapping[str, StageShape],
    machine: Machine,
    totals: Mapping[str, int],
) -> float:
    """Seconds of all steps of ``stages``; evaluations are left out."""
    found = 0.0
    for name in stages:
        steps = totals.get(f"stages/{name}", getattr(config.stages[name], "steps", 0))
        found += steps * stage_time(config, name, specs, shapes[name], machine).total
    return found


def _candidates(checked: Preflight, machine: Machine, num_gpus: int) -> Iterator[tuple[WorkflowConfig, str, int]]:
    longest = max(shape.length for shape in checked.shapes.values())
    for parallel in layouts(checked.specs, num_gpus, machine.assumptions.gpus_per_node):
        updates = [shape.responses for shape in checked.shapes.values() if shape.responses]
        if any(responses < parallel.data_parallel_size for responses in updates):
            continue
        for recompute in _RECOMPUTE:
            for count in _MICRO_BATCHES:
                yield _with(checked.config, parallel, recompute, count * longest), recompute, count * longest


def layouts(specs: Mapping[str, ModelSpec], num_gpus: int, gpus_per_node: int) -> Iterator[ParallelConfig]:
    """Every layout of ``num_gpus`` that all models divide by."""
    tensors = [size for size in _divisors(num_gpus) if size <= gpus_per_node]
    for tensor in tensors:
        for pipeline in _divisors(num_gpus // tensor):
            data = num_gpus // tensor // pipeline
            for expert in _divisors(tensor * data):
                parallel = ParallelConfig(
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=pipeline,
                    expert_model_parallel_size=expert,
                    data_parallel_size=data,
                    sequence_parallel=tensor > 1,
                )
                if all(_divides(spec, parallel) for spec in specs.values()):
                    yield parallel


def _divides(spec: ModelSpec, parallel: ParallelConfig) -> bool:
    try:
        check_layout(spec, parallel)
    except UserError:
        return False
    return True


def _with(config: WorkflowConfig, parallel: ParallelConfig, recompute: str, max_tokens: int) -> WorkflowConfig:
    micro = MicroBatchConfig(max_tokens_per_gpu=max_tokens)
    stages: dict[str, StageConfig] = {
        name: stage.model_copy(update={"micro_batch": micro}) for name, stage in config.stages.items()
    }
    models = {name: model.model_copy(update={"recompute": recompute}) for name, model in config.models.items()}
    changes = {"parallel": parallel, "teacher_parallel": None, "stages": stages, "models": models}
    return config.model_copy(update=changes)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
