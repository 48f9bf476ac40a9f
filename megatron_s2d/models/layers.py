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
from typing import Any

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch.nn.attention.varlen import varlen_attn

from megatron_s2d.buffer_sizes import SINK_CHANNELS
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
        return rms_norm(x, self.weight, self.eps, self.zero_centered)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool) -> torch.Tensor:
    """Return ``x`` [..., h] normalised, in its dtype. zero_centered: multiply by 1 + ``weight`` [h]."""
    if not zero_centered:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, 1 + weight.float(), eps).to(x.dtype)


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
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention of ``query`` [s, b, n, d] over ``key`` and ``value`` [s_kv, b, n_kv, d] as [s, b, n * d].

    ``attention_mask`` follows Megatron: boolean [b or 1, 1, s, s_kv], True where a query may NOT look, and complete,
    that is, it contains the causal part too. Without a mask the attention is causal, and the s queries are the last of
    the s_kv positions (so s = 1 sees everything). A query that may look nowhere gets zeros, in value and in gradient.
    window: positions up to its own that a query sees at most, if the s queries are the last of the s_kv positions.
    sinks: [n], the logit of each head that joins the softmax and has no value.
    """
    if sinks is not None:
        return _attend_with_sinks(query, key, value, attention_mask, scale, window, sinks)
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
    if grouped and (allowed is not None or not query.is_cuda):
        # PyTorch's kernels that take a mask take no groups, and on a CPU none does; what it falls back to computes all
        # scores in float32.
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


def _attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scale: float | None,
    window: int | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """See ``attend``.

    A first key scores each head's sink for every query, by channels that are zero in all other keys, and its value is
    zero: any kernel computes the softmax then, and gradients of sinks are those of queries.
    """
    num_queries, batch, num_heads, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    is_sink = (torch.arange(SINK_CHANNELS, device=query.device) == 0).to(query.dtype)
    extra = (sinks.to(query.dtype) / scale)[:, None] * is_sink
    query = torch.cat([query, extra.expand(num_queries, batch, num_heads, SINK_CHANNELS)], dim=-1)
    key, value = (F.pad(tensor, (0, SINK_CHANNELS, 0, 0, 0, 0, 1, 0)) for tensor in (key, value))
    sink_key = F.pad(is_sink, (dim, 0))
    key = torch.cat([sink_key.expand(1, *key.shape[1:]), key[1:]])
    num_keys = key.size(0) - 1
    near = _near(num_queries, num_keys, num_keys if window is None else window, query.device)
    if attention_mask is None:
        hidden = near.logical_not()[None, None]
    else:
        hidden = attention_mask if window is None else attention_mask | near.logical_not()
    output = attend(query, key, value, F.pad(hidden, (1, 0)), scale)
    return output.unflatten(-1, (num_heads, -1))[..., :dim].flatten(-2)


def attend_token(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    allowed: torch.Tensor | None,
    scale: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return the attention of one token of each row: ``queries`` [b, n_kv, n / n_kv, d] over [b, n_kv, s_kv, d].

    allowed: where it may look, [b or 1, 1, 1, s_kv] bool; None: everywhere. sinks: see ``attend``.
    """
    if sinks is None:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, scale=scale)
    scores = (queries @ keys.transpose(2, 3)).float() * (queries.size(3) ** -0.5 if scale is None else scale)
    if allowed is not None:
        scores = scores.masked_fill(allowed.logical_not(), -torch.inf)
    of_sinks = sinks.float().view(1, keys.size(1), -1, 1).expand(len(queries), -1, -1, -1)
    weights = torch.cat([scores, of_sinks], dim=-1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSeqParams,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the causal attention of packed sequences, each over itself: [t, n, d] over [t, n_kv, d] as [t, n * d].

    In half precision on a GPU it is one call of FlashAttention, which reads the boundaries on the device; otherwise,
    and with sinks, one call of ``attend`` for each sequence, which needs them on the host.
    """
    if sinks is None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
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
        attend(query[start:stop, None], key[start:stop, None], value[start:stop, None], None, scale, window, sinks)
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
    """Megatron's core attention computed by ``attend``; its only parameters are attention sinks, if there are any."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, pg_collection=None, **_unused
    ):
        super().__init__(config=config)
        self.scale = softmax_scale
        self.window = window_of_layer(config, layer_number)
        self._cp_group, self._tp_group = pg_collection.cp, pg_collection.tp
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // self._tp_group.size()
            offset = torch.empty(heads, dtype=config.params_dtype, device=device.device())
            self.softmax_offset = torch.nn.Parameter(offset)
            # Without it Megatron would count the gradients of the first tensor rank only in their norm.
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

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
            return attend(query, key, value, attention_mask, self.scale, self.window, self.softmax_offset)
        if cp_size == 1:
            return attend_packed(query, key, value, packed_seq_params, self.scale, self.window, self.softmax_offset)
        on_host = getattr(packed_seq_params, "cu_seqlens_on_host", None)  # train/packed_sequences.py
        return self._attend_across_cp_ranks(
            query, key, value, on_host or tuple(packed_seq_params.cu_seqlens_q.tolist())
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return Megatron's description of this rank's sinks for checkpoints."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
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
                    sinks=self.softmax_offset,
                )
            )
            local_start = local.stop
        return torch.cat(outputs).squeeze(1)
