"""Layers in plain PyTorch that replace Megatron's own where Transformer Engine is not usable: attention and RMSNorm.

Megatron's local core attention repeats keys and values for grouped queries, materialises all scores in a global buffer,
and refuses packed sequences; ``CoreAttention`` runs PyTorch's ``scaled_dot_product_attention`` instead, with grouped
queries, explicit masks, packing and context parallelism. Storing keys and values for decoding is left to ``kv_cache``.
Transformer Engine passes keys and values around the ring of context-parallel ranks; here every rank gathers all of
them.

Shapes: b batch, s query positions, s_kv key positions, t packed tokens, n query heads, n_kv key/value heads, d
head_dim, h hidden size.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from megatron_s2d.parallel import device
from megatron_s2d.parallel.context_parallel import cp_positions

device.patch_megatron_for_cpu()

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension [..., h], computed in float32 inside the kernel.

    With sequence parallelism every tensor-parallel rank normalises other positions, so gradients of the weight must be
    summed over the ranks: Megatron does that for parameters marked ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device.device())
        self.weight.sequence_parallel = config.sequence_parallel


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return the attention of ``query`` [s, b, n, d] over ``key`` and ``value`` [s_kv, b, n_kv, d] as [s, b, n * d].

    ``attention_mask`` follows Megatron: boolean [b or 1, 1, s, s_kv], True where a query may NOT look, and complete,
    that is, it contains the causal part too. Without a mask the attention is causal, and the s queries are the last of
    the s_kv positions (so s = 1 sees everything). A query that may look nowhere gets zeros, in value and in gradient.
    """
    num_queries, num_keys = query.size(0), key.size(0)
    allowed = None
    if attention_mask is not None:
        allowed = attention_mask.logical_not()
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
    """Megatron's core attention computed by ``attend``; it has no parameters."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, pg_collection=None, **_unused
    ):
        super().__init__(config=config)
        self.scale = softmax_scale
        self._cp_group = pg_collection.cp

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
        """See ``attend``; the shapes imply ``attn_mask_type``.

        With ``packed_seq_params`` (``thd``) the tensors are [t, n or n_kv, d] of several sequences laid end to end, and
        each sequence attends to itself only; with context parallelism they are this rank's slice of each sequence.
        """
        if attention_bias is not None:
            raise NotImplementedError("attention_bias is not supported")
        cp_size = self._cp_group.size()
        if packed_seq_params is None:
            if cp_size > 1:
                raise NotImplementedError("context parallelism needs packed sequences")
            return attend(query, key, value, attention_mask, self.scale)
        cu_seqlens = packed_seq_params.cu_seqlens_q.tolist()
        if cu_seqlens[-1] != query.size(0) * cp_size:
            num_tokens = query.size(0) * cp_size
            raise ValueError(f"packed sequences end at {cu_seqlens[-1]}, but there are {num_tokens} tokens")
        if cp_size > 1:
            return self._attend_across_cp_ranks(query, key, value, cu_seqlens)
        outputs = [
            attend(query[start:stop, None], key[start:stop, None], value[start:stop, None], None, self.scale)
            for start, stop in itertools.pairwise(cu_seqlens)
        ]
        return torch.cat(outputs).squeeze(1)

    def _attend_across_cp_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: list[int]
    ) -> torch.Tensor:
        """Attend to the keys of all CP ranks; gradients return to the ranks of keys and values."""
        cp_size = self._cp_group.size()
        positions = torch.from_numpy(cp_positions(cu_seqlens, cp_size)).to(query.device)
        order = positions.flatten().argsort()
        keys, values = (
            gather_from_sequence_parallel_region(local, group=self._cp_group)[order] for local in (key, value)
        )
        query_positions = positions[self._cp_group.rank()]
        outputs, local_start = [], 0
        for start, stop in itertools.pairwise(cu_seqlens):
            local = slice(local_start, local_start + (stop - start) // cp_size)
            mask = torch.arange(start, stop, device=query.device) > query_positions[local, None]
            outputs.append(
                attend(
                    query[local, None],
                    keys[start:stop, None],
                    values[start:stop, None],
                    mask[None, None],
                    self.scale,
                )
            )
            local_start = local.stop
        return torch.cat(outputs).squeeze(1)
