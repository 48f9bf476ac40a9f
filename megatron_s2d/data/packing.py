"""Packs samples into micro-batches under a token budget, assigns them to data-parallel ranks, and shifts to labels.

Every rank has the samples of the whole update and computes the same plan, so loss denominators are global by
construction and nothing here communicates. A micro-batch has one of two layouts:

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

from megatron_s2d.arithmetic import ceil_div, round_up
from megatron_s2d.columns import TokenColumns
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.context_parallel import cp_length_multiple, cp_positions
from megatron_s2d.records import Sample

_SAMPLE_COLUMNS = ("old_log_probs", "rollout_log_probs", "advantages", "teacher_log_probs", "reference_log_probs")


@dataclasses.dataclass(frozen=True, eq=False)
class MiniBatch:
    """The samples of one optimizer update, over all data-parallel ranks."""

    samples: Sequence[Sample]
    # weight column -> one entry per sample: the weight of its response tokens, a number or [length]
    loss_weights: Mapping[str, Sequence[float | np.ndarray]]

    @property
    def num_tokens(self) -> int:
        """Number of prompt and response tokens, without padding."""
        return sum(len(sample.token_ids) for sample in self.samples)


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
    response_positions: torch.Tensor  # [t] int64, index of the predicted token in its response; 0 elsewhere
    temperature: float | torch.Tensor  # of the log-probabilities; [t] if sequences differ
    columns: TokenColumns  # [t] each
    num_tokens: int  # of this rank, without padding

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


def plan_micro_batches(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    dp_size: int = 1,
    pad_to_multiple: int = 1,
    packed: bool = False,
    cp_size: int = 1,
    by_domain: bool = False,
) -> list[list[MicroBatchPlan]]:
    """Plan the micro-batches of every data-parallel rank, the same number for each; arguments as in ``pack``."""
    if cp_size > 1 and not packed:
        raise UserError(
            f"context_parallel_size {cp_size} needs packed sequences: set micro_batch.sequence_packing to true"
        )
    plans: list[list[MicroBatchPlan]] = [[] for _ in range(dp_size)]
    for domain in sorted({sample.domain for sample in samples}) if by_domain else [None]:
        selected = [index for index, sample in enumerate(samples) if domain is None or sample.domain == domain]
        lengths = [len(samples[index].token_ids) for index in selected]
        assigned = assign_micro_batches(
            [round_up(length, cp_length_multiple(cp_size)) for length in lengths],
            dp_size=dp_size,
            max_tokens=max_tokens * cp_size,
            alignment=_packed_alignment(pad_to_multiple, cp_size),
            packed=packed,
        )
        for rank_plans, batches in zip(plans, assigned, strict=True):
            for rows in batches:
                indices, row_lengths = tuple(selected[row] for row in rows), tuple(lengths[row] for row in rows)
                rank_plans.append(MicroBatchPlan(indices, row_lengths, domain, packed, pad_to_multiple, cp_size))
    return plans


def pack(
    samples: Sequence[Sample],
    *,
    loss_weights: Mapping[str, Sequence[float | np.ndarray]],
    max_tokens: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    pad_to_multiple: int = 1,
    packed: bool = False,
    cp_rank: int = 0,
    cp_size: int = 1,
    by_domain: bool = False,
    device: torch.device | str = "cpu",
) -> list[MicroBatch]:
    """Build the micro-batches of ``dp_rank``: the same number on every rank, as pipelines and expert parallelism need.

    max_tokens: limit per micro-batch and context rank, with padding (a longer sample gets a micro-batch of its own).
    pad_to_multiple: alignment of the length on a context rank, for sequence parallelism and FP8. packed: sequences end
    to end, required by context parallelism. by_domain: no micro-batch mixes domains. loss_weights: see ``MiniBatch``.
    """
    columns = [name for name in _SAMPLE_COLUMNS if any(getattr(sample, name) is not None for sample in samples)]
    for name in columns:
        _check_missing(name, samples, loss_weights)
    plans = plan_micro_batches(
        samples, max_tokens=max_tokens, dp_size=dp_size, pad_to_multiple=pad_to_multiple, packed=packed,
        cp_size=cp_size, by_domain=by_domain,
    )  # fmt: skip
    return [_build(samples, loss_weights, columns, plan, cp_rank, device) for plan in plans[dp_rank]]


def assign_micro_batches(
    lengths: Sequence[int], *, dp_size: int, max_tokens: int, alignment: int = 1, packed: bool = False
) -> list[list[list[int]]]:
    """Return the indices of samples by data-parallel rank and micro-batch, with balanced work per rank.

    Longest first. Padded: samples of similar length share a micro-batch; packed: first fit. Deterministic. With fewer
    samples than ranks some micro-batches are empty.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    size = _packed_size if packed else _padded_size
    batches: list[list[int]] = []
    for index in order:
        open_batches = batches if packed else batches[-1:]
        for batch in open_batches:
            if size([lengths[other] for other in [*batch, index]], alignment) <= max_tokens:
                batch.append(index)
                break
        else:
            batches.append([index])
    batches_per_rank = max(1, ceil_div(len(batches), dp_size))
    while len(batches) < batches_per_rank * dp_size:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]), default=None)
        if largest is None or len(batches[largest]) < 2:
            batches.append([])
            continue
        half = len(batches[largest]) // 2
        batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
    cost = [size([lengths[index] for index in batch], alignment) for batch in batches]
    by_cost = sorted(range(len(batches)), key=lambda i: (-cost[i], i))
    assigned: list[list[list[int]]] = [[] for _ in range(dp_size)]
    for number, index in enumerate(by_cost):  # forwards and backwards over the ranks
        turn, rank = divmod(number, dp_size)
        assigned[rank if turn % 2 == 0 else dp_size - 1 - rank].append(batches[index])
    return assigned


def _packed_alignment(pad_to_multiple: int, cp_size: int) -> int:
    """Alignment of the packed length over all context ranks that aligns each rank's part to ``pad_to_multiple``."""
    return pad_to_multiple if cp_size == 1 else cp_size * math.lcm(pad_to_multiple, 2)


def _check_missing(
    name: str, samples: Sequence[Sample], loss_weights: Mapping[str, Sequence[float | np.ndarray]]
) -> None:
    """Raise ``UserError`` if a sample without ``name`` has a weight in a term that needs it."""
    # The policy term needs the engine's log-probabilities; a divergence only measures them where they exist.
    optional = {"supervised_weight"} | ({"divergence_weight"} if name == "rollout_log_probs" else set())
    weights = [loss_weights[column] for column in loss_weights if column not in optional]
    for index, sample in enumerate(samples):
        if getattr(sample, name) is None and any(np.any(column[index]) for column in weights):
            raise UserError(f"sample {sample.id} has no {name}, others of the same update have it")


def _padded_size(lengths: Sequence[int], alignment: int) -> int:
    return len(lengths) * round_up(max(lengths, default=0), alignment)


def _packed_size(lengths: Sequence[int], alignment: int) -> int:
    return round_up(sum(lengths), alignment)


def _build(
    samples: Sequence[Sample],
    loss_weights: Mapping[str, Sequence[float | np.ndarray]],
    sample_columns: list[str],
    plan: MicroBatchPlan,
    cp_rank: int,
    device: torch.device | str,
) -> MicroBatch:
    rows = [samples[index] for index in plan.indices]
    masks = [_predicted(row.response_mask) for row in rows]

    def tensor(values: np.ndarray) -> torch.Tensor:
        """Return the context rank's part of ``values`` [..., t]."""
        local = values if plan.cp_size == 1 else values[..., plan.cp_indices[cp_rank]]
        return torch.from_numpy(local).to(device)

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
    padding = tensor(plan.scatter_rows(np.bool_, [False] * len(rows), fill=True))
    return MicroBatch(
        plan=plan,
        cp_rank=cp_rank,
        cu_seqlens=torch.tensor(plan.cu_seqlens, dtype=torch.int32, device=device) if plan.packed else None,
        token_ids=tensor(plan.scatter_rows(np.int64, [row.token_ids for row in rows])),
        padding_mask=padding,
        labels=shifted(np.int64, [row.token_ids for row in rows]),
        response_mask=shifted(np.bool_, masks),
        response_positions=shifted(np.int64, [np.where(mask, mask.cumsum() - 1, 0) for mask in masks]),
        temperature=temperature,
        columns=TokenColumns(**columns),
        num_tokens=int((~padding).sum()),
    )


def _predicted(response_mask: np.ndarray) -> np.ndarray:
    """Return the mask without the first token of the sequence, which nothing predicts."""
    mask = response_mask.copy()
    mask[:1] = False
    return mask
