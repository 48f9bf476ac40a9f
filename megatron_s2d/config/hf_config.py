"""Conversion between the ``config.json`` of Hugging Face models and ``ModelSpec``. No torch, no transformers here.

Reads the published form (``rope_theta`` and ``rope_scaling``) and that of transformers 5 (``rope_parameters``); writes
the published form, which both read. Fields that the model code does not implement (other biases, activations or rope
types) raise an error. What a family has is in ``families.py``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from megatron_s2d.artifacts.files import read_json_object
from megatron_s2d.config.families import FAMILIES, NOT_SUPPORTED, Family
from megatron_s2d.config.model_spec import AnyScaling, LinearScaling, ModelSpec, RopeScaling, YarnScaling
from megatron_s2d.errors import UserError

CONFIG_NAME = "config.json"

# Fields that change the function of a model, with the only values that are implemented unless the family has others.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "decoder_sparse_step": (1, None),
    "mlp_only_layers": ([], None),
    "partial_rotary_factor": (1, 1.0, None),
    "compression_config": (None,),
}


MEGATRON_SPEC_NAME = "model_spec.json"
"""File of a Megatron checkpoint (of ``s2d convert``, or ``model/`` of a stage) that describes its model."""


def is_megatron_checkpoint(directory: Path) -> bool:
    """Return whether ``directory`` is a Megatron checkpoint rather than a Hugging Face directory."""
    return (directory / MEGATRON_SPEC_NAME).is_file()


def published_files(directory: Path) -> Path:
    """Return where tokenizer and ``generation_config.json`` are: a Megatron checkpoint has them in ``hf/``."""
    return directory / "hf" if is_megatron_checkpoint(directory) else directory


def spec_from_directory(directory: str | Path) -> ModelSpec:
    """Return the spec of the ``config.json`` in a Hugging Face directory, or of a Megatron checkpoint."""
    if is_megatron_checkpoint(Path(directory)):
        return ModelSpec.from_dict(read_json_object(Path(directory) / MEGATRON_SPEC_NAME))
    path = Path(directory) / CONFIG_NAME
    if not path.exists():
        snapshots = sorted(Path(directory).glob(f"snapshots/*/{CONFIG_NAME}"))
        hint = f"; did you mean {snapshots[-1].parent}?" if snapshots else ""
        if not Path(directory).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory)):
            hint = f"; if that is a name on the hub: hf download {directory} --local-dir DIR, and give DIR"
        raise UserError(f"{directory}: not a Hugging Face model directory (no config.json){hint}")
    document = read_json_object(path)
    return spec_from_hf_config(document, str(path))


def spec_from_hf_config(document: dict[str, Any], where: str) -> ModelSpec:
    """Return the spec of a ``config.json``'s content; raise ``UserError`` with the unsupported field of ``where``."""
    family = document.get("model_type")
    if isinstance(family, str) and family in NOT_SUPPORTED:
        raise UserError(f"{where}: model_type {family!r} is not supported: {NOT_SUPPORTED[family]}")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not supported (supported: {', '.join(FAMILIES)})")
    parts = FAMILIES[family]
    for key, values in {**_ONLY_VALUES, **parts.config_values}.items():
        if key in document and document[key] not in values:
            raise UserError(f"{where}: {key} {document[key]!r} is not supported (only {values[0]!r})")
    _quantized_block(document, where)
    document = {**parts.defaults, **document}
    hidden_size = _number(document, "hidden_size", where)
    heads = _number(document, "num_attention_heads", where)
    fields: dict[str, Any] = {
        "family": family,
        "num_layers": _number(document, "num_hidden_layers", where),
        "hidden_size": hidden_size,
        "ffn_hidden_size": _number(document, "intermediate_size", where),
        "num_attention_heads": heads,
        "num_query_groups": _number(document, "num_key_value_heads", where, heads),
        "head_dim": _number(document, "head_dim", where, hidden_size // heads),
        "vocab_size": _number(document, "vocab_size", where),
        "max_position_embeddings": _number(document, "max_position_embeddings", where),
        **_attention(document, parts, where),
        "tie_word_embeddings": _flag(document, "tie_word_embeddings", where),
        "norm_eps": _float(document, "rms_norm_eps", where, 1e-6),
        "initializer_range": _float(document, "initializer_range", where, 0.02),
    }
    if parts.has_experts:
        # transformers 5 saves the number of experts under another name.
        key, width = parts.expert_keys
        fields["num_experts"] = _number(document, key if key in document else "num_local_experts", where)
        fields["num_experts_per_tok"] = _number(document, "num_experts_per_tok", where)
        fields["moe_ffn_hidden_size"] = _number(document, width, where)
        fields["norm_topk_prob"] = _flag(document, "norm_topk_prob", where)
    try:
        return ModelSpec(**fields)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('model: ')}") from None


def quantized_block(path: Path) -> tuple[tuple[int, int] | None, str]:
    """Return rows and columns of the blocks of a checkpoint in FP8 (None: not quantised), and the dtype of its values.

    The dtype is a name of safetensors.
    """
    document = read_json_object(path)
    dtype = str(document.get("torch_dtype") or document.get("dtype") or "bfloat16").removeprefix("torch.")
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return _quantized_block(document, str(path)), names.get(dtype, "BF16")


def _quantized_block(document: dict[str, Any], where: str) -> tuple[int, int] | None:
    quantization = document.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "mxfp4" and FAMILIES[document["model_type"]].fused_experts:
        return None  # of the experts' tensors, whose names say so (models/fused_experts.py)
    if method != "fp8":
        raise UserError(f"{where}: quantization_config with method {method!r} is not supported (only fp8 in blocks)")
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise UserError(f"{where}: quantization_config has weight_block_size {block!r}, not [rows, columns]")
    if quantization.get("fmt") not in ("e4m3", None) or quantization.get("scale_fmt") not in ("float", None):
        raise UserError(f"{where}: quantization_config is not of fmt e4m3 with scales in float")
    return block[0], block[1]


def hf_config_from_spec(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """Return the content of ``config.json`` for ``spec``; dtype: for example ``bfloat16``."""
    document: dict[str, Any] = {
        "architectures": [spec.parts.architecture],
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
        kind = next(name for name, kind in _SCALINGS.items() if isinstance(spec.rope_scaling, kind))
        document["rope_scaling"] = {"rope_type": kind, **spec.to_dict()["rope_scaling"]}
    if spec.query_pre_attn_scalar is not None:
        document["query_pre_attn_scalar"] = spec.query_pre_attn_scalar
    if spec.num_experts:
        document |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": spec.norm_topk_prob,
            "num_experts_per_tok": spec.num_experts_per_tok,
            **dict(zip(spec.parts.expert_keys, (spec.num_experts, spec.moe_ffn_hidden_size), strict=True)),
        }
    document |= {**spec.parts.written, **_window_fields(spec)}
    return {key: value for key, value in document.items() if value is not None or key in _NULLABLE}


_SCALINGS = {"llama3": RopeScaling, "yarn": YarnScaling, "linear": LinearScaling}
_NULLABLE = ("rope_scaling", "sliding_window")


def _attention(document: dict[str, Any], parts: Family, where: str) -> dict[str, Any]:
    """Return the fields of the spec on rotation, windows and scale of the attention."""
    fields = _windows(document, parts, where)
    if "query_pre_attn_scalar" in parts.defaults:
        fields["query_pre_attn_scalar"] = _number(document, "query_pre_attn_scalar", where)
    if not parts.sliding_rope:
        return fields | _rope(document, where)
    section = document.get("rope_parameters") or {}
    if not isinstance(section, dict):
        raise UserError(f"{where}: the rope parameters are {section!r}, not an object")
    full, sliding = (section.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    if full or sliding:
        full = {"rope_theta": document["rope_theta"], "rope_parameters": full}
        sliding = {"rope_theta": document["rope_local_base_freq"], "rope_parameters": sliding}
    else:
        full, sliding = document, {"rope_theta": document["rope_local_base_freq"]}
    of_sliding = _rope(sliding, where)
    if of_sliding["rope_scaling"] is not None:
        raise UserError(f"{where}: rope scaling of the layers with a sliding window is not supported")
    if "sliding_window" in fields:
        fields["sliding_rope_theta"] = of_sliding["rope_theta"]
    return fields | _rope(full | {"max_position_embeddings": document.get("max_position_embeddings")}, where)


def _rope(document: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields ``rope_theta`` and ``rope_scaling`` of the spec."""
    section = document.get("rope_parameters") or document.get("rope_scaling") or {}
    if not isinstance(section, dict):
        raise UserError(f"{where}: the rope parameters are {section!r}, not an object")
    scaling = {"rope_theta": document.get("rope_theta")} | {
        key: value for key, value in section.items() if value is not None
    }
    if scaling["rope_theta"] is None:
        raise UserError(f"{where}: rope_theta is missing")
    theta = _float(scaling, "rope_theta", where)
    del scaling["rope_theta"]
    if (factor := scaling.pop("partial_rotary_factor", 1)) != 1:
        raise UserError(f"{where}: partial_rotary_factor {factor!r} is not supported (only 1)")
    if nested := [key for key, value in scaling.items() if isinstance(value, dict)]:
        raise UserError(f"{where}: rope parameters by kind of layer ({nested[0]!r}) are not supported")
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    return {"rope_theta": theta, "rope_scaling": _rope_scaling(kind, scaling, document, where)}


def _rope_scaling(kind: Any, scaling: dict[str, Any], document: dict[str, Any], where: str) -> AnyScaling | None:
    if kind == "default":
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind == "linear" and set(scaling) == {"factor"}:
        return LinearScaling(_positive(scaling, "factor", where))
    if kind == "llama3" and set(scaling) == set(names):
        fields = {name: _float(scaling, name, where) for name in names[:-1]}
        return RopeScaling(**fields, original_max_position_embeddings=_number(scaling, names[-1], where))
    if kind == "yarn" and "factor" in scaling and set(scaling) <= _YARN_FIELDS:
        return _yarn(scaling, document, where)
    raise UserError(
        f"{where}: rope type {kind!r} with {sorted(scaling)} is not supported (only {', '.join(_SCALINGS)} and default)"
    )


_YARN_FIELDS = {
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
    "mscale_all_dim", "truncate",
}  # fmt: skip


def _yarn(scaling: dict[str, Any], document: dict[str, Any], where: str) -> YarnScaling:
    """Return YaRN's settings with the defaults of transformers, the factor of queries and keys computed."""
    factor = _positive(scaling, "factor", where)

    def concentration(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = concentration(1.0)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        above, below = (_float(scaling, name, where) for name in ("mscale", "mscale_all_dim"))
        attention_factor = concentration(above) / concentration(below)
    if "attention_factor" in scaling:
        attention_factor = _positive(scaling, "attention_factor", where)
    positions = _number(document, "max_position_embeddings", where)
    return YarnScaling(
        factor,
        _number(scaling, "original_max_position_embeddings", where, positions),
        _float(scaling, "beta_fast", where, 32.0) or 32.0,
        _float(scaling, "beta_slow", where, 1.0) or 1.0,
        attention_factor,
        truncate=_flag(scaling, "truncate", where) if "truncate" in scaling else True,
    )


def _windows(document: dict[str, Any], parts: Family, where: str) -> dict[str, Any]:
    """Return the fields ``sliding_window`` and ``layer_types`` of the spec."""
    types = _layer_types(document, where)
    if parts.windows == "none" or (parts.windows == "use_sliding_window" and not document.get("use_sliding_window")):
        return {}  # layers of type sliding_attention attend to everything
    if "sliding_window" not in document:
        raise UserError(f"{where}: sliding_window is missing: state it, or null for attention to all positions")
    if document["sliding_window"] is None:
        return {}
    window, layers = _number(document, "sliding_window", where), _number(document, "num_hidden_layers", where)
    if parts.windows == "every_layer":
        if "full_attention" in types:
            raise UserError(f"{where}: layer_types with 'full_attention' beside a sliding_window are not supported")
        return {"sliding_window": window}
    if not types:
        pattern = document.get("sliding_window_pattern") or parts.window_pattern
        first = _number(document, "max_window_layers", where, 28) if not pattern else 0
        slides = [layer >= first if not pattern else (layer + 1) % pattern != 0 for layer in range(layers)]
        types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    if len(types) != layers:
        raise UserError(f"{where}: layer_types has {len(types)} entries for {layers} layers")
    if "sliding_attention" not in types:
        return {}
    return {"sliding_window": window, "layer_types": tuple(types)}


def _window_fields(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of ``config.json`` that state the windows of ``spec``."""
    windows = [spec.window_of_layer(layer) for layer in range(spec.num_layers)]
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if spec.parts.windows == "every_layer":
        return {"sliding_window": spec.sliding_window}
    if spec.parts.windows == "layer_types":
        own = {"rope_local_base_freq": spec.sliding_rope_theta} if spec.parts.sliding_rope else {}
        return {"sliding_window": spec.sliding_window, "layer_types": types, **own}
    if spec.sliding_window is not None:
        return {"use_sliding_window": True, "sliding_window": spec.sliding_window, "layer_types": types}
    return {}


def _layer_types(document: dict[str, Any], where: str) -> list[str]:
    types = document.get("layer_types") or []
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise UserError(f"{where}: layer_types is not a list of names")
    if other := set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{where}: layer_types with {min(other)!r} are not supported (only 'full_attention')")
    return types


def _number(document: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    """Return a positive integer; ``default`` if it is given and the key is missing, null or 0."""
    value = document.get(key) or default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} is {document.get(key)!r}, not a positive integer")
    return value


def _float(document: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = default if document.get(key) is None else document[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} is {document.get(key)!r}, not a number")
    return float(value)


def _positive(document: dict[str, Any], key: str, where: str) -> float:
    value = _float(document, key, where)
    if value <= 0:
        raise UserError(f"{where}: {key} is {value}, not positive")
    return value


def _flag(document: dict[str, Any], key: str, where: str) -> bool:
    value = document.get(key)
    if value not in (True, False, None):
        raise UserError(f"{where}: {key} is {value!r}, neither true nor false")
    return bool(value)
