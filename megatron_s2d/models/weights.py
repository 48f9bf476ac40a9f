"""The name table applied to a live model: weights in, and a stream of (Hugging Face name, tensor) out.

``import_weights`` reads, for the part of the model that a rank holds, just the slices it needs from a source (a
``HfCheckpoint``, or ``SeededWeights``). ``export_buckets`` is the inverse, gathered over tensor, expert and pipeline
ranks a bucket at a time, for weight sync. Checkpoints on disk are converted in ``conversion/``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.models.families import (
    ParamMapping,
    global_param_mappings,
    hf_tensor_shapes,
    layer_param_mappings,
    layers_of_pp_rank,
)
from megatron_s2d.models.shards import SeededWeights, WeightSource, join_shards, read_shard
from megatron_s2d.parallel import device
from megatron_s2d.parallel.checkpoint import remember_values
from megatron_s2d.parallel.layout import Layout

device.patch_megatron_for_cpu()

from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

__all__ = ["SeededWeights", "WeightSource", "export_buckets", "export_weights", "import_weights"]


def import_weights(chunks: list[torch.nn.Module], spec: ModelSpec, layout: Layout, source: WeightSource) -> None:
    """Fill this rank's part of the model (without gradient buffers around it) from ``source``, cast to its dtype.

    Every parameter is filled, padded vocabulary rows with zeros. Raises ``ValueError`` for a tensor of another shape.
    """
    (model,) = chunks
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, entry in _local_param_mappings(spec, layout):
            parameter = parameters.pop(_parameter_name(name, parameters))
            group = layout.groups.tp if entry.expert is None else layout.groups.expt_tp
            shard = read_shard(entry, spec, source, group.rank(), group.size())
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{' + '.join(entry.hf_names)}: shape {tuple(shard.shape)}, but the model has "
                    f"{tuple(parameter.shape)} for {name}"
                )
            parameter.copy_(shard.to(parameter.device))
            remember_values(parameter, shard)
    assert not parameters, f"parameters outside the name table: {sorted(parameters)}"


def _dense(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's values in the model's dtype, where Transformer Engine keeps it in FP8 too."""
    return dequantize_fp8_tensor(parameter.detach()) if is_float8tensor(parameter) else parameter.detach()


def _local_param_mappings(spec: ModelSpec, layout: Layout) -> Iterator[tuple[str, ParamMapping]]:
    """The parameters that this rank holds: name within its chunk, and entry."""
    if layout.is_pipeline_first_stage:
        yield from ((entry.parameter, entry) for entry in global_param_mappings(spec, "first"))
    for local, layer in enumerate(layers_of_pp_rank(spec, layout.pp_rank, layout.pp_size)):
        for item in _layer_items(spec, layout, layer, local):
            yield item.parameter, item.entries[layout.groups.ep.rank() if len(item.entries) > 1 else 0]
    if layout.is_pipeline_last_stage:
        for entry in global_param_mappings(spec, "last"):
            if entry.parallelism != "vocabulary" or not spec.tie_word_embeddings or layout.pp_size > 1:
                yield entry.parameter, entry


@dataclasses.dataclass(frozen=True)
class _Item:
    """A parameter as one stage holds it: its name there, and its entry on each expert-parallel rank (or the one)."""

    parameter: str
    entries: tuple[ParamMapping, ...]

    @property
    def is_expert(self) -> bool:
        return self.entries[0].expert is not None


def _layer_items(spec: ModelSpec, layout: Layout, layer: int, local_layer: int) -> Iterator[_Item]:
    prefix = f"decoder.layers.{local_layer}."
    entries = layer_param_mappings(spec, layer)
    for entry in entries:
        if entry.expert is None:
            yield _Item(prefix + entry.parameter, (entry,))
    by_expert: dict[int, list[ParamMapping]] = {}
    for entry in entries:
        if entry.expert is not None:
            by_expert.setdefault(entry.expert, []).append(entry)
    ranks = layout.config.expert_model_parallel_size
    share = spec.num_experts // ranks
    for local in range(share):
        # Expert r x share + local lives on expert-parallel rank r, under its local number.
        for same in zip(*(by_expert[rank * share + local] for rank in range(ranks)), strict=True):
            yield _Item(prefix + same[0].parameter, tuple(same))


def _parameter_name(name: str, parameters: dict[str, torch.nn.Parameter]) -> str:
    """``name`` as this model's layers call it; Transformer Engine fuses norms into linears and groups experts."""
    if name in parameters:
        return name
    fused = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    fused = fused.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    if ".local_experts." in fused:
        before, _, after = fused.partition("local_experts.")
        number, _, rest = after.partition(".")
        fused = f"{before}{rest}{number}"
    assert fused in parameters, f"the model has no parameter {name}"
    return fused


def export_weights(
    chunks: list[torch.nn.Module], spec: ModelSpec, layout: Layout, *, bucket_bytes: int = 256 * 2**20
) -> Iterator[tuple[str, torch.Tensor]]:
    """``export_buckets`` tensor by tensor."""
    for bucket in export_buckets(chunks, spec, layout, bucket_bytes=bucket_bytes):
        yield from bucket


def export_buckets(
    chunks: list[torch.nn.Module], spec: ModelSpec, layout: Layout, *, bucket_bytes: int = 256 * 2**20
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The whole model as (Hugging Face name, full tensor), the same on every rank.

    Collective: all ranks must exhaust it. Buckets hold at most ``bucket_bytes`` of full tensors (or one larger item)
    and come in a fixed order: embedding, layers, final norm, output layer. Tensors are detached copies in the model's
    dtype, without padding rows.
    """
    (model,) = chunks
    parameters = dict(model.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    shapes = dict(hf_tensor_shapes(spec))
    for stage in range(layout.pp_size):
        bucket: list[_Item] = []
        size = 0
        for item in _stage_items(spec, layout, stage):
            cost = sum(math.prod(shapes[name]) for entry in item.entries for name in entry.hf_names) * dtype.itemsize
            if bucket and (size + cost > bucket_bytes or item.is_expert != bucket[0].is_expert):
                yield _gather(bucket, parameters, spec, layout, stage, shapes, dtype)
                bucket, size = [], 0
            bucket.append(item)
            size += cost
        yield _gather(bucket, parameters, spec, layout, stage, shapes, dtype)


def _stage_items(spec: ModelSpec, layout: Layout, stage: int) -> Iterator[_Item]:
    if stage == 0:
        yield from (_Item(entry.parameter, (entry,)) for entry in global_param_mappings(spec, "first"))
    for local, layer in enumerate(layers_of_pp_rank(spec, stage, layout.pp_size)):
        yield from _layer_items(spec, layout, layer, local)
    if stage == layout.pp_size - 1:
        for entry in global_param_mappings(spec, "last"):
            if entry.parallelism != "vocabulary" or not spec.tie_word_embeddings:
                yield _Item(entry.parameter, (entry,))


def _gather(
    bucket: list[_Item],
    parameters: dict[str, torch.nn.Parameter],
    spec: ModelSpec,
    layout: Layout,
    stage: int,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> list[tuple[str, torch.Tensor]]:
    """Full tensors of a bucket of ``stage``: one gather over tensor ranks, one over expert ranks, one broadcast."""
    names = [name for item in bucket for entry in item.entries for name in entry.hf_names]
    sizes = [math.prod(shapes[name]) for name in names]
    if layout.pp_rank == stage:
        held = [_dense(parameters[_parameter_name(item.parameter, parameters)]) for item in bucket]
        is_expert = bucket[0].is_expert
        tensor_group = layout.groups.expt_tp if is_expert else layout.groups.tp
        flat = _all_gather(torch.cat([tensor.reshape(-1) for tensor in held])[None], tensor_group)
        if is_expert:
            flat = _all_gather(flat[None], layout.groups.ep)
        else:
            flat = flat[None]
        # flat: [expert ranks or 1, tensor ranks, elements held]
        full: list[torch.Tensor] = []
        for item, tensor, columns in zip(bucket, held, flat.split([t.numel() for t in held], dim=2), strict=True):
            for rank, entry in enumerate(item.entries):
                shards = [part.view(tensor.shape) for part in columns[rank]]
                full += [joined.reshape(-1) for _, joined in join_shards(entry, spec, shards)]
        whole = torch.cat(full)
    else:
        whole = torch.empty(sum(sizes), dtype=dtype, device=device.device())
    if layout.pp_size > 1:
        dist.broadcast(whole, dist.get_process_group_ranks(layout.groups.pp)[stage], group=layout.groups.pp)
    return [(name, part.view(shapes[name])) for name, part in zip(names, whole.split(sizes), strict=True)]


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``tensor`` [1, ...] of every rank of ``group``, stacked along dimension 0."""
    if group.size() == 1:
        return tensor
    output = tensor.new_empty(group.size(), *tensor.shape[1:])
    dist.all_gather_into_tensor(output, tensor.contiguous(), group=group)
    return output
