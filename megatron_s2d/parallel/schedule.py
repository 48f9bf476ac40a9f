"""Runs Megatron's pipeline schedules over micro-batches whose shapes every pipeline rank knows.

Every pipeline rank packs the same samples in the same way, so the shapes of hidden states need not be sent before them:
that would cost a message and three waits of the host for the device for each tensor.

Shapes: b batch (sequences), s sequence length (s / tp under sequence parallelism), h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import megatron_s2d.parallel.plain_functions  # noqa: F401

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.utils import get_model_config

from megatron_s2d.parallel.layout import Layout

# (model, micro-batch) -> (output, loss function); on the last pipeline stage the loss function returns
# (loss scaled by C_global, unpadded tokens, result to collect).
ForwardStep = Callable[[torch.nn.Module, Any], tuple[torch.Tensor, Callable[[torch.Tensor], tuple]]]

HiddenShape = tuple[int, int, int]
"""[s, b, h] of a micro-batch."""


class KnownShapes(P2PCommunicator):
    """Knows the order in which hidden states and their gradients arrive."""

    def __init__(self, pp_group: torch.distributed.ProcessGroup, config: Any, shapes: Sequence[HiddenShape]):
        """shapes: of every micro-batch. Passes run in the order of Megatron's table, chunks in turn."""
        super().__init__(pp_group, config)
        num_chunks = config.virtual_pipeline_model_parallel_size or 1
        order = [(batch, 0) for batch in range(len(shapes))]
        if num_chunks > 1:
            order = get_schedule_table(len(shapes), num_chunks, config.microbatch_group_size_per_vp_stage)
        every = [shapes[batch] for batch, _ in order]
        # Between the last rank and the first one: all but the outputs of the last chunk, and the gradients for them.
        around = [shapes[batch] for batch, chunk in order if chunk < num_chunks - 1]
        self._previous = iter(around if self.is_pp_first_stage else every)
        self._next = iter(around if self.is_pp_last_stage else every)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[HiddenShape | None, HiddenShape | None]:
        return (next(self._previous) if recv_prev else None, next(self._next) if recv_next else None)


def run_schedule(
    chunks: list[torch.nn.Module],
    layout: Layout,
    forward_step: ForwardStep,
    micro_batches: Sequence[Any],
    *,
    forward_only: bool,
    shapes: Sequence[HiddenShape] | None,
) -> list[Any]:
    """Run the passes; return their results (empty before the last pipeline stage). ``layout`` is active.

    The number of micro-batches is a multiple of the pipeline ranks if there are several chunks. shapes: of every
    micro-batch's hidden states; None: pipeline ranks send them.
    """
    if not micro_batches:
        return []

    def step(iterator: Any, model: torch.nn.Module) -> Any:
        return forward_step(model, next(iterator))

    communicator = {}
    if layout.pp_size > 1 and shapes is not None:
        known = KnownShapes(layout.groups.pp, get_model_config(chunks[0]), shapes)
        communicator = {"p2p_communicator": known, "pg_collection": layout.groups}
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        # Pipeline ranks use the actual shapes (variable_seq_lengths); these two only have to be positive.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        **communicator,
    )
