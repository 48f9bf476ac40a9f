"""Maps each parameter of a model to a slice of a global tensor of a Megatron checkpoint, and splits it for a layout.

The names and shapes are those of ``sharded_state_dict`` in Megatron-Core 0.19 (a test compares them): layers of equal
shape are stacked along a first dimension, experts along a second, and a norm is named after the linear layer that
Transformer Engine fuses it with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.models.families import ParamMapping, global_param_mappings, layer_param_mappings, padded_vocab_size

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size within a global tensor."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One parameter of one layer (or outside the layers) as a slice of a global tensor."""

    entry: ParamMapping
    key: str
    leading: tuple[int, ...]
    """Index of the layer, and of the expert, in the first dimensions of the global tensor."""
    leading_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the parameter itself, undivided."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        return (*self.leading_shape, *self.shape)


def pieces(spec: ModelSpec, tp_size: int = 1) -> Iterator[Piece]:
    """Yield every parameter in the order of a Hugging Face checkpoint; a tied output layer is not stored.

    ``tp_size`` determines the padding of the vocabulary.
    """
    (embedding,) = global_param_mappings(spec, "first")
    vocabulary = (padded_vocab_size(spec.vocab_size, tp_size), spec.hidden_size)
    yield Piece(embedding, "model." + embedding.parameter, (), (), vocabulary)
    for layer in range(spec.num_layers):
        for entry in layer_param_mappings(spec, layer):
            leading, leading_shape = (layer,), (spec.num_layers,)
            if entry.expert is not None:
                leading, leading_shape = (layer, entry.expert), (spec.num_layers, spec.num_experts)
            yield Piece(entry, _layer_key(spec, entry), leading, leading_shape, _layer_shape(spec, entry))
    norm, output = global_param_mappings(spec, "last")
    yield Piece(norm, "model." + norm.parameter, (), (), (spec.hidden_size,))
    if not spec.tie_word_embeddings:
        yield Piece(output, "model." + output.parameter, (), (), vocabulary)


def _layer_key(spec: ModelSpec, entry: ParamMapping) -> str:
    name = entry.parameter.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    if not spec.num_experts:
        name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    if entry.expert is not None:
        name = name.replace(f"local_experts.{entry.expert}.", "experts.")
    return "model.decoder.layers." + name


def _layer_shape(spec: ModelSpec, entry: ParamMapping) -> tuple[int, ...]:
    ffn = spec.ffn_hidden_size if entry.expert is None else spec.moe_ffn_hidden_size
    match entry.parallelism:
        case "qkv_column_parallel":
            rows = spec.q_dim + 2 * spec.kv_dim
            return (rows,) if entry.parameter.endswith(".bias") else (rows, spec.hidden_size)
        case "gate_up_column_parallel":
            return (2 * ffn,) if entry.parameter.endswith(".bias") else (2 * ffn, spec.hidden_size)
        case "head_parallel":
            return (spec.num_attention_heads,)
        case "row_parallel":
            return (spec.hidden_size, spec.q_dim if "linear_proj" in entry.parameter else ffn)
    if entry.parameter == "mlp.router.weight":
        return (spec.num_experts, spec.hidden_size)
    if entry.parameter == "mlp.router.bias":
        return (spec.num_experts,)
    is_of_head = entry.parameter.startswith(("self_attention.q_", "self_attention.k_"))
    return (spec.head_dim if is_of_head else spec.hidden_size,)


def boxes(piece: Piece, tp_size: int) -> list[Box]:
    """Return the box of each of ``tp_size`` ranks within a parameter; experts are not split."""
    parallelism, parts = piece.entry.parallelism, tp_size if piece.entry.expert is None else 1
    if parallelism == "replicated":
        return [((0,) * len(piece.shape), piece.shape)]
    dim = 1 if parallelism == "row_parallel" else 0
    # Gate and up projection are two halves, each cut by itself.
    parts *= 2 if parallelism == "gate_up_column_parallel" else 1
    share = piece.shape[dim] // parts
    size = tuple(share if axis == dim else length for axis, length in enumerate(piece.shape))
    return [(tuple(part * share if axis == dim else 0 for axis in range(len(size))), size) for part in range(parts)]
