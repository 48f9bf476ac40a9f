"""LoRA adapters beside the linear layers of a live Megatron model; its own weights are frozen and stay untouched.

Each projection that a checkpoint names has its own A and B, also where Megatron fuses several into one matrix (query,
key and value; gate and up), so that adapters have the same tensors at every layout and in PEFT's files. A
column-parallel layer shards B, a row-parallel layer A; the other one is the same on every tensor rank. What the ranks
exchange is the product with A, which is as narrow as the rank.

All adapters of a chunk are in ``chunk.adapter``, outside of the layers: the keys of the model's own weights do not
change. Switched off, the model computes what it computed without them, bit for bit.

Shapes: r rank, t tokens (or [s, b]), in and out those of a projection, in_tp and out_tp this rank's share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)

from megatron_s2d.config.lora import LoraConfig, Projection, projection_shape
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import ParamMapping
from megatron_s2d.models.layers import NormedRowParallelLinear, rms_norm
from megatron_s2d.models.shards import rows_of_group
from megatron_s2d.models.weights import LocalParam, local_mappings, name_in_model, params_of_chunk
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout


class AdapterSource(Protocol):
    """Where the tensors of adapters come from."""

    def read(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """Return ``model.layers.N.….lora_A.weight`` [r, in] or ``lora_B.weight`` [out, r]."""
        ...


class SeededAdapter:
    """PEFT's start: A uniform within 1 / sqrt(in), drawn from (seed, name) at any layout alike; B zero."""

    def __init__(self, seed: int):
        self._seed = seed

    def read(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """See ``AdapterSource.read``."""
        if ".lora_B." in name:
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])


@dataclasses.dataclass(frozen=True)
class AdapterTensor:
    """A or B of one projection on this rank."""

    name: str  # in a checkpoint
    local_name: str  # in its ``LinearAdapter``
    parameter: torch.nn.Parameter
    shape: tuple[int, int]  # over all tensor ranks
    sharded_dim: int | None


class LinearAdapter(torch.nn.Module):
    """A and B of the projections that are fused in one linear layer: parameters ``q_proj_A``, ``q_proj_B``, ..."""

    def __init__(
        self,
        linear: torch.nn.Module,
        mapping: ParamMapping,
        spec: ModelSpec,
        lora: LoraConfig,
        tp_group: dist.ProcessGroup,
    ):
        super().__init__()
        self._linear = (linear,)  # in a tuple: its parameters are not this module's
        self._scale, self.tp_group = lora.scale, tp_group
        self.is_expert = mapping.expert is not None
        self._is_row_parallel = mapping.parallelism == "row_parallel"
        self._names: dict[Projection, str] = {}  # target -> its name in a checkpoint
        self._shapes: dict[Projection, tuple[int, int]] = {}
        sizes = rows_of_group(spec) if mapping.parallelism == "qkv_column_parallel" else [0] * len(mapping.hf_names)
        self._layout: list[tuple[Projection, int, int]] = []  # (projection, groups, columns of a group) of the output
        size = tp_group.size()
        for hf_name, of_group in zip(mapping.hf_names, sizes, strict=True):
            target: Projection = hf_name.split(".")[-2]  # type: ignore[assignment]
            out, in_ = projection_shape(spec, target)
            out_tp = out if self._is_row_parallel else out // size
            groups = out_tp // of_group if of_group else 1
            self._layout.append((target, groups, out_tp // groups))
            if target not in lora.projections:
                continue
            self._names[target] = hf_name.removesuffix(".weight")
            self._shapes[target] = (out, in_)
            self._add(target, "A", (lora.rank, in_ // size if self._is_row_parallel else in_), linear)
            self._add(target, "B", (out_tp, lora.rank), linear)

    def _add(self, target: Projection, kind: str, shape: tuple[int, int], linear: torch.nn.Module) -> None:
        weight = linear.weight
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
        is_sharded = (kind == "A") == self._is_row_parallel
        # Megatron reads these: which ranks have other values (gradient norm), which data ranks share them (experts),
        # and what every tensor rank has the gradient of its own positions of.
        set_tensor_model_parallel_attributes(parameter, is_sharded or self.is_expert, 1 if kind == "A" else 0, 1)
        parameter.allreduce = getattr(weight, "allreduce", True)  # Transformer Engine's layers leave it out
        parameter.sequence_parallel = linear.config.sequence_parallel and not is_sharded and not self.is_expert
        self.register_parameter(f"{target}_{kind}", parameter)

    @property
    def weight(self) -> torch.nn.Parameter:
        """The frozen weight beside which the adapter is."""
        return self._linear[0].weight

    def tensors(self) -> Iterator[AdapterTensor]:
        """Yield this rank's part of every A and B."""
        for target, name in self._names.items():
            out, in_ = self._shapes[target]
            for kind in ("A", "B"):
                parameter = getattr(self, f"{target}_{kind}")
                shape = (len(parameter), in_) if kind == "A" else (out, parameter.shape[1])
                dim = 1 if kind == "A" else 0
                is_sharded = (kind == "A") == self._is_row_parallel and self.tp_group.size() > 1
                yield AdapterTensor(
                    f"{name}.lora_{kind}.weight", f"{target}_{kind}", parameter, shape, dim if is_sharded else None
                )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the adapter adds to the layer's output [t, out_tp] for its input ``x``.

        x: [t, in] or [t, in_tp] as the layer gets it, with sequence parallelism this rank's positions of it.
        """
        matrices = [getattr(self, f"{target}_A") for target in self._names]
        low = F.linear(x, matrices[0] if len(matrices) == 1 else torch.cat(matrices))
        low = self._exchange(low) * self._scale
        parts = zip(self._names, low.split([len(matrix) for matrix in matrices], dim=-1), strict=True)
        return self._join({target: F.linear(part, getattr(self, f"{target}_B")) for target, part in parts})

    def _exchange(self, low: torch.Tensor) -> torch.Tensor:
        """Bring the product with A, [t, r], to where B is; experts are not split over tensor ranks."""
        group, linear = self.tp_group, self._linear[0]
        if self.is_expert or group.size() == 1:
            return low
        if self._is_row_parallel:
            if linear.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(low, group=group)
            return reduce_from_tensor_model_parallel_region(low, group=group)
        if linear.sequence_parallel:
            return gather_from_sequence_parallel_region(low, group=group)
        return copy_to_tensor_model_parallel_region(low, group=group)

    def _join(self, parts: dict[Projection, torch.Tensor]) -> torch.Tensor:
        """Return the parts [..., out_tp] in the order of the fused layer's output; zeros for those not adapted."""
        if len(self._layout) == 1:
            return next(iter(parts.values()))
        like = next(iter(parts.values()))
        columns = [
            parts[target].unflatten(-1, (groups, size))
            if target in parts
            else like.new_zeros(*like.shape[:-1], groups, size)
            for target, groups, size in self._layout
        ]
        return torch.cat(columns, dim=-1).flatten(-2)

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """Return W + scale B A in the dtype of W, computed in float32."""
        deltas = {
            target: (getattr(self, f"{target}_B").float() @ getattr(self, f"{target}_A").float()).T
            for target in self._names
        }
        return (self.weight.float() + self._scale * self._join(deltas).T).to(self.weight.dtype)


class Adapters(torch.nn.Module):
    """The adapters of one model chunk; ``enabled``: whether the model computes with them."""

    def __init__(self, chunk: torch.nn.Module, vp_stage: int, spec: ModelSpec, layout: Layout, lora: LoraConfig):
        super().__init__()
        self.enabled = True
        self._groups = layout.groups
        self.linears = torch.nn.ModuleList()
        parameters = dict(chunk.named_parameters())
        for name, mapping in local_mappings(spec, layout, vp_stage):
            if not is_adapted(mapping, lora):
                continue
            linear = chunk.get_submodule(name_in_model(name, parameters).rpartition(".")[0])
            tp_group = layout.groups.tp if mapping.expert is None else layout.groups.expt_tp
            adapter = LinearAdapter(linear, mapping, spec, lora, tp_group)
            self.linears.append(adapter)
            self._attach(linear, adapter)
        self._by_weight = {id(adapter.weight): adapter for adapter in self.linears}

    def _attach(self, linear: torch.nn.Module, adapter: LinearAdapter) -> None:
        if isinstance(linear, NormedRowParallelLinear):
            linear.added = lambda x: adapter(x) if self.enabled else None
            return

        norm_weight = getattr(linear, "layer_norm_weight", None)  # of a norm that Transformer Engine fuses with it

        def add(module: torch.nn.Module, inputs: tuple, output: tuple) -> tuple | None:
            if not self.enabled:
                return None
            x = inputs[0]
            if norm_weight is not None:
                config = linear.config
                x = rms_norm(x, norm_weight, config.layernorm_epsilon, config.layernorm_zero_centered_gamma)
            return output[0] + adapter(x), output[1]

        linear.register_forward_hook(add)

    def read(self, source: AdapterSource) -> None:
        """Fill this rank's part of every tensor from ``source``, cast to its dtype."""
        with torch.no_grad():
            for adapter in self.linears:
                for item in adapter.tensors():
                    tensor = source.read(item.name, item.shape)
                    if item.sharded_dim is not None:
                        size = item.parameter.shape[item.sharded_dim]
                        tensor = tensor.narrow(item.sharded_dim, adapter.tp_group.rank() * size, size)
                    item.parameter.copy_(tensor)

    def merged(self, weight: torch.nn.Parameter) -> torch.Tensor | None:
        """Return ``weight`` of the chunk with its adapter merged; None if it has none."""
        adapter = self._by_weight.get(id(weight))
        return None if adapter is None else adapter.merged()

    @torch.no_grad()
    def merge(self) -> None:
        """Add all adapters to the weights beside them, and set them to zero."""
        for adapter in self.linears:
            adapter.weight.copy_(adapter.merged())
            for item in adapter.tensors():
                item.parameter.zero_()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata=None
    ) -> dict[str, ShardedTensor]:
        """Return Megatron's description of this rank's tensors; keys on disk are those of a checkpoint's tensors."""
        state = {}
        for index, adapter in enumerate(self.linears):
            dp_rank = (self._groups.expt_dp if adapter.is_expert else self._groups.dp_cp).rank()
            group = adapter.tp_group
            for item in adapter.tensors():
                is_sharded = item.sharded_dim is not None
                offsets = [(item.sharded_dim, group.rank(), group.size())] if is_sharded else []
                state[f"{prefix}linears.{index}.{item.local_name}"] = ShardedTensor.from_rank_offsets(
                    f"adapter.{item.name}",
                    item.parameter,
                    *offsets,
                    replica_id=(0, 0 if is_sharded else group.rank(), dp_rank),
                )
        return state


def is_adapted(mapping: ParamMapping, lora: LoraConfig) -> bool:
    """Return whether a parameter has a projection that is a target."""
    return any(name.split(".")[-2:] == [target, "weight"] for name in mapping.hf_names for target in lora.projections)


def add_adapters(
    chunks: Sequence[torch.nn.Module], spec: ModelSpec, layout: Layout, lora: LoraConfig, source: AdapterSource
) -> None:
    """Freeze ``chunks``, whose weights are complete, and put adapters beside their linear layers."""
    check_layers(spec, lora)
    for vp_stage, chunk in enumerate(chunks):
        chunk.requires_grad_(False)
        chunk.adapter = Adapters(chunk, vp_stage, spec, layout, lora)
        chunk.adapter.read(source)
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_require_grad)


def check_layers(spec: ModelSpec, lora: LoraConfig) -> None:
    """Raise ``UserError`` if the layers of this process cannot have the adapters."""
    adapts_experts = spec.num_experts > 0 and bool(set(lora.projections) & {"gate_proj", "up_proj", "down_proj"})
    if adapts_experts and device.capabilities().transformer_engine:
        raise UserError(
            "lora.targets: adapters of experts are not implemented beside Transformer Engine's products of all "
            "experts: name q_proj, k_proj, v_proj and o_proj, or use an environment without Transformer Engine"
        )


def _require_grad(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """Let gradients reach the first layer: a recomputed layer has none if nothing that it is given needs one."""
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


@contextlib.contextmanager
def adapters_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let the model compute without its adapters inside the block."""
    for chunk in chunks:
        chunk.adapter.enabled = False
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.adapter.enabled = True


def gather_adapters(
    chunks: Sequence[torch.nn.Module], spec: ModelSpec, layout: Layout, lora: LoraConfig
) -> dict[str, torch.Tensor]:
    """Return the full tensors of all adapters by their names in a checkpoint, on every rank; collective."""
    result: dict[str, torch.Tensor] = {}
    for vp_stage, chunk in enumerate(chunks):
        for pp_rank in range(layout.pp_size):
            params = [
                param
                for param in params_of_chunk(spec, layout, pp_rank, vp_stage)
                if is_adapted(param.mappings[0], lora)
            ]
            for are_experts in (False, True):
                selected = [param for param in params if param.is_expert == are_experts]
                if selected:
                    result |= _gather(chunk, selected, spec, layout, lora, pp_rank)
    return result


def _gather(
    chunk: torch.nn.Module, params: list[LocalParam], spec: ModelSpec, layout: Layout, lora: LoraConfig, pp_rank: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of the parameters of pipeline rank ``pp_rank``: experts' or others'."""
    are_experts = params[0].is_expert
    group = layout.groups.ep if are_experts else layout.groups.tp
    shards = [shape for param in params for shape in _shards_of(param, spec, lora, group.size())]
    count = sum(math.prod(shape) for _, shape, _ in shards)
    gathered = torch.empty(group.size(), count, dtype=chunk.config.params_dtype, device=device.device())
    if layout.pp_rank == pp_rank:
        own = [
            item.parameter.detach().reshape(-1)
            for adapter in chunk.adapter.linears
            if adapter.is_expert == are_experts
            for item in adapter.tensors()
        ]
        dist.all_gather_into_tensor(gathered, torch.cat(own)[None], group=group)
    if layout.pp_size > 1:
        dist.broadcast(gathered, dist.get_process_group_ranks(layout.groups.pp)[pp_rank], group=layout.groups.pp)
    result, start = {}, 0
    for names, shape, sharded_dim in shards:
        stop = start + math.prod(shape)
        parts = [row[start:stop].view(shape) for row in gathered]
        start = stop
        if are_experts:
            result |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
        else:
            result[names[0]] = parts[0].clone() if sharded_dim is None else torch.cat(parts, dim=sharded_dim)
    return result


def _shards_of(
    param: LocalParam, spec: ModelSpec, lora: LoraConfig, size: int
) -> Iterator[tuple[list[str], tuple[int, int], int | None]]:
    """Yield (name on each expert rank, shape on one rank, sharded dimension) in the order of ``tensors``."""
    for hf_names in zip(*(mapping.hf_names for mapping in param.mappings), strict=True):
        target: Projection = hf_names[0].split(".")[-2]  # type: ignore[assignment]
        if target not in lora.projections:
            continue
        out, in_ = projection_shape(spec, target)
        is_row = param.mappings[0].parallelism == "row_parallel"
        for kind, full in (("A", (lora.rank, in_)), ("B", (out, lora.rank))):
            dim = 1 if kind == "A" else 0
            is_sharded = (kind == "A") == is_row and not param.is_expert
            shape = tuple(
                length // size if is_sharded and index == dim else length for index, length in enumerate(full)
            )
            names = [f"{name.removesuffix('.weight')}.lora_{kind}.weight" for name in hf_names]
            yield names, shape, dim if is_sharded else None
