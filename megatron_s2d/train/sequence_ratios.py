"""The ratio of a whole response for GSPO, from the log-probabilities of its tokens, before the loss is computed.

Shapes: n sequences of a micro-batch, t its positions on this context rank.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.data.packing import MicroBatch


@torch.no_grad()
def with_sequence_log_ratios(
    batch: MicroBatch, log_probs: torch.Tensor, cp_group: dist.ProcessGroup | None
) -> MicroBatch:
    """Return ``batch`` with ``sequence_log_ratios`` [t]: mean of log pi_S - log pi_old over each response's tokens.

    log_probs: [t] under the current weights. cp_group: the ranks that have the sequences' other parts; None: one rank.
    Summed in float64 in an order that depends on the batch alone, so equal layouts give equal bits. Collective over
    ``cp_group``.
    """
    plan, rows = batch.plan, batch.response_rows
    sequence = _sequence_of_positions(batch)[rows]
    difference = (log_probs[rows] - batch.columns.get("old_log_probs")[rows]).double()
    # One row a sequence: every token has a cell of its own, so nothing is added in an arbitrary order.
    grid = difference.new_zeros(2, max(1, len(plan.lengths)), max(plan.lengths, default=1))
    grid[0, sequence, batch.response_positions[rows]] = difference
    grid[1, sequence, batch.response_positions[rows]] = 1.0
    totals = grid.sum(dim=2)
    if cp_group is not None:
        dist.all_reduce(totals, group=cp_group)
    means = totals[0] / totals[1].clamp(min=1.0)
    column = torch.zeros_like(log_probs).index_copy_(0, rows, means[sequence].to(log_probs.dtype))
    return dataclasses.replace(batch, columns=dataclasses.replace(batch.columns, sequence_log_ratios=column))


def _sequence_of_positions(batch: MicroBatch) -> torch.Tensor:
    """Return the index of the sequence that each position's predicted token belongs to, int64 [t]."""
    plan = batch.plan
    sequence = plan.shift_to_labels(plan.scatter_rows(np.int64, range(len(plan.lengths))))
    local = sequence if plan.cp_size == 1 else sequence[plan.cp_indices[batch.cp_rank]]
    return torch.from_numpy(local).to(batch.token_ids.device)
