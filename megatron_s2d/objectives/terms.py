"""Building blocks of objectives: loss terms, metrics with their reduction, and normalised loss weights of tokens.

The loss of a batch is the sum over terms and tokens of ``coefficient * weight * value``. The weight column of a term
contains the GLOBAL normaliser (``token_weights``), so nothing here divides by a count, and the assignment of tokens to
micro-batches, data-parallel ranks or chunks cannot change the loss or its gradient beyond rounding (methods.md M1).
A weight of zero removes a token from a term and from that term's metrics.

The columns come from ``data/packing.py``; the trainer all-reduces the tensors of ``pack_metrics``.

Shapes: b responses, t tokens of a micro-batch, or of a chunk of one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import torch

from megatron_s2d.arithmetic import log2_bin_starts
from megatron_s2d.columns import TokenColumns
from megatron_s2d.errors import UserError
from megatron_s2d.kl.outputs import TokenOutputs

Reduction = Literal["mean", "sum", "max", "min"]
Omit = Literal["never", "empty", "zero"]
LOSS_AGG_MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm")


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """A number that can be combined over chunks, micro-batches and ranks: float64 scalars on the values' device."""

    numerator: torch.Tensor  # sum of the values; their maximum or minimum (-inf or inf for none)
    denominator: torch.Tensor  # number of values
    reduction: Reduction
    omit: Omit = "never"  # when a report leaves the metric out: never, if it has no values, or also if it is zero

    @classmethod
    def of(cls, value: float) -> Metric:
        """Return the metric of one value that is the same on every rank."""
        return cls(torch.tensor(value, dtype=torch.float64), torch.ones((), dtype=torch.float64), "mean")

    @classmethod
    def over(cls, values: torch.Tensor, active: torch.Tensor, reduction: Reduction = "mean") -> Metric:
        """Return the metric of ``values`` [t] (numbers or booleans) where ``active`` (bool [t]) is True."""
        values = values.detach().to(torch.float64)
        empty = {"mean": 0.0, "sum": 0.0, "max": -math.inf, "min": math.inf}[reduction]
        active_values = torch.cat([torch.where(active, values, empty), values.new_full((1,), empty)])
        reduce = {"max": torch.amax, "min": torch.amin}.get(reduction, torch.sum)
        return cls(reduce(active_values), active.sum(dtype=torch.float64), reduction)

    def combine(self, other: Metric) -> Metric:
        """Return the metric of both sets of values."""
        if self.reduction != other.reduction:
            raise ValueError(f"metrics of reduction {self.reduction} and {other.reduction} cannot be combined")
        if self.reduction in ("mean", "sum"):
            numerator = self.numerator + other.numerator
        else:
            extreme = torch.maximum if self.reduction == "max" else torch.minimum
            numerator = extreme(self.numerator, other.numerator)
        return dataclasses.replace(self, numerator=numerator, denominator=self.denominator + other.denominator)

    def value(self) -> float:
        """Return the number; NaN for the mean of no values."""
        if self.reduction != "mean":
            return float(self.numerator)
        count = float(self.denominator)
        return float(self.numerator) / count if count else math.nan


@functools.cache
def _edges(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A constant on the device: copying it there again would make the host wait for the device."""
    return torch.tensor(values, dtype=dtype, device=device)


def in_bins(values: torch.Tensor, starts: tuple[float, ...]) -> torch.Tensor:
    """Return which of ``values`` [t] are in each bin: bool [bins, t]. starts: ascending; the last bin has no end.

    Not ``bincount``, which waits for the device to learn the largest value.
    """
    bins = torch.bucketize(values, _edges(starts, values.dtype, values.device), right=True) - 1
    return bins == torch.arange(len(starts), device=values.device)[:, None]


def means_by_position(name: str, values: torch.Tensor, positions: torch.Tensor, limit: int) -> dict[str, Metric]:
    """Return the means of ``values`` [t] over tokens 0, 1, 2-3, 4-7, ... of their responses as ``name/<first token>``.

    positions: [t] of the tokens in their responses, at most ``limit``.
    """
    starts = log2_bin_starts(limit)
    members = in_bins(positions, tuple(starts))
    sums = torch.where(members, values.detach().double(), 0.0).sum(1)
    counts = members.sum(1, dtype=torch.float64)
    return {
        f"{name}/{start}": Metric(sums[index], counts[index], "mean", omit="empty")
        for index, start in enumerate(starts)
    }


def merge_metrics(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """Combine the metrics of ``parts`` (micro-batches of one rank); a name may be missing from some."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].combine(metric) if name in merged else metric
    return merged


def pack_metrics(metrics: dict[str, Metric]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values to sum over ranks, values to maximise over ranks), float64, in the order of the sorted names."""
    ordered = [metrics[name] for name in sorted(metrics)]
    device = ordered[0].denominator.device if ordered else None
    sums, maxima = [], []
    for metric in ordered:
        sums.append(metric.denominator)
        if metric.reduction in ("mean", "sum"):
            sums.append(metric.numerator)
        else:
            maxima.append(metric.numerator if metric.reduction == "max" else -metric.numerator)
    empty = torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack(sums) if sums else empty, torch.stack(maxima) if maxima else empty


def unpack_metrics(
    metrics: dict[str, Metric], sums: Iterable[torch.Tensor], maxima: Iterable[torch.Tensor]
) -> dict[str, Metric]:
    """Invert ``pack_metrics``: names and reductions from ``metrics``, numbers from the reduced tensors."""
    next_sum, next_maximum = iter(sums), iter(maxima)
    reduced = {}
    for name in sorted(metrics):
        reduction, denominator = metrics[name].reduction, next(next_sum)
        if reduction in ("mean", "sum"):
            numerator = next(next_sum)
        else:
            numerator = next(next_maximum) if reduction == "max" else -next(next_maximum)
        reduced[name] = Metric(numerator, denominator, reduction, metrics[name].omit)
    return reduced


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of an objective."""

    name: str
    weight: str  # the column of its loss weights
    needs: frozenset[str]  # fields of TokenOutputs
    columns: frozenset[str]  # required columns, without the weight
    values: Callable[[TokenOutputs, TokenColumns], torch.Tensor]  # -> loss per token [t], differentiable
    metrics: Callable[[TokenOutputs, TokenColumns, torch.Tensor], dict[str, Metric]]  # last: active tokens, bool [t]
    coefficient: float = 1.0

    def inputs(self, outputs: TokenOutputs, columns: TokenColumns) -> tuple[torch.Tensor, TokenColumns]:
        """Return (active tokens of the term, bool [t]; columns that are harmless elsewhere)."""
        columns.require(self.columns | {self.weight})
        active = columns.get(self.weight) != 0
        return active, columns.neutral_outside(active, outputs.log_probs)

    def weighted(self, outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        """Return coefficient * weight * value per token [t]."""
        _, safe = self.inputs(outputs, columns)
        return self.coefficient * columns.get(self.weight) * self.values(outputs, safe)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A sum of terms: the loss inside the output layer and, afterwards, its metrics."""

    terms: tuple[Term, ...]
    kl_metric: str | None = None  # the metric that is also reported as `kl`, in nats per token
    token_kl: Callable[[TokenOutputs, TokenColumns], torch.Tensor] | None = None  # -> that KL per token [t]

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names or len(set(names)) != len(names):
            raise UserError(f"an objective needs at least one term and each term once, got {names}")

    @property
    def needs(self) -> frozenset[str]:
        """Fields of ``TokenOutputs`` to compute; the entropy is always reported."""
        return frozenset({"entropy"}).union(*(term.needs for term in self.terms))

    @property
    def columns(self) -> frozenset[str]:
        """Required columns, including loss weights."""
        return frozenset[str]().union(*(term.columns | {term.weight} for term in self.terms))

    def token_loss(self, outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        """Return weighted losses [t] whose plain sum over the batch is the loss.

        A pure function, row by row, so a batch may be cut into chunks. Raises ``UserError`` for a missing column.
        """
        first, *others = (term.weighted(outputs, columns) for term in self.terms)
        return sum(others, start=first)

    @torch.no_grad()
    def metrics(self, outputs: TokenOutputs, columns: TokenColumns) -> dict[str, Metric]:
        """Return the metrics of these rows. ``loss`` is that of the batch when summed over all its rows."""
        metrics: dict[str, Metric] = {}
        active_of_terms, losses = [], []
        for term in self.terms:
            active, safe = term.inputs(outputs, columns)
            loss = Metric.over(term.weighted(outputs, columns), active, "sum")
            parts = {f"loss/{term.name}": loss} if len(self.terms) > 1 else {}
            parts |= term.metrics(outputs, safe, active)
            if repeated := parts.keys() & metrics.keys():
                raise ValueError(f"two terms report {sorted(repeated)}")
            metrics |= parts
            active_of_terms.append(active)
            losses.append(loss)
        metrics["loss"] = functools.reduce(Metric.combine, losses)
        if outputs.entropy is not None:
            metrics["entropy"] = Metric.over(outputs.entropy, torch.stack(active_of_terms).any(dim=0))
        if self.kl_metric is not None:
            metrics["kl"] = metrics[self.kl_metric]
        return metrics


@dataclasses.dataclass(frozen=True)
class ResponseCounts:
    """Number of responses, and of their tokens, that one term averages over; empty responses are not counted."""

    tokens: int
    sequences: int

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray) -> ResponseCounts:
        """Count responses with ``lengths`` tokens."""
        lengths = np.asarray(lengths, dtype=np.int64)
        return cls(int(lengths.sum()), int((lengths > 0).sum()))

    def __add__(self, other: ResponseCounts) -> ResponseCounts:
        return ResponseCounts(self.tokens + other.tokens, self.sequences + other.sequences)


def token_weights(
    lengths: Sequence[int] | np.ndarray,
    loss_agg_mode: str,
    counts: ResponseCounts,
    max_response_length: int | None = None,
) -> np.ndarray:
    """Return the loss weight of every token of each response: float64 [b] (methods.md M1).

    lengths: tokens of each response here. counts: of the GLOBAL mini-batch, over all data-parallel ranks and
    micro-batches, so the weights of a response do not depend on the responses packed with it. token_mean: 1 / tokens.
    seq_mean_token_mean: 1 / (sequences * length). seq_mean_token_sum_norm: 1 / (sequences * max_response_length), the
    constant length of Dr. GRPO. A response of length 0 gets 0.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if (lengths < 0).any() or lengths.sum() > counts.tokens or (lengths > 0).sum() > counts.sequences:
        raise ValueError(f"{ResponseCounts.of(lengths)} here cannot be part of {counts} globally")
    if loss_agg_mode == "token_mean":
        weights = np.full(lengths.shape, 1.0 / max(counts.tokens, 1))
    elif loss_agg_mode == "seq_mean_token_mean":
        weights = 1.0 / (max(counts.sequences, 1) * np.maximum(lengths, 1).astype(np.float64))
    elif loss_agg_mode == "seq_mean_token_sum_norm":
        if max_response_length is None or max_response_length < 1:
            raise UserError(
                "loss_agg_mode seq_mean_token_sum_norm divides by sampling.max_response_length, which this stage does "
                "not have: choose token_mean or seq_mean_token_mean"
            )
        weights = np.full(lengths.shape, 1.0 / (max(counts.sequences, 1) * max_response_length))
    else:
        raise ValueError(f"loss_agg_mode {loss_agg_mode!r}: choose one of {', '.join(LOSS_AGG_MODES)}")
    return np.where(lengths > 0, weights, 0.0)
