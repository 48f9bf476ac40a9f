"""Proposes the smallest change of settings with which a stage that lacks memory is estimated to fit. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.stage import TrainingStageConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.estimate.memory import StageMemory
from megatron_s2d.estimate.stage_memory import StageShape, rank_memory, stage_memory
from megatron_s2d.formatting import format_bytes

TOO_SMALL = "no micro-batch, offloading or recomputation makes it fit: use more tensor or pipeline ranks"
_MARGIN = 0.9  # of the device's memory: the estimate is of tensors, without fragmentation


def nearest_fit(
    config: WorkflowConfig,
    name: str,
    specs: Mapping[str, ModelSpec],
    shape: StageShape,
    device_bytes: int,
    *,
    pp_rank: int | None = None,
    transformer_engine: bool = True,
) -> str | None:
    """Return settings, as ``--set`` takes them, with which stage ``name`` fits a GPU on one pipeline rank, or on all.

    In this order: smaller micro-batches, an offloaded optimizer, recomputation of full layers, all of them. None: the
    layout is too small.
    """
    builds = {"on_gpu": True, "transformer_engine": transformer_engine}
    for settings, changed in _candidates(config, name, shape):
        if pp_rank is None:
            memory = stage_memory(changed, name, specs, shape, **builds)
        else:
            memory = rank_memory(changed, name, specs, shape, pp_rank, **builds)
        if memory.total <= _MARGIN * device_bytes:
            return " ".join(f"--set {setting}" for setting in settings)
    return None


def what_is_largest(memory: StageMemory) -> str:
    """Return phase and pipeline rank of the peak, and the three largest parts of it with their sizes."""
    parts = {}
    for item in memory.models:
        kinds = {"weights": item.weights, "gradients": item.gradients, "optimizer": item.optimizer}
        kinds |= {"FP8 copies": item.fp8_copies} if item.fp8_copies else {}
        parts |= {f"{kind} of the {item.role}": size for kind, size in kinds.items()}
    parts |= memory.phases.get(memory.peak_phase, {})
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    shown = ", ".join(f"{what} {format_bytes(size)}" for what, size in largest)
    return f"peak in {memory.peak_phase} on ranks of pipeline rank {memory.pp_rank}: {shown}"


def _candidates(config: WorkflowConfig, name: str, shape: StageShape) -> Iterator[tuple[list[str], WorkflowConfig]]:
    longest, model = shape.length, config.model_of(name)
    offloads = [False]
    if isinstance(config.stages[name], TrainingStageConfig) and not config.stages[name].offload_optimizer:
        offloads.append(True)
    recomputes = [config.models[model].recompute]
    recomputes += ["full"] if recomputes[0] != "full" else []
    for recompute in recomputes:
        for offload in offloads:
            tokens = config.stages[name].micro_batch.max_tokens_per_gpu
            while True:
                settings = []
                if tokens != config.stages[name].micro_batch.max_tokens_per_gpu:
                    settings.append(f"stages.{name}.micro_batch.max_tokens_per_gpu={tokens}")
                settings += [f"stages.{name}.offload_optimizer=true"] if offload else []
                settings += [f"models.{model}.recompute=full"] if recompute != recomputes[0] else []
                if settings:
                    yield settings, _changed(config, name, tokens, offload, recompute)
                if tokens // 2 < longest:
                    break
                tokens //= 2


def _changed(config: WorkflowConfig, name: str, tokens: int, offload: bool, recompute: str) -> WorkflowConfig:
    stage, model = config.stages[name], config.model_of(name)
    update = {"micro_batch": stage.micro_batch.model_copy(update={"max_tokens_per_gpu": tokens})}
    if offload:
        update["offload_optimizer"] = True
    stages = dict(config.stages) | {name: stage.model_copy(update=update)}
    models = dict(config.models) | {model: config.models[model].model_copy(update={"recompute": recompute})}
    return config.model_copy(update={"stages": stages, "models": models})
