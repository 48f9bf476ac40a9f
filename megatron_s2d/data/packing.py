"""Packs the samples of a data-parallel rank into micro-batches under a token budget, and shifts tokens to labels.

Every rank knows the lengths of all samples of the update, so loss denominators are global by construction and nothing
here communicates. All data-parallel ranks have the same number of micro-batches: ``MegatronModel.pack`` agrees on it.
A micro-batch has one of two layouts:

    padded   one row per sequence, padded at its end; attention is causal, so no token attends to the padding
    packed   one row with the sequences end to end, followed by a sequence of padding up to the alignment

Per-token arrays are flattened in Megatron's order, [s, b]: entry ``i * b + row`` is the position that PREDICTS token
``i + 1`` of that row. The last position of a sequence predicts nothing. This is the only shift from tokens to labels.
Context-parallel ranks have parts of packed sequences (``parallel/context_parallel.py``), each padded to be divisible.

Shapes: b sequences (1 if packed), s sequence length, t = s * b positions of a micro-batch (on one context rank).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_s2d.arithmetic import round_up
from megatron_s2d.columns import TokenColumns
from megatron_s2d.data.grouping import group_into_micro_batches, split_micro_batches
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.context_parallel import cp_length_multiple, cp_positions
from megatron_s2d.records import AnySample, Sample, own_samples

_SAMPLE_COLUMNS = ("old_log_probs", "rollout_log_probs", "advantages", "teacher_log_probs", "reference_log_probs")


@dataclasses.dataclass(frozen=True, eq=False)
class MiniBatch:
    """The samples of one optimizer update, over all data-parallel ranks; each has the arrays of its own samples."""

    samples: Sequence[AnySample]
    # weight column -> one entry per sample: the weight of its response tokens, a number or [length] (own samples only)
    loss_weights: Mapping[str, Sequence[float | np.ndarray]]

    @property
    def num_tokens(self) -> int:
        """Number of prompt and response tokens, without padding."""
        return sum(sample.length for sample in self.samples)


@dataclasses.dataclass(frozen=True)
class MicroBatchPlan:
    """A micro-batch before its tensors are built: which samples, and the offsets of their tokens in arrays [b, s]."""

    indices: tuple[int, ...]  # indices of the samples; a plan without samples has one row of padding
    lengths: tuple[int, ...]  # tokens of each sample
    domain: str | None  # of all samples, if they were packed by domain
    packed: bool = False
    pad_to_multiple: int = 1  # of the length on one context rank
    cp_size: int = 1

    @functools.cached_property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """Row and column of the first token of each sequence."""
        if not self.packed:
            return tuple((row, 0) for row in range(len(self.lengths)))
        ends = np.cumsum([0, *map(self._padded_length, self.lengths)]).tolist()
        return tuple((0, end) for end in ends[:-1])

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """(b, s) over all context ranks."""
        if not self.packed:
            return max(1, len(self.lengths)), round_up(max(self.lengths, default=1), self.pad_to_multiple)
        filled = max(1, sum(map(self._padded_length, self.lengths)))
        return 1, round_up(filled, _packed_alignment(self.pad_to_multiple, self.cp_size))

    @property
    def cu_seqlens(self) -> list[int]:
        """Start of every packed sequence, including the padding at the end, and the end of the row."""
        filled = sum(map(self._padded_length, self.lengths))
        starts = [column for _, column in self.offsets] + ([filled] if filled < self.shape[1] else [])
        return [*starts, self.shape[1]]

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sequence, with padding."""
        return max(np.diff(self.cu_seqlens).tolist()) if self.packed else self.shape[1]

    @functools.cached_property
    def cp_indices(self) -> np.ndarray:
        """[cp_size, t] int64: the positions of every context rank, numbered in the order [s, b]."""
        rows, length = self.shape
        return cp_positions(self.cu_seqlens if self.packed else [0, rows * length], self.cp_size)

    def positions(self) -> list[slice]:
        """Return the positions of the tokens of each sequence."""
        rows = self.shape[0]
        return [
            slice(column * rows + row, (column + length) * rows + row - rows + 1, rows)
            for (row, column), length in zip(self.offsets, self.lengths, strict=True)
        ]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the context rank of each of ``positions`` and its index on that rank."""
        order = np.empty(self.cp_indices.size, dtype=np.int64)
        order[self.cp_indices.reshape(-1)] = np.arange(self.cp_indices.size)
        return np.divmod(order[positions], self.cp_indices.shape[1])

    def scatter_rows(self, dtype: type, values: Sequence[Any], fill: Any = 0) -> np.ndarray:
        """Return [b, s] with each sequence's ``values`` ([length], or one for all tokens) and ``fill`` elsewhere."""
        grid = np.full(self.shape, fill, dtype=dtype)
        for (row, column), length, sequence_values in zip(self.offsets, self.lengths, values, strict=True):
            grid[row, column : column + length] = sequence_values
        return grid

    def shift_to_labels(self, values: np.ndarray) -> np.ndarray:
        """Reorder [b, s] by token to [t] by predicting position; 0 at positions that predict nothing."""
        shifted = np.zeros_like(values.T)
        shifted[:-1] = values.T[1:]
        for row, column in self.offsets:
            if column:
                shifted[column - 1, row] = 0
        return shifted.reshape(-1)

    def _padded_length(self, length: int) -> int:
        """Length of a packed sequence with its padding."""
        return round_up(length, cp_length_multiple(self.cp_size))


@dataclasses.dataclass(frozen=True)
class RoutedLayers:
    """The layers of this pipeline rank, whose experts are replayed."""

    layers: tuple[int, ...]  # indices in the whole model
    num_experts: int
    num_experts_per_tok: int
    dtype: str  # of the indices of experts
    gives_last: bool  # whether last tokens, which have no record, take the experts of the token before


@dataclasses.dataclass(frozen=True, eq=False)
class Routes:
    """The experts of each token of a micro-batch, in host memory, pinned for a CUDA device."""

    experts: torch.Tensor  # [t, layers of this pipeline rank, experts of a token]; anything where the router chooses
    is_recorded: torch.Tensor  # [t] bool
    # [t] bool, False where the router chooses: tokens of samples without a record, and last tokens unless they are
    # given. Padding may go anywhere, and is given where all tokens are.
    is_given: torch.Tensor
    is_complete: bool  # whether no router chooses


@dataclasses.dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass of one data-parallel rank. With context parallelism arrays by position are this rank's."""

    plan: MicroBatchPlan
    cp_rank: int
    cu_seqlens: torch.Tensor | None  # [number of sequences + 1] int32, their starts and the end; None if padded
    token_ids: torch.Tensor  # [b, s] int64
    padding_mask: torch.Tensor  # [b, s] bool, True at padding
    labels: torch.Tensor  # [t] int64, the token that each position predicts (0 at the end of a sequence)
    response_mask: torch.Tensor  # [t] bool, True if the predicted token is part of a response
    response_rows: torch.Tensor  # [number of True entries of response_mask] int64, their indices
    response_rows_on_host: np.ndarray  # the same: sizes that depend on them take no wait for the device
    response_positions: torch.Tensor  # [t] int64, index of the predicted token in its response; 0 elsewhere
    response_ends: torch.Tensor  # [t] bool, True if the predicted token is the last one of a response that ended
    temperature: float | torch.Tensor  # of the log-probabilities; [t] if sequences differ
    columns: TokenColumns  # [t] each
    num_tokens: int  # of this rank, without padding
    routes: Routes | None = None  # of the tokens at the positions [t]; None without routing replay
    domains: tuple[str, ...] = ()  # of all samples of the mini-batch, sorted; empty for a single one
    domain_numbers: torch.Tensor | None = None  # [t] int64, index in `domains` of the predicted token's; 0 elsewhere

    @property
    def indices(self) -> tuple[int, ...]:
        """Indices of the sequences in the packed samples."""
        return self.plan.indices

    @property
    def domain(self) -> str | None:
        """The domain of all sequences, if samples were packed by domain."""
        return self.plan.domain

    @property
    def shape(self) -> tuple[int, int]:
        """(s, b) of this context rank."""
        return self.token_ids.shape[1], self.token_ids.shape[0]

    @property
    def num_positions(self) -> int:
        """Number of positions over all context ranks."""
        return self.plan.cp_indices.size

    def positions(self) -> list[slice]:
        """Return the positions of the tokens of each sequence, over all context ranks."""
        return self.plan.positions()

    def slice_for_cp(self, values: torch.Tensor) -> torch.Tensor:
        """Return this context rank's [t, ...] of the values of all positions."""
        if self.plan.cp_size == 1:
            return values
        return values[torch.from_numpy(self.plan.cp_indices[self.cp_rank]).to(values.device)]

    def gather_from_cp(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the values of all positions from ``parts`` [t, ...], one per context rank."""
        if self.plan.cp_size == 1:
            return parts[0]
        values = parts[0].new_zeros(self.num_positions, *parts[0].shape[1:])
        values[torch.from_numpy(self.plan.cp_indices.reshape(-1)).to(values.device)] = torch.cat(list(parts))
        return values

    def unpack(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return ``values`` of all positions as one tensor per sample, [length, ...], in the order of its tokens.

        Entry 0 is zero, because nothing predicts the first token. The inverse of the shift to labels.
        """
        by_sample = []
        for positions in self.positions():
            predicted = values[positions]
            by_token = torch.zeros_like(predicted)
            by_token[1:] = predicted[:-1]
            by_sample.append(by_token)
        return by_sample


def count_micro_batches(samples: Sequence[AnySample], held: Sequence[int], **packing: Any) -> dict[str | None, int]:
    """Return the number of micro-batches that the samples ``held`` need, at least 1; by domain if packed by domain.

    packing: the arguments of ``plan_micro_batches``.
    """
    return {domain: len(batches) for domain, (_, _, batches) in _grouped(samples, held, **packing).items()}


def plan_micro_batches(
    samples: Sequence[AnySample],
    held: Sequence[int],
    num_batches: Mapping[str | None, int],
    *,
    pad_to_multiple: int = 1,
    packed: bool = False,
    cp_size: int = 1,
    count_multiple: int = 1,
    **packing: Any,
) -> list[MicroBatchPlan]:
    """Plan the micro-batches of the data-parallel rank that holds the samples at the indices ``held``.

    num_batches: of ``count_micro_batches``, the largest of all data-parallel ranks. The others are those of ``pack``.
    """
    sizes = {"pad_to_multiple": pad_to_multiple, "packed": packed, "cp_size": cp_size}
    plans = []
    for domain, (indices, lengths, batches) in _grouped(samples, held, **sizes, **packing).items():
        alignment = _packed_alignment(pad_to_multiple, cp_size)
        padded = [round_up(length, cp_length_multiple(cp_size)) for length in lengths]
        for rows in split_micro_batches(batches, num_batches[domain], padded, alignment=alignment, packed=packed):
            selected, row_lengths = tuple(indices[row] for row in rows), tuple(lengths[row] for row in rows)
            plans.append(MicroBatchPlan(selected, row_lengths, domain, packed, pad_to_multiple, cp_size))
    missing = -len(plans) % count_multiple
    domain = plans[-1].domain if plans else None
    return plans + [MicroBatchPlan((), (), domain, packed, pad_to_multiple, cp_size)] * missing


def _grouped(
    samples: Sequence[AnySample],
    held: Sequence[int],
    *,
    max_tokens: int,
    pad_to_multiple: int = 1,
    packed: bool = False,
    cp_size: int = 1,
    by_domain: bool = False,
    count_multiple: int = 1,  # of all micro-batches together, not of a domain's
) -> dict[str | None, tuple[list[int], list[int], list[list[int]]]]:
    """Return (indices of samples, their lengths, micro-batches of rows of both) by domain."""
    if cp_size > 1 and not packed:
        raise UserError(
            f"context_parallel_size {cp_size} needs packed sequences: set micro_batch.sequence_packing to true"
        )
    grouped: dict[str | None, tuple[list[int], list[int], list[list[int]]]] = {}
    for domain in sorted({sample.domain for sample in samples}) if by_domain else [None]:
        indices = [index for index in held if domain is None or samples[index].domain == domain]
        lengths = [samples[index].length for index in indices]
        batches = group_into_micro_batches(
            [round_up(length, cp_length_multiple(cp_size)) for length in lengths],
            max_tokens=max_tokens * cp_size,
            alignment=_packed_alignment(pad_to_multiple, cp_size),
            packed=packed,
        )
        grouped[domain] = indices, lengths, batches
    return grouped


def pack(
    samples: Sequence[AnySample],
    *,
    loss_weights: Mapping[str, Sequence[float | np.ndarray]],
    num_batches: Mapping[str | None, int] | None = None,
    cp_rank: int = 0,
    device: torch.device | str = "cpu",
    routed: RoutedLayers | None = None,
    **packing: Any,
) -> list[MicroBatch]:
    """Build the micro-batches of the samples that this rank holds.

    loss_weights: see ``MiniBatch``. num_batches: how many, see ``plan_micro_batches``; by default as many as needed.
    routed: the layers whose experts are replayed.
    packing: max_tokens, the limit per micro-batch and context rank, with padding (a longer sample gets a micro-batch of
    its own); pad_to_multiple, the alignment of the length on a context rank, for sequence parallelism and FP8; packed,
    whether sequences are laid end to end, required by context parallelism; cp_size; by_domain, no micro-batch mixes
    domains; count_multiple, empty micro-batches are added up to a multiple of it.
    """
    columns = [name for name in _SAMPLE_COLUMNS if any(sample.has(name) for sample in samples)]
    for name in columns:
        _check_missing(name, samples, loss_weights)
    held = [index for index, sample in enumerate(samples) if isinstance(sample, Sample)]
    if num_batches is None:
        num_batches = count_micro_batches(samples, held, **packing)
    plans = plan_micro_batches(samples, held, num_batches, **packing)
    return [_build(samples, loss_weights, columns, plan, cp_rank, device, routed) for plan in plans]


def _packed_alignment(pad_to_multiple: int, cp_size: int) -> int:
    """Alignment of the packed length over all context ranks that aligns each rank's part to ``pad_to_multiple``."""
    return pad_to_multiple if cp_size == 1 else cp_size * math.lcm(pad_to_multiple, 2)


def _check_missing(
    name: str, samples: Sequence[AnySample], loss_weights: Mapping[str, Sequence[float | np.ndarray]]
) -> None:
    """Raise ``UserError`` if a sample without ``name`` has a weight in a term that needs it."""
    # The policy term needs the engine's log-probabilities; a divergence only measures them where they exist.
    optional = {"supervised_weight"} | ({"divergence_weight"} if name == "rollout_log_probs" else set())
    weights = [loss_weights[column] for column in loss_weights if column not in optional]
    for index, sample in enumerate(samples):
        if not sample.has(name) and any(np.any(column[index]) for column in weights):
            raise UserError(f"sample {sample.id} has no {name}, others of the same update have it")


def _build(
    samples: Sequence[AnySample],
    loss_weights: Mapping[str, Sequence[float | np.ndarray]],
    sample_columns: list[str],
    plan: MicroBatchPlan,
    cp_rank: int,
    device: torch.device | str,
    routed: RoutedLayers | None,
) -> MicroBatch:
    rows = own_samples([samples[index] for index in plan.indices])
    masks = [_predicted(row.response_mask) for row in rows]

    def local(values: np.ndarray) -> np.ndarray:
        """Return the context rank's part of ``values`` [..., t]."""
        return values if plan.cp_size == 1 else values[..., plan.cp_indices[cp_rank]]

    def tensor(values: np.ndarray) -> torch.Tensor:
        return _to_device(local(values), device)

    def shifted(dtype: type, values: Sequence[Any]) -> torch.Tensor:
        return tensor(plan.shift_to_labels(plan.scatter_rows(dtype, values)))

    columns = {}
    for name in sample_columns:
        missing = np.nan if name == "rollout_log_probs" else 0.0
        values = [getattr(row, name) for row in rows]
        columns[name] = shifted(np.float32, [missing if value is None else value for value in values])
    for name, weights in loss_weights.items():
        masked = [np.where(mask, weights[index], 0.0) for index, mask in zip(plan.indices, masks, strict=True)]
        columns[name] = shifted(np.float32, masked)
    temperatures = [row.temperature if row.temperature > 0 else 1.0 for row in rows] or [1.0]
    temperature: float | torch.Tensor = temperatures[0]
    if any(value != temperatures[0] for value in temperatures):
        temperature = tensor(plan.scatter_rows(np.float32, temperatures, fill=1.0).T.reshape(-1))
    # What decides shapes is computed on the host: asking the device for it would wait for all of its work.
    padding = plan.scatter_rows(np.bool_, [False] * len(rows), fill=True)
    domains = tuple(sorted({sample.domain for sample in samples}))
    domains = domains if len(domains) > 1 else ()
    response_rows = local(plan.shift_to_labels(plan.scatter_rows(np.bool_, masks))).nonzero()[0]
    return MicroBatch(
        plan=plan,
        cp_rank=cp_rank,
        cu_seqlens=_to_device(np.array(plan.cu_seqlens, np.int32), device) if plan.packed else None,
        token_ids=tensor(plan.scatter_rows(np.int64, [row.token_ids for row in rows])),
        padding_mask=tensor(padding),
        labels=shifted(np.int64, [row.token_ids for row in rows]),
        response_mask=shifted(np.bool_, masks),
        response_rows=_to_device(response_rows, device),
        response_rows_on_host=response_rows,
        response_positions=shifted(np.int64, [np.where(mask, mask.cumsum() - 1, 0) for mask in masks]),
        response_ends=shifted(np.bool_, [_end(row, mask) for row, mask in zip(rows, masks, strict=True)]),
        temperature=temperature,
        columns=TokenColumns(**columns),
        num_tokens=int((~local(padding)).sum()),
        routes=None
        if routed is None
        else _routes(rows, plan, cp_rank, routed, pin=torch.device(device).type == "cuda"),
        domains=domains,
        domain_numbers=shifted(np.int64, [domains.index(row.domain) for row in rows]) if domains else None,
    )


def _to_device(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Return ``values`` on the device; from pinned memory, because the host waits for a copy of pageable memory."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor


def _routes(rows: Sequence[Sample], plan: MicroBatchPlan, cp_rank: int, routed: RoutedLayers, *, pin: bool) -> Routes:
    """Return the routes of the context rank's tokens in host memory; pin: for copies that do not wait."""
    count, top_k = plan.cp_indices.size, routed.num_experts_per_tok
    spread = (np.arange(count)[:, None] * top_k + np.arange(top_k)) % routed.num_experts
    experts = np.repeat(spread[:, None].astype(routed.dtype), len(routed.layers), axis=1)
    is_recorded, is_given, is_padding = (np.full(count, value) for value in (False, False, True))
    layers = list(routed.layers)
    for row, positions in zip(rows, plan.positions(), strict=True):
        tokens = np.arange(count)[positions]
        is_padding[tokens] = False
        if row.routed_experts is not None and len(row.routed_experts):
            recorded, last = np.split(tokens, [len(row.routed_experts)])
            experts[recorded], is_recorded[recorded], is_given[recorded] = row.routed_experts[:, layers], True, True
            experts[last], is_given[last] = row.routed_experts[-1, layers], routed.gives_last
    if (is_given | is_padding).all():
        is_given[:] = True
    local = [torch.from_numpy(values[plan.cp_indices[cp_rank]]) for values in (experts, is_recorded, is_given)]
    return Routes(*(tensor.pin_memory() if pin else tensor for tensor in local), is_complete=bool(local[2].all()))


def _end(sample: Sample, mask: np.ndarray) -> np.ndarray:
    """Return which token [length] ended the response, by the response mask; none of one that was cut."""
    end = np.zeros(len(mask), dtype=bool)
    if sample.finish_reason == "stop" and mask.any():
        end[np.flatnonzero(mask)[-1]] = True
    return end


def _predicted(response_mask: np.ndarray) -> np.ndarray:
    """Return the mask without the first token of the sequence, which nothing predicts."""
    mask = response_mask.copy()
    mask[:1] = False
    return mask
