"""Searches the parallel layout that fits a GPU and is the fastest for a whole workflow. No torch here.

Memory and time come from ``estimate/``. The search covers tensor sizes up to a node, pipeline sizes that divide the
layers, expert sizes that divide the experts, data parallelism over the remaining ranks, micro-batches of one, two and
four of the longest samples, and no or full recomputation. All stages and teachers share one layout, which is what
``parallel`` sets; sequence parallelism is on with tensor parallelism (it saves memory and costs nothing in this model).
Not searched: context parallelism, and separate layouts for teachers (``teacher_parallel``).
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

_MICRO_BATCHES = (1, 2, 4)  # in units of the longest sample
_RECOMPUTE = ("none", "full")  # selective recomputes attention only, and fused attention saves almost nothing


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A layout of the workflow with its estimated time and memory."""

    parallel: ParallelConfig
    recompute: str
    max_tokens: int
    seconds: float  # all steps of all stages, one stage after another
    memory: int  # largest peak of a rank, in bytes
    largest_stage: str  # the stage of that peak

    def as_yaml(self) -> str:
        """Return the settings of this layout as YAML."""
        default = ParallelConfig().model_dump()
        sizes = {key: value for key, value in self.parallel.model_dump().items() if value != default[key]}
        settings = ", ".join(f"{key}: {str(value).lower()}" for key, value in sizes.items())
        return (
            f"parallel: {{{settings}}}; in each of `models`: recompute: {self.recompute}; "
            f"in each of `stages`: micro_batch: {{max_tokens_per_gpu: {self.max_tokens}}}"
        )


def propose(preflight: Preflight, machine: Machine, num_gpus: int) -> list[Proposal]:
    """Return all layouts that fit, fastest first; raise ``UserError`` if none is possible or none fits."""
    proposals, smallest = [], None
    is_possible = False
    for config, recompute, max_tokens in _candidates(preflight, machine, num_gpus):
        is_possible = True
        builds = {"on_gpu": True, "transformer_engine": machine.assumptions.transformer_engine}
        memories = {
            name: stage_memory(config, name, preflight.specs, preflight.shapes[name], **builds)
            for name in preflight.stages
        }
        stage = max(memories, key=lambda name: memories[name].total)
        peak = memories[stage].total
        if peak > machine.usable_memory:
            smallest = min(smallest or (peak, stage), (peak, stage))
            continue
        seconds = workflow_seconds(
            config, preflight.stages, preflight.specs, preflight.shapes, machine, preflight.totals
        )
        proposals.append(Proposal(config.parallel, recompute, max_tokens, seconds, peak, stage))
    if not is_possible:
        raise UserError(
            f"no layout of {num_gpus} GPUs divides the models and gives each data-parallel rank a response of every "
            "mini-batch: use another number of GPUs, or larger mini-batches"
        )
    if not proposals:
        raise UserError(
            f"no layout fits {num_gpus} x {machine.gpu.name}: the smallest peak is {smallest[0] / 2**30:.1f} GiB, in "
            f"stage '{smallest[1]}', of {machine.usable_memory / 2**30:.1f} GiB usable; use more GPUs, or shorter "
            "responses"
        )
    return sorted(proposals, key=lambda item: (item.seconds, item.memory))


def workflow_seconds(
    config: WorkflowConfig,
    stages: Sequence[str],
    specs: Mapping[str, ModelSpec],
    shapes: Mapping[str, StageShape],
    machine: Machine,
    totals: Mapping[str, int],
) -> float:
    """Return the seconds of all steps of ``stages``, without evaluations."""
    total = 0.0
    for name in stages:
        steps = totals.get(f"stages/{name}", getattr(config.stages[name], "steps", 0))
        total += steps * stage_time(config, name, specs, shapes[name], machine).total
    return total


def _candidates(preflight: Preflight, machine: Machine, num_gpus: int) -> Iterator[tuple[WorkflowConfig, str, int]]:
    longest = max(shape.length for shape in preflight.shapes.values())
    for parallel in layouts(preflight.specs, num_gpus, machine.assumptions.gpus_per_node):
        mini_batches = [shape.responses for shape in preflight.shapes.values() if shape.responses]
        if any(responses < parallel.data_parallel_size for responses in mini_batches):
            continue
        for recompute in _RECOMPUTE:
            for count in _MICRO_BATCHES:
                yield _with(preflight.config, parallel, recompute, count * longest), recompute, count * longest


def layouts(specs: Mapping[str, ModelSpec], num_gpus: int, gpus_per_node: int) -> Iterator[ParallelConfig]:
    """Yield every layout of ``num_gpus`` that divides all models."""
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
