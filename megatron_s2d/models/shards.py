"""Megatron parameters cut from Hugging Face tensors and joined back, one parameter at a time.

The arithmetic of the name table's rules, and random initial weights as a source of tensors. Knows no process group and
no file: ``weights`` applies it to live models, ``conversion/`` to checkpoints.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import torch

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.models.families import ParamMapping, hf_tensor_shapes, padded_vocab_size


class WeightSource(Protocol):
    """Where Hugging Face tensors come from."""

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tensor ``name``, or its slice [start, stop) along ``dim`` (to the end without ``stop``)."""
        ...


class SeededWeights:
    """Random initial weights, each tensor drawn from (seed, name), so that they do not depend on a layout.

    Norms are one; matrices are normal with ``initializer_range``, those that write into the residual stream divided by
    sqrt(2 x layers) (GPT-2, section 2.3). Drawn in float32 on the CPU.
    """

    def __init__(self, spec: ModelSpec, seed: int):
        self._spec = spec
        self._seed = seed
        self._shapes = dict(hf_tensor_shapes(spec))

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """See ``WeightSource.read``."""
        shape = self._shapes[name]
        if len(shape) == 1:
            tensor = torch.ones(shape)
        else:
            digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            std = self._spec.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self._spec.num_layers)
            tensor = torch.empty(shape).normal_(0.0, std, generator=generator)
        return tensor.narrow(dim, start, (shape[dim] if stop is None else stop) - start)


def read_shard(entry: ParamMapping, spec: ModelSpec, source: WeightSource, tp_rank: int, tp_size: int) -> torch.Tensor:
    """One tensor rank's part of a Megatron parameter, read from its Hugging Face tensors."""
    names = entry.hf_names
    match entry.parallelism:
        case "replicated":
            return source.read(names[0])
        case "vocabulary":
            share = padded_vocab_size(spec.vocab_size, tp_size) // tp_size
            start = min(tp_rank * share, spec.vocab_size)
            rows = source.read(names[0], 0, start, min((tp_rank + 1) * share, spec.vocab_size))
            padding = share - rows.size(0)
            return torch.cat([rows, rows.new_zeros(padding, rows.size(1))]) if padding else rows
        case "columns":
            width = spec.q_dim if names[0].endswith("o_proj.weight") else _ffn_size(entry, spec)
            share = width // tp_size
            return source.read(names[0], 1, tp_rank * share, (tp_rank + 1) * share)
        case "gate_up":
            share = _ffn_size(entry, spec) // tp_size
            return torch.cat([source.read(name, 0, tp_rank * share, (tp_rank + 1) * share) for name in names])
        case "qkv":
            return _read_qkv(entry, spec, source, tp_rank, tp_size)


def _ffn_size(entry: ParamMapping, spec: ModelSpec) -> int:
    return spec.ffn_hidden_size if entry.expert is None else spec.moe_ffn_hidden_size


def _heads_of_group(spec: ModelSpec) -> list[int]:
    """Rows of one group in the fused matrix: its queries, its key, its value."""
    return [spec.q_dim // spec.num_query_groups, spec.head_dim, spec.head_dim]


def _read_qkv(entry: ParamMapping, spec: ModelSpec, source: WeightSource, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Rows [rank, rank + 1) x share of the fused matrix; with more ranks than groups, a rank holds part of a group."""
    sizes = _heads_of_group(spec)
    group_rows = sum(sizes)
    share = group_rows * spec.num_query_groups // tp_size
    first_row, last_row = tp_rank * share, (tp_rank + 1) * share
    first, last = first_row // group_rows, -(-last_row // group_rows)
    parts = []
    for name, size in zip(entry.hf_names, sizes, strict=True):
        rows = source.read(name, 0, first * size, last * size)
        parts.append(rows.reshape(last - first, size, spec.hidden_size))
    fused = torch.cat(parts, dim=1).reshape(-1, spec.hidden_size)
    return fused[first_row - first * group_rows : last_row - first * group_rows]


def _cat(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenated; a single part as it is, because these tensors can be gigabytes."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def join_shards(entry: ParamMapping, spec: ModelSpec, shards: list[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors of a Megatron parameter from all tensor ranks' parts; inverse of ``read_shard``.

    With one rank they may be views of its part.
    """
    names = entry.hf_names
    match entry.parallelism:
        case "replicated":
            return [(names[0], shards[0])]
        case "vocabulary":
            return [(names[0], _cat(shards, 0)[: spec.vocab_size])]
        case "columns":
            return [(names[0], _cat(shards, 1))]
        case "gate_up":
            halves = [shard.chunk(2) for shard in shards]
            if len(shards) == 1:
                return list(zip(names, halves[0], strict=True))
            return [(name, torch.cat([pair[half] for pair in halves])) for half, name in enumerate(names)]
        case "qkv":
            sizes = _heads_of_group(spec)
            fused = torch.cat(shards).reshape(spec.num_query_groups, sum(sizes), spec.hidden_size)
            parts = fused.split(sizes, dim=1)
            return [(name, part.reshape(-1, spec.hidden_size)) for name, part in zip(names, parts, strict=True)]
