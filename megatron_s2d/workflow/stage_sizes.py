"""Sizes of a stage as its ranks know them: what its servers may take of a GPU, and what would fit if memory ran out."""

from __future__ import annotations

import torch

from megatron_s2d.config.hardware import AssumptionsConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.stage import validated_entries
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.prompts import is_corpus
from megatron_s2d.estimate.server_memory import served_models, server_memory, sets_fraction
from megatron_s2d.estimate.stage_memory import StageShape, stage_memory, stage_shape
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.parallel.out_of_memory import describe
from megatron_s2d.rollout.sglang.memory_fraction import ServerMemory
from megatron_s2d.stages.inputs import StageInputs
from megatron_s2d.workflow.nearest_fit import TOO_SMALL, nearest_fit


def room_for_servers(config: WorkflowConfig, name: str, inputs: StageInputs) -> list[ServerMemory]:
    """Return the share of each model's servers; ``UserError`` if the trainer leaves no room.

    Empty on a CPU, without servers to start, and if the user's arguments have SGLang's option.
    """
    if not device.capabilities().cuda or not served_models(config, name) or sets_fraction(config):
        return []
    specs, shape = _sizes(config, name, inputs)
    engine = device.capabilities().transformer_engine
    return server_memory(
        config,
        name,
        specs,
        shape,
        stage_memory(config, name, specs, shape, on_gpu=True, transformer_engine=engine),
        device_memory=device.total_memory(),
        reserved=AssumptionsConfig().reserved_memory,
        gpus_per_node=device.count(),
    )


def out_of_gpu_memory(
    error: torch.OutOfMemoryError, config: WorkflowConfig, name: str, inputs: StageInputs, layout: Layout
) -> str:
    """Return one line: which rank of stage ``name`` ran out of memory, for what, and which settings are to fit.

    For an evaluation or another phase without training the settings may be more than needed.
    """
    ranks = f"tp {layout.tp_rank}, pp {layout.pp_rank}, cp {layout.cp_rank}, dp {layout.dp_rank}"
    where = f"stage {name}, rank {torch.distributed.get_rank()} ({ranks}): {describe(error).sentence}"
    specs, shape = _sizes(config, name, inputs)
    engine = device.capabilities().transformer_engine
    sizes = {"pp_rank": layout.pp_rank, "transformer_engine": engine}
    fit = nearest_fit(config, name, specs, shape, device.total_memory(), **sizes)
    return f"{where}; {TOO_SMALL if fit is None else f'estimated to fit: {fit}'}"


def _sizes(config: WorkflowConfig, name: str, inputs: StageInputs) -> tuple[dict[str, ModelSpec], StageShape]:
    entries = {entry for stage in _read_stages(config, name) for entry in config.stages[stage].entries}
    entries |= {*validated_entries(config.stages[name])}
    prompts = {entry: inputs.prompts(entry) for entry in entries if not is_corpus(config.data[entry.partition("/")[0]])}
    shape = stage_shape(config, name, prompts, inputs.tokenizer)
    used = {config.model_of(other) for other in config.stages}
    specs = {model: config.models[model].resolve(len(inputs.tokenizer_of(model))) for model in used}
    return specs, shape


def _read_stages(config: WorkflowConfig, name: str) -> list[str]:
    """Return the stage and the teacher caches that it reads, whose prompts decide its lengths."""
    caches = getattr(config.stages[name], "cache", None) or []
    return [name, *([caches] if isinstance(caches, str) else caches)]
