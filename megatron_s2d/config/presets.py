"""Model sizes by name: the numbers of the published ``config.json`` files, and tiny models that train on a CPU.

Each entry holds fields of ``ModelSpec``. The tiny presets leave ``vocab_size`` out: it comes from the tokenizer. Their
weights start wider than a large model's (``initializer_range``), because 0.02 leaves a 48-wide network almost linear.
"""

from __future__ import annotations

from typing import Any


def _qwen3(**fields: Any) -> dict[str, Any]:
    return {
        "family": "qwen3",
        "num_query_groups": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        **fields,
    }


def _llama(rope_factor: float, **fields: Any) -> dict[str, Any]:
    return {
        "family": "llama",
        "num_query_groups": 8,
        "head_dim": fields["hidden_size"] // fields["num_attention_heads"],
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "rope_scaling": {
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "norm_eps": 1e-5,
        **fields,
    }


def _tiny(family: str, hidden_size: int, num_layers: int, num_heads: int, **fields: Any) -> dict[str, Any]:
    return {
        "family": family,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 4 * hidden_size,
        "num_attention_heads": num_heads,
        "num_query_groups": num_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": 512,
        "rope_theta": 1e4,
        "initializer_range": 0.08,
        **fields,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(
        num_layers=28, hidden_size=1024, ffn_hidden_size=3072, num_attention_heads=16, tie_word_embeddings=True
    ),
    "qwen3-1.7b": _qwen3(
        num_layers=28, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=16, tie_word_embeddings=True
    ),
    "qwen3-4b": _qwen3(
        num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32, tie_word_embeddings=True
    ),
    "qwen3-8b": _qwen3(num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32),
    "qwen3-14b": _qwen3(num_layers=40, hidden_size=5120, ffn_hidden_size=17408, num_attention_heads=40),
    "qwen3-30b-a3b": _qwen3(
        family="qwen3_moe",
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
        num_query_groups=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_ffn_hidden_size=768,
    ),
    "llama-3.1-8b": _llama(8.0, num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32),
    "llama-3.2-1b": _llama(
        32.0, num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=32, tie_word_embeddings=True
    ),
    "llama-3.3-70b": _llama(8.0, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64),
    "tiny-teacher": _tiny("qwen3", 96, 2, 4, ffn_hidden_size=256),
    "tiny-student": _tiny("qwen3", 48, 2, 2, ffn_hidden_size=128),
    "small-teacher": _tiny("qwen3", 128, 4, 4),
    "tiny-llama": _tiny(
        "llama",
        64,
        2,
        4,
        num_query_groups=2,
        tie_word_embeddings=True,
        norm_eps=1e-5,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "tiny-moe": _tiny(
        "qwen3_moe",
        64,
        2,
        4,
        num_query_groups=2,
        head_dim=24,
        num_experts=4,
        num_experts_per_tok=2,
        moe_ffn_hidden_size=64,
    ),
    "tiny-qwen2": _tiny("qwen2", 64, 2, 4, num_query_groups=2, tie_word_embeddings=True),
    "tiny-gemma3": _tiny(
        "gemma3_text",
        64,
        2,
        4,
        num_query_groups=2,
        head_dim=24,
        tie_word_embeddings=True,
        sliding_window=16,
        layer_types=("sliding_attention", "full_attention"),
        sliding_rope_theta=1e3,
        query_pre_attn_scalar=20,
    ),
    "tiny-gpt-oss": _tiny(
        "gpt_oss",
        64,
        2,
        4,
        num_query_groups=2,
        head_dim=16,
        ffn_hidden_size=32,
        moe_ffn_hidden_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        layer_types=("sliding_attention", "full_attention"),
        rope_scaling={
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 1.2079441541679836,
            "truncate": False,
        },
        norm_eps=1e-5,
    ),
    "tiny-mistral": _tiny("mistral", 64, 2, 4, num_query_groups=2, head_dim=24, sliding_window=16, norm_eps=1e-5),
}
