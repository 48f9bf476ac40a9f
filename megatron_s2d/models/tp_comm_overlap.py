"""Communication of tensor ranks while matrix products run: the buffers of Transformer Engine's userbuffers.

Its layers gather sequence shards, and scatter sums, piece by piece during the products next to them. The buffers have
the shape of a micro-batch, so every micro-batch of training must have that shape; passes without gradients do not use
them.
"""

from __future__ import annotations

import importlib

import torch

from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout


def prepare_tp_comm_overlap(tokens: int, hidden_size: int, layout: Layout, *, dtype: torch.dtype, fp8: bool) -> None:
    """Allocate ``TP_COMM_OVERLAP_BUFFERS`` buffers of [tokens, hidden_size]; collective over all ranks.

    tokens: of a micro-batch on one context rank, over all sequence shards. A process has one set of buffers; another
    call replaces it. Raises ``UserError`` without Transformer Engine, or where GPUs cannot write to each other.
    """
    if not device.capabilities().transformer_engine:
        raise UserError(
            "parallel.tp_comm_overlap needs a GPU and Transformer Engine, which is not usable here: install it "
            "(docs/gpu.md), or leave tp_comm_overlap out"
        )
    engine = importlib.import_module("transformer_engine.pytorch.module.base")
    modes = engine.UserBufferQuantizationMode
    engine.destroy_ub()
    try:
        engine.initialize_ub(
            shape=[tokens, hidden_size],
            tp_size=layout.tp_size,
            quantization_modes=[modes.FP8 if fp8 else modes.NONE],
            dtype=dtype,
            bootstrap_backend="nccl",
        )
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"parallel.tp_comm_overlap: the tensor ranks cannot share buffers ({first}): leave tp_comm_overlap out"
        ) from None
