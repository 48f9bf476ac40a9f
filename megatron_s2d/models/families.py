"""Names of a model's parameters in Megatron and Hugging Face, and how each is sharded. No torch here.

The parts of the family (``config/families.py``) give a list of ``ParamMapping``: one Megatron parameter, the Hugging
Face tensors that it is made of, and the rule that joins and shards them. Two parameters are made of several tensors
(fused query/key/value, gate and up projection of an MLP). The table names the parameters of the full model;
``models/weights.py`` applies it to the part on one rank. The same table serves Megatron's local and the Transformer
Engine layers, which name two norms differently.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from megatron_s2d.arithmetic import round_up
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.errors import UserError

Parallelism = Literal[
    "replicated", "vocab_parallel", "row_parallel", "head_parallel", "qkv_column_parallel", "gate_up_column_parallel"
]
"""How a weight [out, in] is sharded over tensor-parallel ranks, in Megatron's terms.

``replicated``: not at all. ``vocab_parallel``: along dimension 0, padded with zero rows (VocabParallelEmbedding).
``row_parallel``: along dimension 1 (RowParallelLinear). ``head_parallel``: a number of each query head.
``qkv_column_parallel``: along dimension 0 (ColumnParallelLinear) of the fused matrix, query group by query group
[queries of the group, key, value]. ``gate_up_column_parallel``: along dimension 0 of each half, so that every rank has
[its shard of gate, its shard of up].
"""


@dataclasses.dataclass(frozen=True)
class ParamMapping:
    """One Megatron parameter: its name within the model or layer, its Hugging Face tensors, and how it is sharded."""

    parameter: str
    hf_names: tuple[str, ...]
    parallelism: Parallelism
    expert: int | None = None
    """Index among all experts of the layer; an expert's parameters are on one expert-parallel rank."""


def global_param_mappings(spec: ModelSpec, pipeline_end: Literal["first", "last"]) -> list[ParamMapping]:
    """Return the parameters outside the layers that the first or the last pipeline rank has.

    The output layer of a tied model is listed, because with pipeline parallelism the last rank has a copy of it.
    """
    if pipeline_end == "first":
        return [ParamMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab_parallel")]
    output = "model.embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"
    return [
        ParamMapping("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
        ParamMapping("output_layer.weight", (output,), "vocab_parallel"),
    ]


_POST_NORMS = {"self_attention.linear_proj": "post_attention", "mlp.linear_fc2": "post_feedforward"}


def layer_param_mappings(spec: ModelSpec, layer: int) -> list[ParamMapping]:
    """Return the parameters of one layer, named within it; ``layer`` counts from 0 over the full model."""
    hf = f"model.layers.{layer}."
    attention = hf + "self_attn."
    mappings = [
        ParamMapping("input_layernorm.weight", (hf + "input_layernorm.weight",), "replicated"),
        ParamMapping(
            "self_attention.linear_qkv.weight",
            tuple(f"{attention}{name}_proj.weight" for name in ("q", "k", "v")),
            "qkv_column_parallel",
        ),
    ]
    if spec.parts.qkv_bias:
        names = tuple(f"{attention}{name}_proj.bias" for name in ("q", "k", "v"))
        mappings.append(ParamMapping("self_attention.linear_qkv.bias", names, "qkv_column_parallel"))
    mappings += [
        ParamMapping("self_attention.linear_proj.weight", (attention + "o_proj.weight",), "row_parallel"),
    ]
    if spec.parts.linear_biases:
        mappings.append(ParamMapping("self_attention.linear_proj.bias", (attention + "o_proj.bias",), "replicated"))
    if spec.parts.attention_sinks:
        offset = "self_attention.core_attention.softmax_offset"
        mappings.append(ParamMapping(offset, (attention + "sinks",), "head_parallel"))
    before_mlp = "post_attention_layernorm.weight"
    if spec.parts.post_norms:
        before_mlp = "pre_feedforward_layernorm.weight"
        mappings += [
            ParamMapping(module + ".post_norm.weight", (f"{hf}{name}_layernorm.weight",), "replicated")
            for module, name in _POST_NORMS.items()
        ]
    mappings.append(ParamMapping("pre_mlp_layernorm.weight", (hf + before_mlp,), "replicated"))
    if spec.qk_norm:
        mappings += [
            ParamMapping("self_attention.q_layernorm.weight", (attention + "q_norm.weight",), "replicated"),
            ParamMapping("self_attention.k_layernorm.weight", (attention + "k_norm.weight",), "replicated"),
        ]
    if not spec.num_experts:
        return mappings + _mlp_param_mappings(spec, "mlp.", hf + "mlp.", None)
    kinds = ("weight", "bias") if spec.parts.linear_biases else ("weight",)
    router = f"{hf}mlp.{spec.parts.router_name}."
    mappings += [ParamMapping(f"mlp.router.{kind}", (router + kind,), "replicated") for kind in kinds]
    for expert in range(spec.num_experts):
        prefix = f"mlp.experts.local_experts.{expert}."
        mappings += _mlp_param_mappings(spec, prefix, f"{hf}mlp.experts.{expert}.", expert)
    return mappings


def _mlp_param_mappings(spec: ModelSpec, prefix: str, hf: str, expert: int | None) -> list[ParamMapping]:
    mappings = []
    for kind in ("weight", "bias") if spec.parts.linear_biases else ("weight",):
        gate_up = (f"{hf}gate_proj.{kind}", f"{hf}up_proj.{kind}")
        mappings.append(ParamMapping(f"{prefix}linear_fc1.{kind}", gate_up, "gate_up_column_parallel", expert))
        down: Parallelism = "row_parallel" if kind == "weight" else "replicated"
        mappings.append(ParamMapping(f"{prefix}linear_fc2.{kind}", (f"{hf}down_proj.{kind}",), down, expert))
    return mappings


def hf_tensor_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of the model's Hugging Face checkpoint: embedding, layers, norm, output."""
    hidden = spec.hidden_size
    yield "model.embed_tokens.weight", (spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        for mapping in layer_param_mappings(spec, layer):
            for name in mapping.hf_names:
                yield name, _layer_shape(spec, name, expert=mapping.expert is not None)
    yield "model.norm.weight", (hidden,)
    if not spec.tie_word_embeddings:
        yield "lm_head.weight", (spec.vocab_size, hidden)


def _layer_shape(spec: ModelSpec, name: str, *, expert: bool) -> tuple[int, ...]:
    hidden = spec.hidden_size
    ffn = spec.moe_ffn_hidden_size if expert else spec.ffn_hidden_size
    *_, module, kind = name.split(".")
    if kind == "sinks":
        return (spec.num_attention_heads,)
    shape: tuple[int, ...] = {
        "q_proj": (spec.q_dim, hidden),
        "k_proj": (spec.kv_dim, hidden),
        "v_proj": (spec.kv_dim, hidden),
        "o_proj": (hidden, spec.q_dim),
        "q_norm": (spec.head_dim,),
        "k_norm": (spec.head_dim,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,),
        "post_feedforward_layernorm": (hidden,),
        spec.parts.router_name: (spec.num_experts, hidden),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }[module]
    return shape[:1] if kind == "bias" else shape


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Return the number of rows of the embedding and of the output layer.

    A multiple of 128 (of 8 for vocabularies below 4096) and of the tensor-parallel size. All sizes that divide 128 (or
    8) therefore give the same number, so a checkpoint has the same shapes at all of them.
    """
    multiple = math.lcm(128 if vocab_size >= 4096 else 8, tensor_model_parallel_size)
    return round_up(vocab_size, multiple)


def layers_of_pp_rank(spec: ModelSpec, pp_rank: int, pp_size: int, vp_stage: int = 0, vp_size: int = 1) -> range:
    """Return the indices, counted over the full model, of the layers of a pipeline rank's chunk ``vp_stage``.

    Chunk v of rank p has part ``v * pp_size + p`` of the depth, as in Megatron.
    """
    layers_per_chunk = spec.num_layers // (pp_size * vp_size)
    part = vp_stage * pp_size + pp_rank
    return range(part * layers_per_chunk, (part + 1) * layers_per_chunk)


def check_layout(spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Raise ``UserError``, naming both sizes, for a layout whose sizes do not divide the model's."""
    tensor = parallel.tensor_model_parallel_size
    pipeline = parallel.pipeline_model_parallel_size
    expert = parallel.expert_model_parallel_size
    if spec.num_attention_heads % tensor:
        _refuse("num_attention_heads", spec.num_attention_heads, "tensor_model_parallel_size", tensor)
    if not spec.num_experts and spec.ffn_hidden_size % tensor:
        _refuse("ffn_hidden_size", spec.ffn_hidden_size, "tensor_model_parallel_size", tensor)
    if spec.num_query_groups % tensor and tensor % spec.num_query_groups:
        _refuse("num_query_groups", spec.num_query_groups, "tensor_model_parallel_size", tensor)
    if spec.num_layers % pipeline:
        _refuse("num_layers", spec.num_layers, "pipeline_model_parallel_size", pipeline)
    virtual = parallel.virtual_pipeline_model_parallel_size
    if spec.num_layers % (pipeline * virtual):
        sizes = "pipeline_model_parallel_size x virtual_pipeline_model_parallel_size"
        _refuse("num_layers", spec.num_layers, sizes, pipeline * virtual)
    if expert > 1 and not spec.num_experts:
        raise UserError(f"expert_model_parallel_size {expert}: the model has no experts; set it to 1")
    if spec.num_experts % expert:
        _refuse("num_experts", spec.num_experts, "expert_model_parallel_size", expert)
    if spec.num_experts and tensor > 1 and not parallel.sequence_parallel:
        # Megatron-Core trains a mixture of experts under tensor parallelism only with a sharded sequence.
        raise UserError(
            f"a mixture of experts at tensor_model_parallel_size {tensor} needs sequence_parallel: set it to true"
        )


def _refuse(name: str, value: int, size_name: str, size: int) -> None:
    raise UserError(f"the model's {name} {value} cannot be divided by {size_name} {size}; choose another layout")
