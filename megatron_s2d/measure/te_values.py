"""Values that Transformer Engine's kernels would compute and the host reads, beside those of PyTorch's operators.

Its functions are called through its own module, not through PyTorch's dispatcher, so ``HostValues`` does not see them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from megatron_s2d.measure.host_values import on_host


def spread_tokens_over_experts() -> None:
    """Make the fused router choose experts as ``HostValues`` does: distinct for a token, and all equally often."""
    extension = importlib.import_module("transformer_engine_torch")
    route = extension.fused_topk_with_score_function_fwd

    @functools.wraps(route)
    def balanced(logits: torch.Tensor, top_k: int, *args: Any) -> tuple[torch.Tensor, ...]:
        result = route(logits, top_k, *args)
        chosen = on_host(result[1])  # [t, e] bool
        num_tokens, num_experts = chosen.shape
        experts = (torch.arange(num_tokens)[:, None] * top_k + torch.arange(top_k)) % num_experts
        chosen.zero_().scatter_(1, experts, 1)
        return result

    extension.fused_topk_with_score_function_fwd = balanced
