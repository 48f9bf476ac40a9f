"""Metrics of the passes of an update: of every micro-batch, reduced over all ranks, read by the host once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_s2d.data.packing import MicroBatch
from megatron_s2d.errors import UserError
from megatron_s2d.kl.chunk import any_infinite, refuse_infinite
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.objectives.terms import (
    Metric,
    Objective,
    means_by_position,
    merge_metrics,
    pack_metrics,
    unpack_metrics,
)
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.train.expert_load import ExpertLoad


class FinishedPass(Protocol):
    """A micro-batch that was run: its inputs, the computed fields of ``TokenOutputs``, and these."""

    batch: MicroBatch
    outputs: tuple[str, ...]
    result: TokenOutputs


def reduce_metrics(
    objective: Objective,
    passes: Sequence[FinishedPass],
    layout: Layout,
    *,
    expert_load: ExpertLoad | None,
    limit: int,
) -> dict[str, Metric]:
    """Reduce the metrics of all micro-batches over all ranks, with two all-reduces and one copy to the host.

    limit: longest response. Raises ``UserError`` on all ranks if a divergence is infinite on one.
    """
    results = [vars(item.result) for item in passes] if layout.is_output_rank else []
    merged = _local_metrics(objective, passes, layout, limit)
    sums, maxima = pack_metrics(merged)
    maxima = torch.cat([maxima, any_infinite(results, maxima.device).to(maxima)[None]])
    if expert_load is not None:
        num_micro_batches = sum(1 for item in passes if item.batch.indices)
        sums = torch.cat([sums, expert_load.totals(num_micro_batches)])
    dist.all_reduce(sums)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    # The host waits for the device here, once for all passes.
    sums, maxima = torch.cat([sums, maxima]).cpu().split([len(sums), len(maxima)])
    *maxima, infinite = maxima
    if infinite:
        refuse_infinite(results)
        raise UserError("a divergence is infinite on another rank, whose log says at which tokens")
    reduced = unpack_metrics(merged, sums, maxima)
    if expert_load is not None:
        reduced |= expert_load.metrics(sums[-expert_load.num_totals :])
    return {name: metric for name, metric in reduced.items() if metric.omit == "never" or float(metric.denominator) > 0}


def _local_metrics(
    objective: Objective, passes: Sequence[FinishedPass], layout: Layout, limit: int
) -> dict[str, Metric]:
    """Return the metrics of this rank; ranks without outputs take part with those of no token."""
    batch = passes[0].batch
    no_rows = torch.zeros(0, dtype=torch.int64, device=batch.token_ids.device)
    # Columns that the output rank computes in its pass are missing on ranks of earlier pipeline stages.
    batch = dataclasses.replace(batch, columns=batch.columns.select(no_rows).with_missing(objective.columns))
    no_outputs = TokenOutputs(**{name: torch.zeros(0, device=no_rows.device) for name in objective.needs})
    parts = [_metrics_of(objective, no_outputs, batch, no_rows, limit)]
    for item in passes if layout.is_output_rank else ():
        rows = item.batch.response_rows
        outputs = TokenOutputs(**{name: getattr(item.result, name)[rows] for name in item.outputs})
        parts.append(_metrics_of(objective, outputs, item.batch, rows, limit))
    return merge_metrics(parts)


def _metrics_of(
    objective: Objective, outputs: TokenOutputs, batch: MicroBatch, rows: torch.Tensor, limit: int
) -> dict[str, Metric]:
    """Return the objective's metrics of the tokens at ``rows``, and its KL by position in the response."""
    columns = batch.columns.select(rows)
    metrics = objective.metrics(outputs, columns)
    if objective.token_kl is not None:
        values = objective.token_kl(outputs, columns)
        metrics |= means_by_position("kl_by_position", values, batch.response_positions[rows], limit)
        metrics |= _kl_of_parts(values, batch, rows)
        metrics["kl/first_token"] = metrics["kl_by_position/0"]
    return metrics


def _kl_of_parts(values: torch.Tensor, batch: MicroBatch, rows: torch.Tensor) -> dict[str, Metric]:
    """Return the mean KL of the tokens that end a response, and of each of several domains.

    values: [t] at ``rows``. A teacher with another end token than the student's shows in the first.
    """
    wide = values.detach().double()
    parts = {"kl/end_token": batch.response_ends[rows]}
    for number, domain in enumerate(batch.domains):
        parts[f"domain/{domain}/kl"] = batch.domain_numbers[rows] == number
    return {
        name: Metric(torch.where(members, wide, 0.0).sum(), members.sum(dtype=torch.float64), "mean", omit="empty")
        for name, members in parts.items()
    }
