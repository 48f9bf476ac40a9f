"""Keeps the experts that the tokens of a batch pass through while ``megatron/engine.py`` generates it.

Records stay on the device and are copied to the host once a batch. They take ``layers x experts of a token`` bytes for
each row and position: 384 for Qwen3-30B-A3B, 0.4 % of its keys and values.

Shapes: b requests of the batch, a active requests, u distinct prompts, p prompt length, s response positions, l layers
of this pipeline rank, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.models.families import layers_of_pp_rank
from megatron_s2d.models.routing_replay import RoutingReplay
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout


class RouteRecorder:
    """The routes of one batch; ``RoutingReplay.recording`` is active meanwhile."""

    def __init__(self, replay: RoutingReplay, prompt_rows: torch.Tensor, num_steps: int):
        """prompt_rows: [b] int64, the prompt of each request. num_steps: response tokens at most."""
        self._replay, self._prompt_rows, self._num_steps = replay, prompt_rows, num_steps
        self._prompts = self._responses = torch.empty(0)

    def add_prompts(self, num_prompts: int) -> None:
        """Take the routes of the pass over ``num_prompts`` prompts that has just ended."""
        recorded = self._replay.recorded()  # tokens in the order [p, u]
        self._prompts = recorded.unflatten(0, (-1, num_prompts))
        shape = (self._num_steps, len(self._prompt_rows), *recorded.shape[1:])
        self._responses = recorded.new_zeros(shape)

    def add_tokens(self, position: int, rows: torch.Tensor, columns: slice) -> None:
        """Take the routes of the pass over response token ``position`` of ``rows`` [a] that has just ended.

        columns: of the pass, where ``rows`` were.
        """
        self._responses[position, rows] = self._replay.recorded()[columns]

    def by_request(
        self, requests: Sequence[int], prompt_lengths: Sequence[int], response_lengths: Sequence[int], layout: Layout
    ) -> list[np.ndarray]:
        """Return ``Sample.routed_experts`` of each of ``requests`` (indices, ascending), of all layers.

        Collective over pipeline ranks.
        """
        num_steps = max(0, max(response_lengths) - 1)  # the last token of a response is not decoded
        rows, responses = self._prompt_rows, self._responses[:num_steps]
        if len(requests) < len(rows):
            selected = torch.tensor(requests, device=rows.device)
            rows, responses = rows[selected], responses[:, selected]
        on_device = (rows, self._all_layers(self._prompts, layout), self._all_layers(responses, layout))
        on_host = [device.copy_to_host(tensor) for tensor in on_device]
        device.synchronize()  # once a batch, for all of them
        rows, prompts, responses = (tensor.numpy() for tensor in on_host)
        return [
            np.concatenate([prompts[len(prompts) - prompt_length :, row], responses[: response_length - 1, index]])
            for index, (row, prompt_length, response_length) in enumerate(
                zip(rows.tolist(), prompt_lengths, response_lengths, strict=True)
            )
        ]

    def _all_layers(self, local: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return [positions, rows, layers, k] from this pipeline rank's layers."""
        if layout.pp_size == 1:
            return local
        parts = []
        for rank in range(layout.pp_size):
            shape = list(local.shape)
            shape[2] = len(layers_of_pp_rank(self._replay.spec, rank, layout.pp_size))
            part = local.contiguous() if rank == layout.pp_rank else local.new_empty(shape)
            dist.broadcast(part.view(torch.uint8), group=layout.groups.pp, group_src=rank)
            parts.append(part)
        return torch.cat(parts, dim=2)
