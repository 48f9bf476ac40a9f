"""Import Hugging Face weights into a live Megatron model, and export them as (Hugging Face name, tensor) buckets.

``import_weights`` reads only the slices that this rank needs from a source (``HfCheckpoint`` or ``SeededWeights``).
``export_buckets`` is the inverse for weight sync: it gathers over tensor-, expert- and pipeline-parallel ranks, one
bucket at a time. Checkpoints on disk are converted in ``conversion/``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.models.families import (
    ParamMapping,
    global_param_mappings,
    hf_tensor_shapes,
    layer_param_mappings,
    layers_of_pp_rank,
)
from megatron_s2d.models.shards import WeightSource, join_shards, read_shard
from megatron_s2d.parallel import device
from megatron_s2d.parallel.checkpoint import set_high_precision_init_val
from megatron_s2d.parallel.layout import Layout


def import_weights(chunks: list[torch.nn.Module], spec: ModelSpec, layout: Layout, source: WeightSource) -> None:
    """Fill every parameter of this rank from ``source``, cast to its dtype; padded vocabulary rows become zeros.

    The model must not be wrapped in gradient buffers yet. Raises ``ValueError`` for a tensor of another shape.
    """
    for vp_stage, chunk in enumerate(chunks):
        _import_chunk(chunk, vp_stage, spec, layout, source)


def _import_chunk(chunk: torch.nn.Module, vp_stage: int, spec: ModelSpec, layout: Layout, source: WeightSource) -> None:
    parameters = dict(chunk.named_parameters())
    with torch.no_grad():
        for name, mapping in local_mappings(spec, layout, vp_stage):
            parameter = parameters.pop(name_in_model(name, parameters))
            group = layout.groups.tp if mapping.expert is None else layout.groups.expt_tp
            shard = read_shard(mapping, spec, source, group.rank(), group.size())
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{' + '.join(mapping.hf_names)}: shape {tuple(shard.shape)}, but the model has "
                    f"{tuple(parameter.shape)} for {name}"
                )
            parameter.copy_(shard.to(parameter.device))
            set_high_precision_init_val(parameter, shard)
    assert not parameters, f"parameters outside the name table: {sorted(parameters)}"


def export_buckets(
    chunks: Sequence[torch.nn.Module],
    spec: ModelSpec,
    layout: Layout,
    *,
    bucket_bytes: int = 256 * 2**20,
    merge_adapter: bool = True,
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield the full model as buckets of (Hugging Face name, full tensor), the same on every rank.

    Collective: all ranks must exhaust it. A bucket has at most ``bucket_bytes`` of full tensors (or one larger
    parameter). Buckets come in a fixed order: embedding, layers, final norm, output layer. Tensors are detached copies
    in the model's dtype, without padding rows. merge_adapter: with LoRA adapters in the weights beside them.
    """
    dtype = next(chunks[0].parameters()).dtype
    shapes = dict(hf_tensor_shapes(spec))
    for vp_stage, pp_rank in itertools.product(range(layout.vp_size), range(layout.pp_size)):
        chunk = chunks[vp_stage]
        shards_of = functools.partial(_shards, chunk, dict(chunk.named_parameters()), merge_adapter)
        bucket: list[LocalParam] = []
        bucket_size = 0
        for param in params_of_chunk(spec, layout, pp_rank, vp_stage):
            size = sum(math.prod(shapes[name]) for name in param.hf_names) * dtype.itemsize
            if bucket and (bucket_size + size > bucket_bytes or param.is_expert != bucket[0].is_expert):
                yield _gather(bucket, shards_of, spec, layout, pp_rank, shapes, dtype)
                bucket, bucket_size = [], 0
            bucket.append(param)
            bucket_size += size
        yield _gather(bucket, shards_of, spec, layout, pp_rank, shapes, dtype)


@dataclasses.dataclass(frozen=True)
class LocalParam:
    """A parameter under its name on one pipeline rank; for an expert's, the mapping on each expert-parallel rank."""

    name: str
    mappings: tuple[ParamMapping, ...]  # one, or one per expert-parallel rank

    @property
    def is_expert(self) -> bool:
        return self.mappings[0].expert is not None

    @property
    def hf_names(self) -> list[str]:
        return [name for mapping in self.mappings for name in mapping.hf_names]


def local_mappings(spec: ModelSpec, layout: Layout, vp_stage: int) -> Iterator[tuple[str, ParamMapping]]:
    """Yield name within the chunk and mapping of the parameters of this rank's chunk ``vp_stage``."""
    ep_rank = layout.groups.ep.rank()
    for param in params_of_chunk(spec, layout, layout.pp_rank, vp_stage):
        yield param.name, param.mappings[ep_rank if len(param.mappings) > 1 else 0]
    is_last = layout.is_pipeline_last_stage and vp_stage == layout.vp_size - 1
    if is_last and spec.tie_word_embeddings and layout.pp_size > 1:
        # The last pipeline rank of a tied model has a copy of the embedding, which is not exported.
        for mapping in global_param_mappings(spec, "last"):
            if mapping.parallelism == "vocab_parallel":
                yield mapping.parameter, mapping


def params_of_chunk(spec: ModelSpec, layout: Layout, pp_rank: int, vp_stage: int) -> Iterator[LocalParam]:
    """Yield the parameters of a pipeline rank's chunk; the output layer only if it is not tied to the embedding."""
    if pp_rank == vp_stage == 0:
        yield from (LocalParam(mapping.parameter, (mapping,)) for mapping in global_param_mappings(spec, "first"))
    for local_layer, layer in enumerate(layers_of_pp_rank(spec, pp_rank, layout.pp_size, vp_stage, layout.vp_size)):
        yield from _params_of_layer(spec, layout, layer, local_layer)
    if pp_rank == layout.pp_size - 1 and vp_stage == layout.vp_size - 1:
        for mapping in global_param_mappings(spec, "last"):
            if mapping.parallelism != "vocab_parallel" or not spec.tie_word_embeddings:
                yield LocalParam(mapping.parameter, (mapping,))


def _params_of_layer(spec: ModelSpec, layout: Layout, layer: int, local_layer: int) -> Iterator[LocalParam]:
    prefix = f"decoder.layers.{local_layer}."
    by_expert: dict[int, list[ParamMapping]] = {}
    for mapping in layer_param_mappings(spec, layer):
        if mapping.expert is None:
            yield LocalParam(prefix + mapping.parameter, (mapping,))
        else:
            by_expert.setdefault(mapping.expert, []).append(mapping)
    ep_size = layout.config.expert_model_parallel_size
    experts_per_rank = spec.num_experts // ep_size
    for local_expert in range(experts_per_rank):
        # Expert r * experts_per_rank + i is local expert i of expert-parallel rank r.
        experts = (by_expert[ep_rank * experts_per_rank + local_expert] for ep_rank in range(ep_size))
        for mappings in zip(*experts, strict=True):
            yield LocalParam(prefix + mappings[0].parameter, tuple(mappings))


def name_in_model(name: str, parameters: dict[str, torch.nn.Parameter]) -> str:
    """Return ``name`` as in this model: Transformer Engine fuses norms into linears and groups experts."""
    if name in parameters:
        return name
    fused = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    fused = fused.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    if ".local_experts." in fused:
        before, _, after = fused.partition("local_experts.")
        expert, _, suffix = after.partition(".")
        fused = f"{before}{suffix}{expert}"
    assert fused in parameters, f"the model has no parameter {name}"
    return fused


def _shards(
    chunk: torch.nn.Module, parameters: dict[str, torch.nn.Parameter], merge_adapter: bool, bucket: list[LocalParam]
) -> list[torch.Tensor]:
    """Return the values of this rank's parameters of a bucket, with LoRA adapters merged (``models/lora.py``)."""
    adapter = getattr(chunk, "adapter", None) if merge_adapter else None
    shards = []
    for param in bucket:
        parameter = parameters[name_in_model(param.name, parameters)]
        merged = None if adapter is None else adapter.merged(parameter)
        shards.append(_dense(parameter) if merged is None else merged)
    return shards


def _dense(parameter: torch.Tensor) -> torch.Tensor:
    """Return the parameter's values in the model's dtype, dequantised if Transformer Engine stores it in FP8."""
    return dequantize_fp8_tensor(parameter.detach()) if is_float8tensor(parameter) else parameter.detach()


def _gather(
    bucket: list[LocalParam],
    shards_of: Callable[[list[LocalParam]], list[torch.Tensor]],
    spec: ModelSpec,
    layout: Layout,
    pp_rank: int,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> list[tuple[str, torch.Tensor]]:
    """Return the full tensors of a bucket of ``pp_rank``.

    One all-gather over tensor-parallel ranks, one over expert-parallel ranks, one broadcast over the pipeline.
    """
    names = [name for param in bucket for name in param.hf_names]
    sizes = [math.prod(shapes[name]) for name in names]
    if layout.pp_rank == pp_rank:
        flat = _join(bucket, shards_of(bucket), spec, layout)
    else:
        flat = torch.empty(sum(sizes), dtype=dtype, device=device.device())
    if layout.pp_size > 1:
        dist.broadcast(flat, dist.get_process_group_ranks(layout.groups.pp)[pp_rank], group=layout.groups.pp)
    return [(name, tensor.view(shapes[name])) for name, tensor in zip(names, flat.split(sizes), strict=True)]


def _join(bucket: list[LocalParam], shards: list[torch.Tensor], spec: ModelSpec, layout: Layout) -> torch.Tensor:
    """Gather ``shards`` over tensor- and expert-parallel ranks; return the full tensors, flattened and concatenated."""
    full = _full_tensors(bucket, shards, spec, layout)  # what was gathered is freed before the next copy
    return full[0] if len(full) == 1 else torch.cat(full)


def _full_tensors(
    bucket: list[LocalParam], shards: list[torch.Tensor], spec: ModelSpec, layout: Layout
) -> list[torch.Tensor]:
    is_expert = bucket[0].is_expert
    tp_group = layout.groups.expt_tp if is_expert else layout.groups.tp
    gathered = _all_gather(torch.cat([shard.reshape(-1) for shard in shards])[None], tp_group)[None]
    if is_expert:
        gathered = _all_gather(gathered, layout.groups.ep)
    # gathered: [expert-parallel ranks or 1, tensor-parallel ranks, elements of a shard]
    full: list[torch.Tensor] = []
    columns = gathered.split([shard.numel() for shard in shards], dim=2)
    for param, shard, of_param in zip(bucket, shards, columns, strict=True):
        for mapping, of_ep_rank in zip(param.mappings, of_param, strict=True):
            tp_shards = [flat.view(shard.shape) for flat in of_ep_rank]
            full += [tensor.reshape(-1) for _, tensor in join_shards(mapping, spec, tp_shards)]
    return full


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return ``tensor`` [1, ...] of every rank of ``group``, stacked along dimension 0."""
    if group.size() == 1:
        return tensor
    output = tensor.new_empty(group.size(), *tensor.shape[1:])
    dist.all_gather_into_tensor(output, tensor.contiguous(), group=group)
    return output
