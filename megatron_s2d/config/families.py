"""The table of model families: what all models of a family have in common. No other file asks for a family's name.

Everything else follows from the row: the layers (``models/build.py``), the weights and their shards
(``models/families.py``), the ``config.json`` (``hf_config.py``), counts and estimates. A family of known parts is one
row here and a model in the tests (CONTRIBUTING.md, "A model family"). What differs between models of one family is in
``ModelSpec``. No torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
"""Of the gate in an MLP, which is ``activation(gate) * up``; ``gelu_tanh`` is the tanh approximation of GELU.

``clamped_swiglu``: gate' sigmoid(1.702 gate') (up' + 1), where gate' is at most 7 and up' within [-7, 7] (GPT-OSS).
"""

Windows = Literal["none", "every_layer", "use_sliding_window", "layer_types"]
"""How ``config.json`` states sliding windows.

``every_layer``: ``sliding_window`` is that of all layers, or null. ``use_sliding_window``: the flag switches the
windows of ``layer_types`` on, by default those from layer ``max_window_layers`` on. ``layer_types``: always as these
say, by default all but each ``window_pattern``-th layer.
"""

Name = Literal["qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "gemma3_text", "gpt_oss", "seed_oss"]


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table; ``model_type`` of a ``config.json`` is its key."""

    architecture: str
    """Class in transformers that computes a model's logits."""
    activation: Activation = "silu"
    qk_norm: bool = False
    """Whether queries and keys are normalised per head."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases."""
    linear_biases: bool = False
    """Whether all projections have biases: of attention, its output, router and experts."""
    attention_sinks: bool = False
    """Whether every head has a learned logit that joins the softmax of its scores and has no value."""
    zero_centered_norm: bool = False
    """Whether norms multiply by 1 + weight."""
    post_norms: bool = False
    """Whether the outputs of attention and MLP are normalised before they are added to the residual stream."""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size), rounded to their dtype."""
    has_experts: bool = False
    """Whether the MLP of every layer is a mixture of experts, routed by a softmax over the top-k logits."""
    router_name: str = "gate"
    """Of the router among a layer's tensors, ``mlp.NAME.weight``."""
    fused_experts: bool = False
    """Whether files have the experts of a layer in one tensor, [e, in, out], gate and up channel by channel in turn."""
    expert_keys: tuple[str, str] = ("num_experts", "moe_intermediate_size")
    """Fields of ``config.json`` with the number of experts and the width of one."""
    windows: Windows = "none"
    window_pattern: int = 0
    sliding_rope: bool = False
    """Whether layers with a window rotate by a base of their own, ``rope_local_base_freq``."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What transformers assumes for fields that a ``config.json`` leaves out, where families differ."""
    config_values: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Fields of ``config.json`` and the only values that are implemented, beside those of all families."""
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields that are written to ``config.json`` beside the common ones; None leaves a common one out."""


FAMILIES: dict[str, Family] = {
    "qwen2": Family(  # Qwen2 and Qwen2.5
        "Qwen2ForCausalLM",
        qkv_bias=True,
        windows="use_sliding_window",
        config_values={"attention_bias": (True, None)},
        written={"attention_bias": None, "use_sliding_window": False},
    ),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, windows="use_sliding_window"),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        has_experts=True,
        config_values={"use_sliding_window": (False, None)},
    ),
    "llama": Family("LlamaForCausalLM", config_values={"use_sliding_window": (False, None)}),
    "mistral": Family("MistralForCausalLM", windows="every_layer", written={"attention_bias": None}),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        activation="gelu_tanh",
        qk_norm=True,
        zero_centered_norm=True,
        post_norms=True,
        scaled_embedding=True,
        windows="layer_types",
        window_pattern=6,
        sliding_rope=True,
        defaults={
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 1e4,
            "rope_theta": 1e6,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        config_values={
            "hidden_act": ("gelu_pytorch_tanh", None),
            "hidden_activation": ("gelu_pytorch_tanh", None),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        written={"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        activation="clamped_swiglu",
        qkv_bias=True,
        linear_biases=True,
        attention_sinks=True,
        has_experts=True,
        router_name="router",
        fused_experts=True,
        expert_keys=("num_local_experts", "intermediate_size"),
        windows="layer_types",
        window_pattern=2,
        defaults={"head_dim": 64, "norm_topk_prob": True, "rms_norm_eps": 1e-5, "sliding_window": 128},
        config_values={"attention_bias": (True, None), "swiglu_limit": (7.0, None), "norm_topk_prob": (True,)},
        written={
            "attention_bias": True,
            "decoder_sparse_step": None,
            "mlp_only_layers": None,
            "norm_topk_prob": None,
            "swiglu_limit": 7.0,
        },
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        qkv_bias=True,
        config_values={"attention_bias": (True, None), "attention_out_bias": (False, None)},
        written={"attention_bias": True, "attention_out_bias": False, "residual_dropout": 0.0},
    ),
}

assert set(FAMILIES) == set(get_args(Name))

_DELTA_NET = "Megatron-Core 0.19.2 runs its gated delta net with kernels of flash-linear-attention for CUDA only"
NOT_SUPPORTED = {
    "qwen3_next": _DELTA_NET,
    "qwen3_5": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET,
    "gemma2": "Megatron-Core 0.19.2 has no soft-capped attention scores and logits",
    "gemma3": "it is a model of images and text: save its language model by itself, as gemma3_text",
}
"""Reasons, by ``model_type``, that are worth more than the list of what is supported."""
