"""Transformer Engine's attention with support for explicit masks; import only where Transformer Engine is usable.

With a causal mask type Transformer Engine ignores a mask tensor, so left-padded batches would attend to padding; calls
with a mask go to ``attend`` instead.
"""

from __future__ import annotations

from megatron_s2d.models.layers import attend

from megatron.core.extensions.transformer_engine import TEDotProductAttention  # isort: skip


class MaskedTEDotProductAttention(TEDotProductAttention):
    """Fused attention for causal and packed calls, ``attend`` for calls with a mask."""

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None):
        """See ``CoreAttention.forward``."""
        if attention_mask is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        if self.config.context_parallel_size > 1 or packed_seq_params is not None:
            raise NotImplementedError("an explicit mask cannot be combined with packing or context parallelism")
        return attend(query, key, value, attention_mask, self.config.softmax_scale)
