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

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import RowParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.varlen import varlen_attn

from megatron_s2d.models.layer_config import window_of_layer
from megatron_s2d.parallel import device
from megatron_s2d.parallel.context_parallel import cp_positions


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension [..., h], computed in float32 inside the kernel.

    With ``layernorm_zero_centered_gamma`` the factor is 1 + weight, added in float32.

    With sequence parallelism every tensor-parallel rank normalises other positions, so gradients of the weight must be
    summed over the ranks: Megatron does that for parameters marked ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device.device())
        self.weight.sequence_parallel = config.sequence_parallel
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised ``x`` in its dtype."""
        if not self.zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class NormedRowParallelLinear(RowParallelLinear):
    """Megatron's linear layer with sharded input, whose output is normalised before it joins the residual stream."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_norm = RMSNorm(config, output_size, config.layernorm_epsilon)
        self.added: Callable[[torch.Tensor], torch.Tensor | None] | None = None  # input -> summand before the norm

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the normalised output [..., h], and no bias."""
        output, bias = super().forward(input_)
        assert bias is None
        added = None if self.added is None else self.added(input_)
        if added is not None:
            output = output + added
        return self.post_norm(output), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Return the attention of ``query`` [s, b, n, d] over ``key`` and ``value`` [s_kv, b, n_kv, d] as [s, b, n * d].

    ``attention_mask`` follows Megatron: boolean [b or 1, 1, s, s_kv], True where a query may NOT look, and complete,
    that is, it contains the causal part too. Without a mask the attention is causal, and the s queries are the last of
    the s_kv positions (so s = 1 sees everything). A query that may look nowhere gets zeros, in value and in gradient.
    window: positions up to its own that a query sees at most, if the s queries are the last of the s_kv positions.
    """
    num_queries, num_keys = query.size(0), key.size(0)
    allowed = None
    if attention_mask is not None:
        allowed = attention_mask.logical_not()
    elif 1 < num_queries < num_keys:
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        allowed = allowed.tril(num_keys - num_queries)
    if window is not None and window < num_keys:
        near = _near(num_queries, num_keys, window, query.device)
        allowed = near if allowed is None else allowed & near
    queries, keys, values = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    grouped = query.size(2) != key.size(2)
    if grouped and num_queries == 1:
        # The queries of a group become the rows of one product: it reads keys and values once, with any kernel.
        output = F.scaled_dot_product_attention(
            queries.reshape(key.size(1), key.size(2), -1, query.size(3)), keys, values, attn_mask=allowed, scale=scale
        )
        return output.reshape(1, query.size(1), -1)
    if grouped and allowed is not None and query.is_cuda:
        # PyTorch's kernels that take a mask take no groups; what it falls back to computes all scores in float32.
        keys, values = (tensor.repeat_interleave(query.size(2) // key.size(2), dim=1) for tensor in (keys, values))
        grouped = False
    output = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=allowed,
        is_causal=allowed is None and num_queries > 1,
        scale=scale,
        enable_gqa=grouped,
    )
    return output.permute(2, 0, 1, 3).reshape(num_queries, query.size(1), -1)


def _near(num_queries: int, num_keys: int, window: int, where: torch.device) -> torch.Tensor:
    """Return where keys are not after the query and in its window, [s, s_kv] bool; the queries are the last keys."""
    keys = torch.arange(num_keys, device=where)
    queries = keys[num_keys - num_queries :, None]
    return (keys <= queries) & (keys > queries - window)


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSeqParams,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Return the causal attention of packed sequences, each over itself: [t, n, d] over [t, n_kv, d] as [t, n * d].

    In half precision on a GPU it is one call of FlashAttention, which reads the boundaries on the device; otherwise
    one call of ``attend`` for each sequence, which needs them on the host.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        output = varlen_attn(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
        )
        return output.flatten(1)
    cu_seqlens = packed.cu_seqlens_q.tolist()
    if cu_seqlens[-1] != query.size(0):
        raise ValueError(f"packed sequences end at {cu_seqlens[-1]}, but there are {query.size(0)} tokens")
    outputs = [
        attend(query[start:stop, None], key[start:stop, None], value[start:stop, None], None, scale, window)
        for start, stop in itertools.pairwise(cu_seqlens)
    ]
    return torch.cat(outputs).squeeze(1)


@functools.lru_cache(maxsize=8)
def _positions_and_order(cu_seqlens: tuple[int, ...], cp_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions [cp_size, t] of the tokens of each CP rank, and the order that sorts all of them.

    The layers of a micro-batch share them: a copy to the device in each would cost a wait for it.
    """
    positions = torch.from_numpy(cp_positions(list(cu_seqlens), cp_size))
    return device.copy_to_device(positions), device.copy_to_device(positions.flatten().argsort())


class CoreAttention(MegatronModule):
    """Megatron's core attention computed by ``attend``; it has no parameters."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, pg_collection=None, **_unused
    ):
        super().__init__(config=config)
        self.scale = softmax_scale
        self.window = window_of_layer(config, layer_number)
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
            return attend(query, key, value, attention_mask, self.scale, self.window)
        if cp_size == 1:
            return attend_packed(query, key, value, packed_seq_params, self.scale, self.window)
        on_host = getattr(packed_seq_params, "cu_seqlens_on_host", None)  # train/packed_sequences.py
        return self._attend_across_cp_ranks(
            query, key, value, on_host or tuple(packed_seq_params.cu_seqlens_q.tolist())
        )

    def _attend_across_cp_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: tuple[int, ...]
    ) -> torch.Tensor:
        """Attend to the keys of all CP ranks; gradients return to the ranks of keys and values."""
        cp_size = self._cp_group.size()
        if cu_seqlens[-1] != query.size(0) * cp_size:
            num_tokens = query.size(0) * cp_size
            raise ValueError(f"packed sequences end at {cu_seqlens[-1]}, but there are {num_tokens} tokens")
        positions, order = _positions_and_order(cu_seqlens, cp_size)
        keys, values = (
            gather_from_sequence_parallel_region(local, group=self._cp_group)[order] for local in (key, value)
        )
        query_positions = positions[self._cp_group.rank()]
        outputs, local_start = [], 0
        for start, stop in itertools.pairwise(cu_seqlens):
            local = slice(local_start, local_start + (stop - start) // cp_size)
            key_positions, own = torch.arange(start, stop, device=query.device), query_positions[local, None]
            mask = key_positions > own
            if self.window is not None:
                mask |= key_positions <= own - self.window
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
