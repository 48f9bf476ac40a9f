"""Shard Hugging Face tensors into one Megatron parameter, and join the shards again; seeded initial weights.

This is the arithmetic of the rules of ``families.Parallelism``, without process groups and files: ``weights`` applies
it to live models, ``conversion/`` to checkpoints.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import torch

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.models.families import ParamMapping, hf_tensor_shapes, padded_vocab_size


class WeightSource(Protocol):
    """Where Hugging Face tensors come from."""

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the tensor ``name``, or its slice [start, stop) along ``dim`` (to the end without ``stop``)."""
        ...


class SeededWeights:
    """Random initial weights, each tensor drawn from (seed, name), so that they do not depend on a layout.

    Norms multiply by one, biases and attention sinks are zero; matrices are normal with ``initializer_range``, those
    that write into the residual stream divided by sqrt(2 x layers) (GPT-2, section 2.3). Drawn in float32 on the CPU.
    """

    def __init__(self, spec: ModelSpec, seed: int):
        self._spec = spec
        self._seed = seed
        self._shapes = dict(hf_tensor_shapes(spec))

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See ``WeightSource.read``."""
        shape = self._shapes[name]
        if len(shape) == 1:
            is_zero = name.endswith((".bias", ".sinks")) or self._spec.parts.zero_centered_norm
            tensor = torch.zeros(shape) if is_zero else torch.ones(shape)
        else:
            digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            std = self._spec.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self._spec.num_layers)
            tensor = torch.empty(shape).normal_(0.0, std, generator=generator)
        return tensor.narrow(dim, start, (shape[dim] if stop is None else stop) - start)


def read_shard(
    mapping: ParamMapping, spec: ModelSpec, source: WeightSource, tp_rank: int, tp_size: int
) -> torch.Tensor:
    """Return one tensor-parallel rank's shard of a Megatron parameter, read from its Hugging Face tensors."""
    names = mapping.hf_names
    match mapping.parallelism:
        case "replicated":
            return source.read(names[0])
        case "vocab_parallel":
            size = padded_vocab_size(spec.vocab_size, tp_size) // tp_size
            start = min(tp_rank * size, spec.vocab_size)
            rows = source.read(names[0], 0, start, min((tp_rank + 1) * size, spec.vocab_size))
            padding = size - rows.size(0)
            return torch.cat([rows, rows.new_zeros(padding, rows.size(1))]) if padding else rows
        case "head_parallel":
            size = spec.num_attention_heads // tp_size
            return source.read(names[0], 0, tp_rank * size, (tp_rank + 1) * size)
        case "row_parallel":
            width = spec.q_dim if names[0].endswith("o_proj.weight") else _ffn_size(mapping, spec)
            size = width // tp_size
            return source.read(names[0], 1, tp_rank * size, (tp_rank + 1) * size)
        case "gate_up_column_parallel":
            size = _ffn_size(mapping, spec) // tp_size
            return torch.cat([source.read(name, 0, tp_rank * size, (tp_rank + 1) * size) for name in names])
        case "qkv_column_parallel":
            return _read_qkv(mapping, spec, source, tp_rank, tp_size)


def _ffn_size(mapping: ParamMapping, spec: ModelSpec) -> int:
    return spec.ffn_hidden_size if mapping.expert is None else spec.moe_ffn_hidden_size


def rows_of_group(spec: ModelSpec) -> list[int]:
    """Return the rows of one query group in the fused matrix: of its queries, its key, its value."""
    return [spec.q_dim // spec.num_query_groups, spec.head_dim, spec.head_dim]


def _read_qkv(mapping: ParamMapping, spec: ModelSpec, source: WeightSource, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Return an equal share of the rows of the fused matrix; with more ranks than groups it is a slice of a group."""
    sizes = rows_of_group(spec)
    group_rows = sum(sizes)
    shard_rows = group_rows * spec.num_query_groups // tp_size
    start_row, stop_row = tp_rank * shard_rows, (tp_rank + 1) * shard_rows
    start_group, stop_group = start_row // group_rows, ceil_div(stop_row, group_rows)
    parts = []
    for name, size in zip(mapping.hf_names, sizes, strict=True):
        rows = source.read(name, 0, start_group * size, stop_group * size)
        parts.append(rows.reshape(stop_group - start_group, size, *rows.shape[1:]))  # biases have no columns
    fused = torch.cat(parts, dim=1).flatten(0, 1)
    return fused[start_row - start_group * group_rows : stop_row - start_group * group_rows]


def _cat(shards: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate; return a single shard without a copy, because these tensors can be gigabytes."""
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim)


def join_shards(mapping: ParamMapping, spec: ModelSpec, shards: list[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Return the Hugging Face tensors of a Megatron parameter from the shards of all ranks; inverse of ``read_shard``.

    With one rank they may be views of its shard.
    """
    names = mapping.hf_names
    match mapping.parallelism:
        case "replicated":
            return [(names[0], shards[0])]
        case "vocab_parallel":
            return [(names[0], _cat(shards, 0)[: spec.vocab_size])]
        case "head_parallel":
            return [(names[0], _cat(shards, 0))]
        case "row_parallel":
            return [(names[0], _cat(shards, 1))]
        case "gate_up_column_parallel":
            halves = [shard.chunk(2) for shard in shards]
            if len(shards) == 1:
                return list(zip(names, halves[0], strict=True))
            return [(name, torch.cat([pair[half] for pair in halves])) for half, name in enumerate(names)]
        case "qkv_column_parallel":
            sizes = rows_of_group(spec)
            fused = torch.cat(shards)
            parts = fused.reshape(spec.num_query_groups, sum(sizes), *fused.shape[1:]).split(sizes, dim=1)
            return [(name, part.flatten(0, 1)) for name, part in zip(names, parts, strict=True)]
