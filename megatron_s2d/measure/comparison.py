"""Memory and traffic that ``s2d plan`` estimates for what was measured. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from megatron_s2d.config.hardware import GPUS, AssumptionsConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.estimate.layers import Build
from megatron_s2d.estimate.memory import StageMemory, workload
from megatron_s2d.estimate.roofline import Machine, ModelOnMachine
from megatron_s2d.estimate.stage_memory import BYTES_PER_VALUE, StageShape, rank_memory
from megatron_s2d.measure.limits import Limits, shortened
from megatron_s2d.measure.measurement import Measurement
from megatron_s2d.measure.stub import Collective

_SMALL = 16 << 20  # all-reduces of statistics are smaller


@dataclasses.dataclass(frozen=True)
class PhaseMemory:
    """Bytes of the device at the peak of a phase, with what models hold."""

    phase: str
    estimated: int
    measured: int

    @property
    def error(self) -> float:
        """Estimate over measurement, minus 1."""
        return self.estimated / self.measured - 1


def compare_memory(
    config: WorkflowConfig,
    specs: Mapping[str, ModelSpec],
    shape: StageShape,
    measurement: Measurement,
    limits: Limits,
) -> list[PhaseMemory]:
    """Return estimate and measurement of every phase that has both."""
    estimated, peaks = estimated_memory(config, specs, shape, measurement, limits).peaks, measurement.peaks
    return [PhaseMemory(phase, estimated[phase], peaks[phase]) for phase in peaks if phase in estimated]


def estimated_memory(
    config: WorkflowConfig,
    specs: Mapping[str, ModelSpec],
    shape: StageShape,
    measurement: Measurement,
    limits: Limits,
) -> StageMemory:
    """Return the estimate of the tokens that were decoded and the micro-batches that were run, as long as ``shape``."""
    rows = max(1, min(config.rollout.max_batch_size, config.rollout.max_batch_tokens // max(1, shape.length)))
    rollout = config.rollout.model_copy(update={"max_batch_size": rows, "max_batch_tokens": 2**62})
    config, shape = shortened(config.model_copy(update={"rollout": rollout}), measurement.stage, shape, limits)
    stage = config.stages[measurement.stage]
    if getattr(stage, "sampling", None) is not None:
        decoded = min(limits.decoded_tokens, stage.sampling.max_response_length)
        sampling = stage.sampling.model_copy(update={"max_response_length": decoded})
        stages = dict(config.stages) | {measurement.stage: stage.model_copy(update={"sampling": sampling})}
        config = config.model_copy(update={"stages": stages})
    parallel = config.parallel
    return rank_memory(
        config,
        measurement.stage,
        specs,
        shape,
        measurement.coordinates["pp"],
        on_gpu=True,
        transformer_engine=measurement.transformer_engine,
        equal_lengths=True,
        stage_rank=measurement.rank % (parallel.world_size // parallel.pipeline_model_parallel_size),
    )


def compare_traffic(
    config: WorkflowConfig,
    specs: Mapping[str, ModelSpec],
    shape: StageShape,
    measurement: Measurement,
    limits: Limits,
) -> dict[str, tuple[float, float]]:
    """Return kind of traffic -> bytes that this rank sends in an update: estimated by ``s2d plan``, and measured.

    Of the passes and the update of the trained model.
    """
    config, shape = shortened(config, measurement.stage, shape, limits)
    stage, model = config.stages[measurement.stage], config.model_of(measurement.stage)
    fused, recompute = measurement.transformer_engine, config.models[model].recomputation
    lora = getattr(stage, "lora", None)
    build = Build(BYTES_PER_VALUE[config.precision], fused, recompute, on_gpu=True, lora=lora)
    machine, pp_rank = Machine(GPUS["h100"], AssumptionsConfig()), measurement.coordinates["pp"]
    on_machine = ModelOnMachine(specs[model], config.parallel, build, machine, pp_rank)
    work = workload(
        shape.responses,
        shape.length,
        shape.response_length,
        max_tokens=stage.micro_batch.max_tokens_per_gpu,
        parallel=config.parallel,
        packed=stage.micro_batch.sequence_packing,
        equal_lengths=True,
    )
    parallel = config.parallel
    is_middle = 0 < pp_rank < parallel.pipeline_model_parallel_size - 1
    measured = bytes_sent(measurement.call("train").collectives, parallel, is_middle=is_middle)
    measured |= bytes_sent(measurement.call("update").collectives, parallel, "weights")
    estimated = {kind: item.bytes_sent for kind, item in on_machine.train_traffic(work).items()}
    if not fused and _looks_like_tensor_traffic(parallel):  # keys are gathered
        estimated["tensor"] += estimated.pop("context")
    return {kind: (size, measured.get(kind, 0.0)) for kind, size in estimated.items() if size}


def _looks_like_tensor_traffic(parallel: ParallelConfig) -> bool:
    """Return whether groups of context ranks have the size of those of tensor ranks."""
    return 1 < parallel.context_parallel_size == parallel.tensor_model_parallel_size


def bytes_sent(
    collectives: Iterable[Collective], parallel: ParallelConfig, gathers: str = "tensor", *, is_middle: bool = False
) -> dict[str, float]:
    """Return kind of traffic -> bytes sent in a ring.

    gathers: what all-gathers of values in half precision are. is_middle: pipeline ranks come before and after this one.
    """
    pp_size, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    cp_size = parallel.context_parallel_size
    # Transformer Engine's context ranks send keys to their neighbours; PyTorch may make a group of each pair.
    ring_sizes = {2, cp_size} - {parallel.expert_model_parallel_size} if cp_size > 1 else set()
    sent: dict[str, float] = {}
    for item in collectives:
        share = (item.ranks - 1) / item.ranks
        is_context = 1 < cp_size == item.ranks and not _looks_like_tensor_traffic(parallel)
        if is_context and gathers == "tensor" and item.kind in ("AllGather", "ReduceScatter") and item.dtype == "bf16":
            kind, size = "context", item.bytes * share
        elif item.kind == "AllGather" and item.dtype == "bf16":
            kind, size = gathers, item.bytes * share
        elif item.kind == "ReduceScatter":
            kind, size = ("gradients" if item.dtype == "f32" else "tensor"), item.bytes * share
        elif item.kind == "AllReduce" and item.dtype == "bf16":
            kind, size = "tensor", 2 * item.bytes * share
        elif item.kind == "AllReduce" and item.dtype == "f32" and item.bytes > _SMALL:
            kind, size = "tied embedding", 2 * item.bytes * share
        elif item.kind in ("Send", "Recv") and item.dtype == "bf16" and item.ranks == pp_size:
            # A rank in the middle sends hidden states and gradients of each of its chunks, and receives as many. The
            # first and the last one send one of them less.
            kind, size = "pipeline", item.bytes * (0.5 if is_middle else chunks / (2 * chunks - 1))
        elif item.kind == "Send" and item.dtype == "bf16" and item.ranks in ring_sizes:
            kind, size = "context", item.bytes
        elif item.kind in ("Send", "AllToAll") and item.dtype == "bf16":  # one of the sends is to the rank itself
            kind, size = "expert", item.bytes * share
        else:
            continue
        sent[kind] = sent.get(kind, 0.0) + size
    return sent
