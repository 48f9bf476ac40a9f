"""GPU memory of the SGLang servers that a stage starts, beside the trainer where they share its GPUs. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.layers import ModelShard
from megatron_s2d.estimate.memory import StageMemory
from megatron_s2d.estimate.stage_memory import BYTES_PER_VALUE, StageShape
from megatron_s2d.rollout.sglang.memory_fraction import OPTION, ServerMemory

_WORKSPACE = 10 << 30  # a server's context, activations and CUDA graphs; SGLang's own reserve on large GPUs
_WORKSPACE_SHARE = 0.15  # of a smaller GPU


def served_models(config: WorkflowConfig, name: str) -> list[str]:
    """Return the entries of `models` that stage ``name`` starts servers for."""
    stage = config.stages[name]
    models = []
    if config.rollout.engine == "sglang" and hasattr(stage, "sampling"):
        models.append(config.model_of(name))
    if isinstance(stage, OpdConfig) and stage.teacher_engine == "sglang":
        models += [config.model_of(other) for relation, other in stage.inputs().items() if "teacher" in relation]
    return [model for model in models if model not in config.rollout.sglang.urls]


def sets_fraction(config: WorkflowConfig) -> bool:
    """Return whether the user's ``extra_args`` have the option."""
    return any(argument.partition("=")[0] == OPTION for argument in config.rollout.sglang.extra_args)


def shares_gpus(config: WorkflowConfig, gpus_per_node: int) -> bool:
    """Return whether servers are on GPUs of the trainer's ranks of this machine."""
    return config.rollout.sglang.base_gpu_id < min(config.parallel.world_size, gpus_per_node)


def server_memory(
    config: WorkflowConfig,
    name: str,
    specs: Mapping[str, ModelSpec],
    shape: StageShape,
    trainer: StageMemory,
    *,
    device_memory: int,
    reserved: int,
    gpus_per_node: int,
) -> list[ServerMemory]:
    """Return the memory of the servers that stage ``name`` starts; ``UserError`` if the trainer leaves no room.

    trainer: estimate of the stage. Servers that release their memory for training (``enable_memory_saver``) have it
    while the trainer holds only what is resident, others also during its peak. reserved: bytes of the trainer's CUDA
    context, communication buffers and fragmentation. Models of a stage share what is free in equal parts.
    """
    models, sglang = served_models(config, name), config.rollout.sglang
    beside = 0
    if shares_gpus(config, gpus_per_node):
        held = trainer.resident + sum(trainer.outside.values())
        beside = reserved + (held if sglang.enable_memory_saver else trainer.total)
    workspace = min(_WORKSPACE, round(_WORKSPACE_SHARE * device_memory))
    result = []
    for model in models:
        layout = ParallelConfig(tensor_model_parallel_size=sglang.tensor_parallel_size)
        shard, size = ModelShard(specs[model], layout, 0), BYTES_PER_VALUE[config.precision]
        weights = shard.num_parameters * size
        column = 2 * shard.local_kv_dim * size * shard.num_layers
        needed = weights + shape.length * column
        static = (device_memory - beside) // len(models) - workspace
        if static < needed and not sets_fraction(config):
            raise UserError(_refusal(config, name, model, needed, max(static, 0), beside))
        result.append(ServerMemory(model, weights, static, beside))
    return result


def _refusal(config: WorkflowConfig, name: str, model: str, needed: int, left: int, beside: int) -> str:
    sglang = config.rollout.sglang
    have = f"servers of '{model}' need {needed / 2**30:.1f} GiB for weights and one response"
    if not beside:
        return f"stage {name}: {have}, and a GPU has {left / 2**30:.1f} GiB: raise rollout.sglang.tensor_parallel_size"
    change = "set offload_optimizer, more data-parallel or tensor ranks, or rollout.sglang.tensor_parallel_size"
    if not sglang.enable_memory_saver:
        change = f"set rollout.sglang.enable_memory_saver: true, base_gpu_id: {config.parallel.world_size} or above"
    return (
        f"stage {name}: {have}, and beside the trainer ({beside / 2**30:.1f} GiB) {left / 2**30:.1f} GiB are left on "
        f"their GPUs: {change}"
    )
