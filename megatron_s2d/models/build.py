"""Build this rank's part of a Megatron-Core ``GPTModel`` from a ``ModelSpec`` and a ``Layout``; no other file does.

Layers are Transformer Engine's where it is usable; elsewhere they are Megatron's own linear layers with the norm and
the attention of ``layers``. (Megatron-Core 0.19 announces that ``HybridModel`` will replace ``GPTModel``; the switch
would happen in this file.)

Shapes: b batch (sequences), s sequence length, v_tp = padded vocabulary / tensor-parallel size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe import router as moe_router
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_s2d.config.families import Activation
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import RECIPES, Fp8Config, check_chip, check_shapes
from megatron_s2d.config.recompute import NO_RECOMPUTE, WITH_TRANSFORMER_ENGINE, Recompute
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import check_layout, layers_of_pp_rank, padded_vocab_size
from megatron_s2d.models.kv_cache import CachedSelfAttention
from megatron_s2d.models.layer_config import LayerConfig
from megatron_s2d.models.layers import CoreAttention, NormedRowParallelLinear, RMSNorm
from megatron_s2d.models.rope import attention_factor, rotary_frequencies, use_own_rotation
from megatron_s2d.models.shards import SeededWeights
from megatron_s2d.models.tp_comm_overlap import prepare_tp_comm_overlap
from megatron_s2d.models.weights import import_weights
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "clamped_swiglu": quick_gelu,
}


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
    recompute: Recompute = NO_RECOMPUTE,
    moe_aux_loss_coeff: float = 0.0,
    fp8: Fp8Config | None = None,
    overlapped_tokens: int | None = None,
) -> list[GPTModel]:
    """Return this rank's part of the model, as the list of chunks that Megatron's schedules take.

    One chunk, or one for each virtual pipeline stage: chunk v of rank p has part ``v * pp_size + p`` of the depth.

    Collective. seed: draw the weights by tensor name (bit-identical at every layout); None leaves them uninitialised
    for ``import_weights`` or a checkpoint. fp8: matrix products of the layers run in FP8; the tokens of a micro-batch
    must then be a multiple of the recipe's. overlapped_tokens: of every micro-batch of training on this context rank;
    tensor ranks then communicate while products run (``tp_comm_overlap``). The model takes the arguments of
    ``GPTModel.forward``, with an attention mask as in ``layers.attend``, and returns logits [b, s, v_tp], not gathered;
    columns from ``spec.vocab_size`` on are padding. Raises ``UserError`` for a layout whose sizes do not divide the
    model's, and for settings that Transformer Engine, DeepEP or the GPU does not support.
    """
    use_own_rotation()
    check_layout(spec, layout.config)
    if fp8 is not None:
        check_fp8(fp8, spec, layout.config)
    if spec.num_experts and layout.config.moe_token_dispatcher == "flex":
        check_deepep()
    if spec.parts.post_norms and device.capabilities().transformer_engine:
        raise UserError(
            f"models of family {spec.family} have norms after attention and MLP, which are implemented without "
            "Transformer Engine only: use an environment without it"
        )
    if spec.parts.attention_sinks and device.capabilities().transformer_engine:
        raise UserError(
            f"models of family {spec.family} have attention sinks, which are implemented without Transformer Engine "
            "only: use an environment without it"
        )
    for module in WITH_TRANSFORMER_ENGINE:
        if recompute.recomputes(module) and not device.capabilities().transformer_engine:
            raise UserError(
                f"recompute_modules: {module} needs Transformer Engine, which does not import here: leave it out"
            )
    config = transformer_config(
        spec, layout, params_dtype=params_dtype, recompute=recompute, moe_aux_loss_coeff=moe_aux_loss_coeff, fp8=fp8
    )
    if overlapped_tokens is not None:
        prepare_tp_comm_overlap(overlapped_tokens, spec.hidden_size, layout, dtype=params_dtype, fp8=fp8 is not None)
        config.tp_comm_overlap = True
    chunks = [_build_chunk(spec, layout, config, vp_stage) for vp_stage in range(layout.vp_size)]
    if seed is not None:
        import_weights(chunks, spec, layout, SeededWeights(spec, seed))
    return chunks


def _build_chunk(spec: ModelSpec, layout: Layout, config: TransformerConfig, vp_stage: int) -> GPTModel:
    with layout.active():
        model = GPTModel(
            config=config,
            transformer_layer_spec=_block_submodules(spec, layout),
            vocab_size=padded_vocab_size(spec.vocab_size, layout.tp_size),
            max_sequence_length=spec.max_position_embeddings,
            pre_process=layout.is_pipeline_first_stage and vp_stage == 0,
            post_process=layout.is_pipeline_last_stage and vp_stage == layout.vp_size - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=spec.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
            pg_collection=layout.groups,
            vp_stage=vp_stage if layout.vp_size > 1 else None,
        )
    # Megatron's own scaling has Llama 3.1's constants built in.
    model.rotary_pos_emb.inv_freq = rotary_frequencies(spec).to(device.device())
    if spec.parts.scaled_embedding and model.pre_process:
        scale = float(torch.tensor(spec.hidden_size**0.5).to(config.params_dtype))
        model.embedding.register_forward_hook(lambda module, inputs, output: output * scale)
    if spec.num_experts and spec.parts.linear_biases:
        for module in model.modules():
            if isinstance(module, RowParallelLinear) and module.is_expert:
                # Megatron adds the bias in place, which autograd refuses where a reduction over one rank was left out.
                module.explicit_expert_comm = True
    return model.to(device.device())


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


def check_deepep() -> None:
    """Raise ``UserError`` if this process cannot dispatch tokens with DeepEP."""
    capabilities, other = device.capabilities(), "or set parallel.moe_token_dispatcher to alltoall"
    if not capabilities.cuda:
        raise UserError(f"parallel.moe_token_dispatcher: flex needs GPUs, and this process has no CUDA: {other[3:]}")
    if capabilities.compute_capability[0] not in (8, 9, 10):
        raise UserError(
            f"parallel.moe_token_dispatcher: flex needs compute capability 8, 9 or 10, and {capabilities.device_name} "
            f"has {capabilities.compute_capability[0]}: use another GPU, {other}"
        )
    error = device.import_error("deep_ep")
    if error is not None:
        reason = f"does not import ({error})" if error else "is not installed"
        raise UserError(
            f"parallel.moe_token_dispatcher: flex needs DeepEP, which {reason}: install it from "
            f"https://github.com/deepseek-ai/DeepEP, {other}"
        )


def transformer_config(
    spec: ModelSpec,
    layout: Layout,
    *,
    params_dtype: torch.dtype,
    recompute: Recompute = NO_RECOMPUTE,
    moe_aux_loss_coeff: float = 0.0,
    fp8: Fp8Config | None = None,
) -> LayerConfig:
    """Return Megatron's configuration object for ``spec`` at ``layout``."""
    parallel = layout.config
    with_te = device.capabilities().transformer_engine
    is_clamped = spec.parts.activation == "clamped_swiglu"
    return LayerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm,
        add_bias_linear=spec.parts.linear_biases,
        add_qkv_bias=spec.parts.qkv_bias,
        layernorm_zero_centered_gamma=spec.parts.zero_centered_norm,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[spec.parts.activation],
        **({"glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0} if is_clamped else {}),
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
        virtual_pipeline_model_parallel_size=layout.vp_size if layout.vp_size > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.groups.expt_tp.size(),
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        # A workaround for PyTorch releases of 2022: the host would wait for the device after every exchange.
        batch_p2p_sync=False,
        # In a batch two pipeline ranks, each the next and the previous one of the other, would confuse the directions.
        batch_p2p_comm=layout.vp_size == 1,
        overlap_p2p_comm=layout.vp_size > 1,
        moe_token_dispatcher_type=parallel.moe_token_dispatcher,
        moe_flex_dispatcher_backend="deepep",
        calculate_per_token_loss=True,
        # Transformer Engine's rotation has no factor, its MLP no tanh approximation.
        apply_rope_fusion=with_te and attention_factor(spec) == 1,
        bias_activation_fusion=with_te and spec.parts.activation == "silu",
        **_attention_fields(spec),
        **recompute.megatron_fields(),
        **_expert_fields(spec, moe_aux_loss_coeff),
        **_fp8_fields(fp8),
    )


def _attention_fields(spec: ModelSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "rope_attention_factor": attention_factor(spec),
        "sliding_rope": spec.sliding_rope_theta is not None,
        "softmax_type": "learnable" if spec.parts.attention_sinks else "vanilla",
    }
    if spec.query_pre_attn_scalar is not None:
        fields["softmax_scale"] = spec.query_pre_attn_scalar**-0.5
    if spec.sliding_window is not None:
        slides = [int(spec.window_of_layer(layer) is not None) for layer in range(spec.num_layers)]
        fields |= {"window_size": (spec.sliding_window - 1, 0), "window_attn_skip_freq": slides}
    return fields


def _expert_fields(spec: ModelSpec, moe_aux_loss_coeff: float) -> dict[str, Any]:
    if not spec.num_experts:
        return {}
    with_te = device.capabilities().transformer_engine
    return {
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.num_experts_per_tok,
        "moe_ffn_hidden_size": spec.moe_ffn_hidden_size,
        # Softmax over the top-k logits equals softmax over all of them, renormalised over the top-k.
        "moe_router_pre_softmax": not spec.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": moe_aux_loss_coeff,
        # Products of all experts in one call, on several streams; routing, and sorting tokens by expert, in one kernel.
        "moe_grouped_gemm": with_te,
        "moe_permute_fusion": with_te,
        "moe_router_fusion": with_te,
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


def _block_submodules(spec: ModelSpec, layout: Layout) -> TransformerBlockSubmodules:
    experts = spec.num_experts or None
    if device.capabilities().transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        from megatron_s2d.models.te_attention import PackedTEDotProductAttention

        norm = TENorm
        layer = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=experts, moe_grouped_gemm=True, qk_layernorm=spec.qk_norm
        )
        layer.self_attention.submodules.core_attention = PackedTEDotProductAttention
    else:
        norm = RMSNorm
        layer = get_gpt_layer_local_submodules(num_experts=experts, qk_layernorm=spec.qk_norm, normalization="RMSNorm")
        _use_local_modules(layer, spec)
    layer.self_attention.module = CachedSelfAttention
    num_layers = len(layers_of_pp_rank(spec, layout.pp_rank, layout.pp_size, vp_size=layout.vp_size))
    layers = [ModuleSpec(module=TransformerLayer, submodules=layer)] * num_layers
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _use_local_modules(layer: TransformerLayerSubmodules, spec: ModelSpec) -> None:
    attention = layer.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = CoreAttention
    if spec.parts.post_norms:
        attention.linear_proj = NormedRowParallelLinear
        submodules = layer.mlp.keywords["submodules"]
        layer.mlp = partial(layer.mlp, submodules=dataclasses.replace(submodules, linear_fc2=NormedRowParallelLinear))
    if spec.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if spec.num_experts:
        # Transformer Engine does not fuse the norm before a mixture of experts; with the same key in checkpoints, both
        # kinds of layers can load each other's.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
