"""Conversion between the ``config.json`` of Hugging Face models and ``ModelSpec``. No torch, no transformers here.

Reads the published form (``rope_theta`` and ``rope_scaling``) and that of transformers 5 (``rope_parameters``); writes
the published form, which both read. Fields that the model code does not implement (attention biases, sliding windows,
other activations or rope types) raise an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_s2d.config.model_spec import ModelSpec, RopeScaling
from megatron_s2d.errors import UserError

_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "llama": "LlamaForCausalLM"}

# Fields that change the function of a model, with the only values that are implemented.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
}


def spec_from_directory(directory: str | Path) -> ModelSpec:
    """Return the spec of the ``config.json`` in a Hugging Face directory."""
    path = Path(directory) / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory}: not a Hugging Face model directory (no config.json)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object")
    return spec_from_hf_config(document, str(path))


def spec_from_hf_config(document: dict[str, Any], where: str) -> ModelSpec:
    """Return the spec of a ``config.json``'s content; raise ``UserError`` with the unsupported field of ``where``."""
    family = document.get("model_type")
    if family not in _ARCHITECTURES:
        raise UserError(f"{where}: model_type {family!r} is not supported (supported: {', '.join(_ARCHITECTURES)})")
    for key, values in _ONLY_VALUES.items():
        if key in document and document[key] not in values:
            raise UserError(f"{where}: {key} {document[key]!r} is not supported (only {values[0]!r})")
    rope = _rope(document, where)
    hidden_size = _number(document, "hidden_size", where)
    heads = _number(document, "num_attention_heads", where)
    fields: dict[str, Any] = {
        "family": family,
        "num_layers": _number(document, "num_hidden_layers", where),
        "hidden_size": hidden_size,
        "ffn_hidden_size": _number(document, "intermediate_size", where),
        "num_attention_heads": heads,
        "num_query_groups": document.get("num_key_value_heads") or heads,
        "head_dim": document.get("head_dim") or hidden_size // heads,
        "vocab_size": _number(document, "vocab_size", where),
        "max_position_embeddings": _number(document, "max_position_embeddings", where),
        "rope_theta": float(rope.pop("rope_theta")),
        "rope_scaling": RopeScaling(**rope) if rope else None,
        "tie_word_embeddings": bool(document.get("tie_word_embeddings", False)),
        "norm_eps": float(document.get("rms_norm_eps", 1e-6)),
        "initializer_range": float(document.get("initializer_range", 0.02)),
    }
    if family == "qwen3_moe":
        # transformers 5 saves the number of experts under another name.
        key = "num_experts" if "num_experts" in document else "num_local_experts"
        fields["num_experts"] = _number(document, key, where)
        fields["num_experts_per_tok"] = _number(document, "num_experts_per_tok", where)
        fields["moe_ffn_hidden_size"] = _number(document, "moe_intermediate_size", where)
        fields["norm_topk_prob"] = bool(document.get("norm_topk_prob", False))
    try:
        return ModelSpec(**fields)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('model: ')}") from None


def hf_config_from_spec(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """Return the content of ``config.json`` for ``spec``; dtype: for example ``bfloat16``."""
    document: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": spec.initializer_range,
        "intermediate_size": spec.ffn_hidden_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_query_groups,
        "rms_norm_eps": spec.norm_eps,
        "rope_scaling": None,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    if spec.rope_scaling is not None:
        document["rope_scaling"] = {"rope_type": "llama3", **spec.to_dict()["rope_scaling"]}
    if spec.num_experts:
        document |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": spec.moe_ffn_hidden_size,
            "norm_topk_prob": spec.norm_topk_prob,
            "num_experts": spec.num_experts,
            "num_experts_per_tok": spec.num_experts_per_tok,
        }
    return document


def _rope(document: dict[str, Any], where: str) -> dict[str, Any]:
    """Return ``rope_theta``, and for Llama 3's scaling also the fields of ``RopeScaling``."""
    scaling = dict(document.get("rope_parameters") or document.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", document.get("rope_theta"))
    if theta is None:
        raise UserError(f"{where}: rope_theta is missing")
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if kind == "default":
        return {"rope_theta": theta}
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3" or set(scaling) != set(names):
        raise UserError(f"{where}: rope type {kind!r} with {sorted(scaling)} is not supported (only llama3)")
    return {"rope_theta": theta, **{name: scaling[name] for name in names}}


def _number(document: dict[str, Any], key: str, where: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}, not an integer")
    return value
