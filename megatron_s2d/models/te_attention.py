"""Transformer Engine's attention for packed sequences; import only where Transformer Engine is usable.

Other calls go to ``attend``. With a causal mask type Transformer Engine ignores a mask tensor, so left-padded batches
would attend to padding. And cuDNN, which computes its unpacked attention, builds a plan for every new pair of batch
size and length, which takes half a second: there is one in every padded micro-batch and every decoded token.
"""

from __future__ import annotations

import megatron_s2d.parallel.plain_functions  # noqa: F401

from megatron_s2d.models.layer_config import window_of_layer
from megatron_s2d.models.layers import attend

from megatron.core.extensions.transformer_engine import TEDotProductAttention  # isort: skip


class PackedTEDotProductAttention(TEDotProductAttention):
    """Transformer Engine's attention for packed sequences, ``attend`` for all others."""

    def __init__(self, config, layer_number, *args, **kwargs):
        super().__init__(config, layer_number, *args, **kwargs)
        self._window = window_of_layer(config, layer_number)

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None):
        """See ``CoreAttention.forward``."""
        if packed_seq_params is not None:
            if attention_mask is not None:
                raise NotImplementedError("an explicit mask cannot be combined with packed sequences")
            return super().forward(query, key, value, None, attn_mask_type, attention_bias, packed_seq_params)
        if self.config.context_parallel_size > 1:
            raise NotImplementedError("context parallelism needs packed sequences")
        return attend(query, key, value, attention_mask, self.config.softmax_scale, self._window)
