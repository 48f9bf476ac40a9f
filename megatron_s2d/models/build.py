"""Build this rank's part of a Megatron-Core ``GPTModel`` from a ``ModelSpec`` and a ``Layout``; no other file does.

Layers are Transformer Engine's where it is usable; elsewhere they are Megatron's own linear layers with the norm and
the attention of ``layers``. (Megatron-Core 0.19 announces that ``HybridModel`` will replace ``GPTModel``; the switch
would happen in this file.)

Shapes: b batch (sequences), s sequence length, v_tp = padded vocabulary / tensor-parallel size.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import RECIPES, Fp8Config, check_chip, check_shapes
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import check_layout, layers_of_pp_rank, padded_vocab_size
from megatron_s2d.models.shards import SeededWeights
from megatron_s2d.models.weights import import_weights
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout

device.patch_megatron_for_cpu()

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe import router as moe_router
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_s2d.models.kv_cache import CachedSelfAttention
from megatron_s2d.models.layers import CoreAttention, RMSNorm

Recompute = Literal["none", "selective", "full"]


def _count_tokens_per_expert(
    routing_map: torch.Tensor,
    reduce_group: torch.distributed.ProcessGroup,
    topk: int | None = None,
    with_padding_mask: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | int]:
    """Return the group's tokens of each expert [e], the mean number of tokens of a rank, and their sum.

    Replaces the function of Megatron-Core 0.19.2, which sums the counts of this rank in place where there is a padding
    mask: its count of this rank is then the group's, and the router multiplies by the group's size again, so that
    the gradient of the auxiliary loss is too large by TP x CP. The mean, and not this rank's count, because the router
    weights every rank's share by it, and padding is not spread evenly over ranks.
    """
    tokens_per_expert = reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), reduce_group)
    size = reduce_group.size()
    if not with_padding_mask:
        return tokens_per_expert, routing_map.shape[0], routing_map.shape[0] * size
    num_tokens = tokens_per_expert.sum() / topk
    # A data-parallel rank with fewer micro-batches than the others gets empty ones; their loss is 0, not 0 / 0.
    return tokens_per_expert, num_tokens / size, num_tokens.clamp(min=1)


moe_router.get_tokens_per_expert_and_token_count = _count_tokens_per_expert


def build_model(
    spec: ModelSpec,
    layout: Layout,
    *,
    params_dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    recompute: Recompute = "none",
    moe_aux_loss_coeff: float = 0.0,
    fp8: Fp8Config | None = None,
) -> list[GPTModel]:
    """Return this rank's part of the model, as the list of chunks that Megatron's schedules take (always one).

    Collective. seed: draw the weights by tensor name (bit-identical at every layout); None leaves them uninitialised
    for ``import_weights`` or a checkpoint. fp8: matrix products of the layers run in FP8; the tokens of a micro-batch
    must then be a multiple of the recipe's. The model takes the arguments of ``GPTModel.forward``, with an attention
    mask as in ``layers.attend``, and returns logits [b, s, v_tp], not gathered; columns from ``spec.vocab_size`` on are
    padding. Raises ``UserError`` for a layout whose sizes do not divide the model's, and if Transformer Engine or the
    GPU does not support ``fp8``.
    """
    check_layout(spec, layout.config)
    if fp8 is not None:
        check_fp8(fp8, spec, layout.config)
    config = transformer_config(
        spec, layout, params_dtype=params_dtype, recompute=recompute, moe_aux_loss_coeff=moe_aux_loss_coeff, fp8=fp8
    )
    with layout.active():
        model = GPTModel(
            config=config,
            transformer_layer_spec=_block_submodules(spec, layout),
            vocab_size=padded_vocab_size(spec.vocab_size, layout.tp_size),
            max_sequence_length=spec.max_position_embeddings,
            pre_process=layout.is_pipeline_first_stage,
            post_process=layout.is_pipeline_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=spec.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
            pg_collection=layout.groups,
        )
    # Megatron's own scaling has Llama 3.1's constants built in.
    model.rotary_pos_emb.inv_freq = rope_frequencies(spec).to(device.device())
    model.to(device.device())
    if seed is not None:
        import_weights([model], spec, layout, SeededWeights(spec, seed))
    return [model]


def check_fp8(fp8: Fp8Config, spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Raise ``UserError`` if this process cannot run ``fp8`` for the model at the layout."""
    capabilities, recipe = device.capabilities(), RECIPES[fp8.recipe]
    if not capabilities.cuda:
        raise UserError("fp8 needs a CUDA device and Transformer Engine, and this process has no CUDA: leave fp8 out")
    if not capabilities.transformer_engine:
        raise UserError("fp8 needs Transformer Engine, which does not import here: install it, or leave fp8 out")
    check_chip(fp8, capabilities.compute_capability, capabilities.device_name)
    if capabilities.cuda_version < recipe.least_cuda:
        needed, actual = (".".join(map(str, version)) for version in (recipe.least_cuda, capabilities.cuda_version))
        raise UserError(f"fp8.recipe: {fp8.recipe} needs CUDA {needed}, torch was built for {actual}: choose another")
    check_shapes(fp8, spec, parallel)


def transformer_config(
    spec: ModelSpec,
    layout: Layout,
    *,
    params_dtype: torch.dtype,
    recompute: Recompute = "none",
    moe_aux_loss_coeff: float = 0.0,
    fp8: Fp8Config | None = None,
) -> TransformerConfig:
    """Return Megatron's configuration object for ``spec`` at ``layout``."""
    parallel = layout.config
    with_te = device.capabilities().transformer_engine
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        # Weights are imported by name afterwards.
        perform_initialization=False,
        use_cpu_initialization=not device.capabilities().cuda,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.groups.expt_tp.size(),
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        apply_rope_fusion=with_te,
        bias_activation_fusion=with_te,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        **_expert_fields(spec, moe_aux_loss_coeff),
        **_fp8_fields(fp8),
    )


def _expert_fields(spec: ModelSpec, moe_aux_loss_coeff: float) -> dict[str, Any]:
    if not spec.num_experts:
        return {}
    return {
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.num_experts_per_tok,
        "moe_ffn_hidden_size": spec.moe_ffn_hidden_size,
        # Softmax over the top-k logits equals softmax over all of them, renormalised over the top-k.
        "moe_router_pre_softmax": not spec.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": moe_aux_loss_coeff,
        "moe_grouped_gemm": device.capabilities().transformer_engine,
    }


def _fp8_fields(fp8: Fp8Config | None) -> dict[str, Any]:
    if fp8 is None:
        return {}
    return {
        "fp8": RECIPES[fp8.recipe].format,
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.parameters,
        # Delayed scaling: Transformer Engine's defaults; Megatron's default history is a single step.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }


def rope_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Return the angular frequency of each pair of channels: [head_dim / 2] float32.

    Llama 3 (``rope_scaling``): wavelengths shorter than original / high_freq_factor are unchanged, those longer than
    original / low_freq_factor are stretched by ``factor``, and between them the two blend linearly in 1 / wavelength.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _block_submodules(spec: ModelSpec, layout: Layout) -> TransformerBlockSubmodules:
    experts = spec.num_experts or None
    if device.capabilities().transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        from megatron_s2d.models.te_attention import MaskedTEDotProductAttention

        norm = TENorm
        layer = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=experts, moe_grouped_gemm=True, qk_layernorm=spec.qk_norm
        )
        layer.self_attention.submodules.core_attention = MaskedTEDotProductAttention
    else:
        norm = RMSNorm
        layer = get_gpt_layer_local_submodules(num_experts=experts, qk_layernorm=spec.qk_norm, normalization="RMSNorm")
        _use_local_modules(layer, spec)
    layer.self_attention.module = CachedSelfAttention
    num_layers = len(layers_of_pp_rank(spec, layout.pp_rank, layout.pp_size))
    layers = [ModuleSpec(module=TransformerLayer, submodules=layer)] * num_layers
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _use_local_modules(layer: TransformerLayerSubmodules, spec: ModelSpec) -> None:
    attention = layer.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = CoreAttention
    if spec.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if spec.num_experts:
        # Transformer Engine does not fuse the norm before a mixture of experts; with the same key in checkpoints, both
        # kinds of layers can load each other's.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
