"""Tokens of experts whose numbers the host knows before the pass, because all choices of the pass are replayed.

NCCL's all-to-all and the products of the experts take their sizes from the host. Megatron-Core's dispatcher copies them
from the device in every layer, and the host waits for all work before. Replayed routes are in host memory: they are
counted there for all micro-batches of an update, and the ranks that share experts tell each other their counts once,
over gloo. A micro-batch with tokens that a router still has to place (of samples without a record) on any of these
ranks is dispatched as ever.

Shapes: t tokens that a router sees on this rank, l layers with experts on this rank, k experts of a token, e experts,
r ranks that share experts, m micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import megatron_s2d.parallel.plain_functions  # noqa: F401

import numpy as np
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_s2d.parallel.host_group import HostGroup


def tokens_of_experts(
    experts: Sequence[torch.Tensor], is_complete: Sequence[bool], num_experts: int, group: HostGroup
) -> list[torch.Tensor | None]:
    """Return for each micro-batch how many tokens each rank sends to each expert: [l, r, e] int64, in host memory.

    None where a rank does not know them. Collective over ``group``, whose ranks have equally many micro-batches.
    experts: [t, l, k] of each micro-batch. is_complete: whether this rank's routers choose nothing in it.
    """
    if not experts:
        return []
    local = np.stack([_count(item.numpy(), num_experts) for item in experts])
    message = np.concatenate([np.array(is_complete, np.int32), local.ravel()])
    everyone = np.stack(group.all_gather(message))
    known, counts = np.split(everyone, [len(experts)], axis=1)
    counts = counts.reshape(-1, *local.shape).transpose(1, 2, 0, 3).astype(np.int64)
    return [
        torch.from_numpy(item) if is_known else None
        for item, is_known in zip(np.ascontiguousarray(counts), known.all(axis=0), strict=True)
    ]


def _count(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Return the tokens of each expert [l, e] int32 in ``experts`` [t, l, k]."""
    num_layers = experts.shape[1]
    cells = experts + (np.arange(num_layers, dtype=np.int32) * num_experts)[:, None]
    return np.bincount(cells.ravel(), minlength=num_layers * num_experts).reshape(num_layers, -1).astype(np.int32)


class CountedReplay(RouterReplay):
    """The part of a layer's replay that the dispatcher reads."""

    tokens_of_experts: torch.Tensor | None = None  # [r, e] of the pass that the router has just decided, if known


class ReplayedDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-Core's dispatcher, which waits for the device only where the host does not know the sizes."""

    def __init__(self, replay: CountedReplay, *args: Any, **kwargs: Any):
        """replay: of the layer's router. Other arguments are those of Megatron-Core's class."""
        super().__init__(*args, **kwargs)
        if self.tp_size > 1:
            raise RuntimeError("experts are never split over tensor ranks")
        self._replay = replay
        self._is_known = False

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Set the sizes of this pass; return how many tokens each local expert gets, in host memory if known."""
        counts = self._replay.tokens_of_experts
        self._is_known = counts is not None
        if counts is None:
            return super().preprocess(routing_map)
        local = counts[:, self.local_expert_indices[0] : self.local_expert_indices[-1] + 1]
        self.num_out_tokens = routing_map.size(0) * self.config.moe_router_topk
        if self.ep_size > 1:
            self.input_splits = counts[self.ep_rank].view(self.ep_size, -1).sum(1).tolist()
            self.output_splits = local.sum(1).tolist()
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = local
            if self.config.moe_permute_fusion:
                pinned = local.contiguous().pin_memory()
                self.num_global_tokens_per_local_expert = pinned.to(routing_map.device, non_blocking=True)
        return local.sum(0)

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Copy sizes to the host, unless they come from there."""
        return tokens_per_expert if self._is_known else super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
