"""Megatron's configuration of a model with the settings of layers that it lacks, and a layer's sliding window."""

from __future__ import annotations

import dataclasses

import megatron_s2d.parallel.plain_functions  # noqa: F401

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention


@dataclasses.dataclass
class LayerConfig(TransformerConfig):
    """``TransformerConfig`` of the models that ``build.py`` makes."""

    rope_attention_factor: float = 1.0
    """Factor of rotated queries and keys (YaRN)."""

    sliding_rope: bool = False
    """Whether the rotary table has second columns, for the layers with a sliding window."""


def window_of_layer(config: TransformerConfig, layer_number: int) -> int | None:
    """Return the positions that a token attends to, its own included; None: all. layer_number counts from 1."""
    if config.window_size is None or not is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    ):
        return None
    return config.window_size[0] + 1
