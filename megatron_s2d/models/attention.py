"""Attention over PyTorch's ``scaled_dot_product_attention``: grouped queries, explicit masks, packing, context ranks.

It takes the place of Megatron's local core attention, which repeats keys and values for grouped queries, materialises
all scores in a global buffer, and refuses packed sequences. Keeping keys and values is left to ``kv_cache``, and
passing them from context rank to context rank while they are used to Transformer Engine: here all are gathered first.

Dimensions: S query positions, T key positions, B batch, H query heads, G key/value heads, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_s2d.parallel import device
from megatron_s2d.parallel.context_parallel import cp_positions

device.patch_megatron_for_cpu()

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masked: torch.Tensor | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of ``query`` [S, B, H, D] over ``key`` and ``value`` [T, B, G, D]; returns [S, B, H * D].

    ``masked`` is Megatron's convention: boolean, True where a query may NOT look, [B or 1, 1, S, T], and complete, that
    is, it contains the causal part too. Without it the attention is causal, the S queries being the last of the T
    positions (so S = 1 sees everything). A query that may look nowhere gets zeros, in value and in gradient.
    """
    num_queries, num_keys = query.size(0), key.size(0)
    allowed = None
    if masked is not None:
        allowed = masked.logical_not()
    elif 1 < num_queries < num_keys:
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        allowed = allowed.tril(num_keys - num_queries)
    output = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=allowed,
        is_causal=allowed is None and num_queries > 1,
        scale=scale,
        enable_gqa=query.size(2) != key.size(2),
    )
    return output.permute(2, 0, 1, 3).reshape(num_queries, query.size(1), -1)


class CoreAttention(MegatronModule):
    """Megatron core attention in the terms of ``attend``; has no parameters."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, pg_collection=None, **_unused
    ):
        super().__init__(config=config)
        self.scale = softmax_scale
        self._context = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type=None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """See ``attend``. ``attn_mask_type`` is implied by the shapes. With ``packed_seq_params`` (``thd``) the tensors
        are [tokens, heads, D] of several sequences laid end to end, and each sequence attends to itself only; with
        context parallelism they are this rank's part of each."""
        if attention_bias is not None:
            raise NotImplementedError("attention_bias is not supported")
        ranks = self._context.size()
        if packed_seq_params is None:
            if ranks > 1:
                raise NotImplementedError("context parallelism needs packed sequences")
            return attend(query, key, value, attention_mask, self.scale)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        if bounds[-1] != query.size(0) * ranks:
            raise ValueError(f"packed sequences end at {bounds[-1]}, but there are {query.size(0) * ranks} tokens")
        if ranks > 1:
            return self._attend_across_ranks(query, key, value, bounds)
        parts = [
            attend(query[a:b, None], key[a:b, None], value[a:b, None], None, self.scale)
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        return torch.cat(parts).squeeze(1)

    def _attend_across_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int]
    ) -> torch.Tensor:
        """The queries of this context rank over the keys of all; gradients of keys and values go back to their ranks."""
        held = torch.from_numpy(cp_positions(bounds, self._context.size())).to(query.device)
        order = held.flatten().argsort()
        keys, values = (gather_from_sequence_parallel_region(part, group=self._context)[order] for part in (key, value))
        places = held[self._context.rank()]
        parts, begin = [], 0
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            own = slice(begin, begin + (b - a) // self._context.size())
            masked = torch.arange(a, b, device=query.device) > places[own, None]
            parts.append(attend(query[own, None], keys[a:b, None], values[a:b, None], masked[None, None], self.scale))
            begin = own.stop
        return torch.cat(parts).squeeze(1)
