"""What an objective is made of: columns of data, terms, metrics with their reduction, and the weights of tokens.

The loss of a batch is the sum over terms and tokens of ``coefficient * weight * value``. The weight column of a term
has the GLOBAL normaliser folded in (``token_weights``), so that nothing here divides by a count, and how tokens are
dealt to micro-batches, data-parallel ranks or chunks cannot change the loss or its gradient beyond rounding
(methods.md M1).
A weight of zero takes a token out of a term and out of that term's metrics.

Left out: where the columns come from (data/packing.py), and the reduction over ranks (the trainer all-reduces what
``pack_metrics`` returns).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
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
    omit: Omit = "never"  # when the metric is left out of a row: without values, or also if it is zero

    @classmethod
    def of(cls, value: float) -> Metric:
        """The metric of one value that is the same on every rank."""
        return cls(torch.tensor(value, dtype=torch.float64), torch.ones((), dtype=torch.float64), "mean")

    @classmethod
    def over(cls, values: torch.Tensor, active: torch.Tensor, reduction: Reduction = "mean") -> Metric:
        """The metric of ``values`` [N] (numbers or booleans) where ``active`` (bool [N]) is True."""
        values = values.detach().to(torch.float64)
        empty = {"mean": 0.0, "sum": 0.0, "max": -math.inf, "min": math.inf}[reduction]
        kept = torch.cat([torch.where(active, values, empty), values.new_full((1,), empty)])
        numerator = {"mean": torch.sum, "sum": torch.sum, "max": torch.max, "min": torch.min}[reduction](kept)
        return cls(numerator, active.sum(dtype=torch.float64), reduction)

    def combine(self, other: Metric) -> Metric:
        """The metric of both sets of values."""
        if self.reduction != other.reduction:
            raise ValueError(f"metrics of reduction {self.reduction} and {other.reduction} cannot be combined")
        merge = {"mean": torch.add, "sum": torch.add, "max": torch.maximum, "min": torch.minimum}[self.reduction]
        return dataclasses.replace(
            self,
            numerator=merge(self.numerator, other.numerator),
            denominator=self.denominator + other.denominator,
        )

    def value(self) -> float:
        """The number; NaN for the mean of nothing."""
        if self.reduction != "mean":
            return float(self.numerator)
        count = float(self.denominator)
        return float(self.numerator) / count if count else math.nan


def means_by_position(name: str, values: torch.Tensor, positions: torch.Tensor, limit: int) -> dict[str, Metric]:
    """Return the means of ``values`` [t] over tokens 0, 1, 2-3, 4-7, ... of their responses as ``name/<first token>``.

    positions: [t] of the tokens in their responses, at most ``limit``.
    """
    starts = log2_bin_starts(limit)
    bins = torch.bucketize(positions, torch.tensor(starts, device=positions.device), right=True) - 1
    sums = torch.bincount(bins, weights=values.detach().double(), minlength=len(starts))
    counts = torch.bincount(bins, minlength=len(starts)).double()
    return {
        f"{name}/{start}": Metric(sums[index], counts[index], "mean", omit="empty")
        for index, start in enumerate(starts)
    }


def merge_metrics(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """The metrics of all ``parts`` (micro-batches of one rank) together; a name may be missing from some."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].combine(metric) if name in merged else metric
    return merged


def pack_metrics(metrics: dict[str, Metric]) -> tuple[torch.Tensor, torch.Tensor]:
    """(to be summed over ranks, to be maximised over ranks), float64, in the order of the sorted names."""
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


def unpack_metrics(metrics: dict[str, Metric], sums: torch.Tensor, maxima: torch.Tensor) -> dict[str, Metric]:
    """The inverse of ``pack_metrics``: ``metrics`` gives names and reductions, the tensors the reduced numbers."""
    sums_left, maxima_left = iter(sums.unbind()), iter(maxima.unbind())
    found = {}
    for name in sorted(metrics):
        reduction, denominator = metrics[name].reduction, next(sums_left)
        if reduction in ("mean", "sum"):
            numerator = next(sums_left)
        else:
            numerator = next(maxima_left) if reduction == "max" else -next(maxima_left)
        found[name] = Metric(numerator, denominator, reduction, metrics[name].omit)
    return found


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of an objective."""

    name: str
    weight: str  # the column that weighs it
    needs: frozenset[str]  # fields of TokenOutputs
    columns: frozenset[str]  # columns, without the weight
    values: Callable[[TokenOutputs, TokenColumns], torch.Tensor]  # -> loss per token [C], differentiable
    metrics: Callable[[TokenOutputs, TokenColumns, torch.Tensor], dict[str, Metric]]  # last: bool [C], what counts
    coefficient: float = 1.0

    def inputs(self, outputs: TokenOutputs, columns: TokenColumns) -> tuple[torch.Tensor, TokenColumns]:
        """(bool [C]: which tokens the term counts, columns that are harmless elsewhere)."""
        columns.require(self.columns | {self.weight})
        active = getattr(columns, self.weight) != 0
        return active, columns.neutral_outside(active, outputs.log_probs)

    def weighted(self, outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        """[C] coefficient * weight * value."""
        _, safe = self.inputs(outputs, columns)
        return self.coefficient * getattr(columns, self.weight) * self.values(outputs, safe)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Terms added up. The same object gives the loss inside the output layer and, afterwards, the metrics."""

    terms: tuple[Term, ...]
    kl_metric: str | None = None  # the metric that is also shown as `kl`, in nats per token
    token_kl: Callable[[TokenOutputs, TokenColumns], torch.Tensor] | None = None  # [C] its values, by token

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names or len(set(names)) != len(names):
            raise UserError(f"an objective needs at least one term and each term once, found {names}")

    @property
    def needs(self) -> frozenset[str]:
        """Fields of ``TokenOutputs`` to ask for; the entropy is always reported."""
        return frozenset({"entropy"}).union(*(term.needs for term in self.terms))

    @property
    def columns(self) -> frozenset[str]:
        """Columns that must be there, weights included."""
        return frozenset().union(*(term.columns | {term.weight} for term in self.terms))

    def token_loss(self, outputs: TokenOutputs, columns: TokenColumns) -> torch.Tensor:
        """[C] weighted losses whose plain sum over the whole batch is the loss; both arguments have C rows.

        A pure function, row by row: chunks of a batch give the rows of the whole. Raises ``UserError`` for a column
        that is missing.
        """
        first, *others = (term.weighted(outputs, columns) for term in self.terms)
        return sum(others, start=first)

    @torch.no_grad()
    def metrics(self, outputs: TokenOutputs, columns: TokenColumns) -> dict[str, Metric]:
        """Metrics of these rows. ``loss`` is exact for the batch when it is summed over all its rows."""
        found: dict[str, Metric] = {}
        counted, losses = [], []
        for term in self.terms:
            active, safe = term.inputs(outputs, columns)
            loss = Metric.over(term.weighted(outputs, columns), active, "sum")
            parts = {f"loss/{term.name}": loss} if len(self.terms) > 1 else {}
            parts |= term.metrics(outputs, safe, active)
            if repeated := parts.keys() & found.keys():
                raise ValueError(f"two terms report {sorted(repeated)}")
            found |= parts
            counted.append(active)
            losses.append(loss)
        found["loss"] = functools.reduce(Metric.combine, losses)
        if outputs.entropy is not None:
            found["entropy"] = Metric.over(outputs.entropy, torch.stack(counted).any(dim=0))
        if self.kl_metric is not None:
            found["kl"] = found[self.kl_metric]
        return found


def mix_objectives(parts: Sequence[tuple[float, Objective]]) -> Objective:
    """sum of coefficient * objective; the first objective that has a KL to show gives ``kl``."""
    terms: list[Term] = []
    for coefficient, objective in parts:
        if not (math.isfinite(coefficient) and coefficient > 0):
            raise UserError(f"coefficient {coefficient} of an objective: give a positive number, or leave it out")
        terms += [dataclasses.replace(term, coefficient=coefficient * term.coefficient) for term in objective.terms]
    shown = next((objective for _, objective in parts if objective.kl_metric is not None), Objective(tuple(terms)))
    return Objective(tuple(terms), shown.kl_metric, shown.token_kl)


@dataclasses.dataclass(frozen=True)
class ResponseCounts:
    """How many responses, and tokens in them, one term averages over; those without a token are not counted."""

    tokens: int
    sequences: int

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray) -> ResponseCounts:
        """Counts of responses with ``lengths`` tokens."""
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
    """The weight of every token of each response: float64 [number of responses] (methods.md M1).

    lengths: response tokens of each response here. counts: of the GLOBAL batch of one update, over all data-parallel
    ranks and micro-batches; the weights of a response then do not depend on which others are packed with it.
    token_mean: 1 / tokens. seq_mean_token_mean: 1 / (sequences * length). seq_mean_token_sum_norm:
    1 / (sequences * max_response_length), the constant length of Dr. GRPO. A response of length 0 gets 0.
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
            raise UserError("loss_agg_mode seq_mean_token_sum_norm divides by max_response_length: give that limit")
        weights = np.full(lengths.shape, 1.0 / (max(counts.sequences, 1) * max_response_length))
    else:
        raise UserError(f"loss_agg_mode {loss_agg_mode!r}: choose one of {', '.join(LOSS_AGG_MODES)}")
    return np.where(lengths > 0, weights, 0.0)
