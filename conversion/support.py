"""Whether a model is supported, told from its ``config.json`` alone. No torch here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_s2d.artifacts.files import read_json_object
from megatron_s2d.config.hf_config import spec_from_hf_config
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import check_layout

_SIZES = (1, 2, 4, 8, 16, 32, 64)


def describe_config(path: str | Path) -> dict[str, Any]:
    """Return what a supported model has: sizes, parts and layouts; raise ``UserError`` with what is not supported."""
    spec = spec_from_hf_config(read_json_object(path), str(path))
    return {
        "supported": True,
        "family": spec.family,
        "num_parameters": spec.num_parameters,
        "num_active_parameters": spec.num_active_parameters,
        "layers": spec.num_layers,
        "parts": _parts(spec),
        "layouts": {
            "tensor_model_parallel_size": _dividing(spec, "tensor_model_parallel_size"),
            "pipeline_model_parallel_size": _dividing(spec, "pipeline_model_parallel_size"),
            "expert_model_parallel_size": _dividing(spec, "expert_model_parallel_size"),
        },
    }


def _parts(spec: ModelSpec) -> dict[str, str]:
    family = spec.parts
    windows = Counter(spec.window_of_layer(layer) for layer in range(spec.num_layers))
    attention = [f"{count} layers to {window or 'all'} positions" for window, count in windows.items()]
    rope = f"theta {spec.rope_theta:g}"
    if spec.rope_scaling is not None:
        rope += f", {type(spec.rope_scaling).__name__} of {spec.rope_scaling.factor:g}"
    if spec.sliding_rope_theta is not None:
        rope += f", in sliding layers theta {spec.sliding_rope_theta:g}"
    present = {
        "attention": ", ".join(attention),
        "rope": rope,
        "biases": _biases(spec),
        "norms": _norms(spec),
        "query_key_norm": "yes" if family.qk_norm else "no",
        "mlp": f"{family.activation}, gated",
        "output_layer": "the embedding" if spec.tie_word_embeddings else "of its own",
    }
    if family.attention_sinks:
        present["attention"] += ", with a sink in each head"
    if spec.num_experts:
        present["experts"] = f"{spec.num_experts}, {spec.num_experts_per_tok} per token"
    return present


def _biases(spec: ModelSpec) -> str:
    if spec.parts.linear_biases:
        return "of all projections, router and experts"
    return "of query, key and value" if spec.parts.qkv_bias else "none"


def _norms(spec: ModelSpec) -> str:
    where = "before and after attention and MLP" if spec.parts.post_norms else "before attention and MLP"
    return where + (", factor 1 + weight" if spec.parts.zero_centered_norm else "")


def _dividing(spec: ModelSpec, name: str) -> list[int]:
    """Return the sizes that divide the model, up to 64."""
    return [size for size in _SIZES if _divides(spec, name, size)]


def _divides(spec: ModelSpec, name: str, size: int) -> bool:
    sequence_parallel = name == "tensor_model_parallel_size" and size > 1
    data = size if name == "expert_model_parallel_size" else 1
    try:
        check_layout(spec, ParallelConfig(**{name: size}, sequence_parallel=sequence_parallel, data_parallel_size=data))
    except UserError:
        return False
    return True
