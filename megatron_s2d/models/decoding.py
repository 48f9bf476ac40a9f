"""One forward pass over one new token of each row, without what Megatron's modules do for training.

The same weights, matrix products and collectives as in ``GPTModel.forward``: linear layers and the output layer are
called as modules. Residuals, norms, rotation, the cache and the activation between them are fused where
Triton is usable (``decode_kernels``). In buffers of fixed size nothing depends on numbers of the host, and a CUDA graph
of it can be replayed.

Shapes: b rows, h hidden size, v_tp local vocabulary.
"""

from __future__ import annotations

from types import ModuleType

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP

from megatron_s2d.kl.chunk import triton_problem
from megatron_s2d.models.batched_experts import BatchedExperts
from megatron_s2d.models.kv_cache import KeyValueCache
from megatron_s2d.models.layers import RMSNorm
from megatron_s2d.models.packed_weights import PackedProduct
from megatron_s2d.parallel import device

_LINEAR = (ColumnParallelLinear, RowParallelLinear)


def decode_kernels() -> ModuleType | None:
    """Return the fused kernels for this rank's device; None: PyTorch's operations."""
    if not device.capabilities().cuda or triton_problem():
        return None
    from megatron_s2d.models import decode_kernels as kernels

    return kernels


def decode(
    chunk: GPTModel, token_ids: torch.Tensor | None, hidden: torch.Tensor | None, cache: KeyValueCache,
    kernels: ModuleType | None, experts: BatchedExperts | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return logits [b, v_tp] of the last pipeline stage, hidden states [1, b, h] of the others.

    token_ids: [b] int64, for the first pipeline stage. hidden: [1, b, h], for the others. The prompts must have been
    run through ``chunk`` with the same ``cache``. experts: runs the experts of all layers; None: the layers do.
    """
    if chunk.pre_process:
        hidden = chunk.embedding(token_ids.unsqueeze(1), None)
    delta = None  # what the last block adds to the hidden states
    for layer in chunk.decoder.layers:
        normed, hidden = _add_and_norm(layer.input_layernorm, delta, hidden, kernels)
        delta = _attention(layer.self_attention, normed, cache, kernels)
        normed, hidden = _add_and_norm(layer.pre_mlp_layernorm, delta, hidden, kernels)
        delta = _mlp(layer.mlp, normed, kernels, experts)
    if not chunk.post_process:
        return hidden if delta is None else hidden + delta
    normed, _ = _add_and_norm(chunk.decoder.final_layernorm, delta, hidden, kernels)
    weight = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
    logits, _ = chunk.output_layer(normed, weight=weight, runtime_gather_output=False)
    return logits[0]


def _linear(module: torch.nn.Module, input: torch.Tensor) -> torch.Tensor:
    """Return the output of a linear layer; of one that nothing surrounds, without Megatron's functions around it."""
    product = vars(module).get("_forward_impl")
    is_plain = type(module) in _LINEAR and not module._forward_hooks  # no norm, no adapter
    if is_plain and type(product) is PackedProduct and module.tp_group.size() == 1:
        return product.multiply(input, module.bias)
    output, bias = module(input)
    return output if bias is None else output + bias


def _add_and_norm(
    norm: torch.nn.Module, delta: torch.Tensor | None, hidden: torch.Tensor, kernels: ModuleType | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``norm(hidden + delta)`` and ``hidden + delta``."""
    if delta is not None:
        if kernels is not None and isinstance(norm, RMSNorm):
            return kernels.add_rms_norm(delta, hidden, norm.weight, norm.eps, norm.zero_centered)
        hidden = hidden + delta
    return norm(hidden), hidden


def _attention(
    attention: SelfAttention, normed: torch.Tensor, cache: KeyValueCache, kernels: ModuleType | None
) -> torch.Tensor:
    config, number = attention.config, attention.layer_number
    # With fewer key heads than tensor ranks, Megatron gathers queries and takes this rank's share.
    if kernels is None or config.num_query_groups < attention.world_size:
        query = _store(attention, normed, cache)
    else:
        qkv, _ = attention.linear_qkv(normed)
        norms = (attention.q_layernorm, attention.k_layernorm) if config.qk_layernorm else None
        query = kernels.norm_rotate_store(
            qkv,
            None if norms is None else (norms[0].weight, norms[1].weight),
            config.layernorm_epsilon,
            cache.cos_sin(number),
            cache.lengths,
            cache.column,
            *cache.buffers(number),
            attention.num_attention_heads_per_partition,
            config.layernorm_zero_centered_gamma,
        )
    sinks = getattr(attention.core_attention, "softmax_offset", None)
    return _linear(attention.linear_proj, cache.attend(number, query, config.softmax_scale, sinks))


def _store(attention: SelfAttention, normed: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """Append keys and values of one token to the cache; return its queries for ``cache.attend``."""
    config, number = attention.config, attention.layer_number
    if config.num_query_groups < attention.world_size or config.qk_layernorm or not cache.stores_fused:
        query, key, value = attention.get_query_key_value_tensors(normed)
        return cache.store(number, query, key, value)
    shape = (attention.num_query_groups_per_partition, -1, attention.hidden_size_per_attention_head)
    return cache.store_fused(number, _linear(attention.linear_qkv, normed).unflatten(-1, shape))


def _mlp(
    mlp: torch.nn.Module, normed: torch.Tensor, kernels: ModuleType | None, experts: BatchedExperts | None
) -> torch.Tensor:
    if type(mlp) is not MLP:
        return mlp(normed)[0] if experts is None else experts.run(mlp, normed)
    gate_up = _linear(mlp.linear_fc1, normed)
    activation = mlp.config.activation_func
    if kernels is not None and activation is F.silu:
        activated = kernels.swiglu(gate_up)
    else:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = activation(gate) * up
    return _linear(mlp.linear_fc2, activated)
