"""RMSNorm in plain PyTorch that Megatron's sequence parallelism accepts."""

from __future__ import annotations

import torch

from megatron_s2d.parallel import device

device.patch_megatron_for_cpu()

from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension, [..., hidden_size], computed in float32 inside the kernel.

    With sequence parallelism every tensor rank normalises other positions, so gradients of the weight have to be summed
    over the ranks: Megatron does that for parameters marked ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device.device())
        self.weight.sequence_parallel = config.sequence_parallel
