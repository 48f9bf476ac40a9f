"""Frozen weights in pinned host memory while another model uses the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_s2d.parallel import device
from megatron_s2d.parallel.pinned import pinned_like


class HostWeights:
    """Moves the parameters of a frozen model's chunks to the host and back; the host copy is made once."""

    def __init__(self) -> None:
        self._copies: dict[torch.nn.Parameter, torch.Tensor] = {}

    def offload(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Leave the weights in host memory only."""
        _clear_fp8_workspaces(chunks)
        if not self._copies:
            parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
            self._copies = dict(zip(parameters, pinned_like(parameters), strict=True))
            for parameter, copy in self._copies.items():
                copy.copy_(parameter.data, non_blocking=True)
        for parameter, copy in self._copies.items():
            parameter.data = copy
        device.synchronize()  # until the copies are complete

    def onload(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Move the weights to the device."""
        _clear_fp8_workspaces(chunks)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data = parameter.data.to(device.device(), non_blocking=True)

    def forget(self) -> None:
        """Drop the host copy, because the weights change."""
        self._copies.clear()


def _clear_fp8_workspaces(chunks: Sequence[torch.nn.Module]) -> None:
    """Drop Transformer Engine's FP8 copies of the weights, which it computes again after the weights moved."""
    for chunk in chunks:
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()
