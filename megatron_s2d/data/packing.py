"""Samples to micro-batches: dealt to data ranks by a token budget, laid out, and shifted to labels (only here).

Every rank holds the samples of the whole update and computes the same plan, so denominators are global by construction
and nothing here communicates. A micro-batch has one of two layouts:

    padded   a row a sequence, padded at its end; attention is causal, so no token sees the padding
    packed   one row, the sequences end to end; what is missing to a multiple follows as a sequence of padding

Per-token arrays are flattened in Megatron's order, [sequence, batch]: entry ``s * B + b`` belongs to the position that
PREDICTS token ``s + 1`` of row ``b``. The last position of a sequence predicts nothing. Context-parallel ranks hold parts
of packed sequences (``parallel/context.py``), each of which is padded so that it can be cut.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_s2d.config.base import UserError
from megatron_s2d.objectives.terms import TokenColumns
from megatron_s2d.parallel.context import held_positions, pieces
from megatron_s2d.records import Sample

_SAMPLE_COLUMNS = ("old_log_probs", "rollout_log_probs", "advantages", "teacher_log_probs", "reference_log_probs")


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateBatch:
    """What one optimizer update trains on, over all data-parallel ranks."""

    samples: Sequence[Sample]  # n
    # weight column -> one entry a sample: the weight of its response tokens, a number or [length]
    weights: Mapping[str, Sequence[float | np.ndarray]]

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens, padding left out."""
        return sum(len(sample.token_ids) for sample in self.samples)


@dataclasses.dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass of one data-parallel rank; N = S * B, and B = 1 where it is packed.

    With context parallelism arrays by position are this rank's: N = S / ranks.
    """

    indices: tuple[int, ...]  # sequences' places in the samples; a batch without any is padding
    lengths: tuple[int, ...]  # tokens of each sequence
    starts: tuple[int, ...]  # of each sequence among all S positions, where packed
    bounds: torch.Tensor | None  # [sequences + 1] int32, where each begins and the last ends; None where padded
    longest: int  # tokens of the longest sequence, with padding
    held: torch.Tensor | None  # [context ranks, N] int64, the positions that each holds; None for a single one
    context_rank: int
    token_ids: torch.Tensor  # [B, S] int64 (with context parallelism [1, N])
    padding_mask: torch.Tensor  # as token_ids, bool, True at padding
    labels: torch.Tensor  # [N] int64, the token that each position predicts (0 at the end of a row)
    response_mask: torch.Tensor  # [N] bool, True where the predicted token is part of a response
    response_positions: torch.Tensor  # [N] int64, place of the predicted token in its response; 0 elsewhere
    temperature: float | torch.Tensor  # of the log-probabilities; [N] where rows differ
    columns: TokenColumns  # [N] each
    num_tokens: int  # of this rank, without padding
    domain: str | None  # of all rows, where samples were packed by domain

    @property
    def shape(self) -> tuple[int, int]:
        """(sequence, batch)."""
        return self.token_ids.shape[1], self.token_ids.shape[0]

    @property
    def num_positions(self) -> int:
        """S * B, over all context ranks."""
        return self.labels.numel() * (1 if self.held is None else len(self.held))

    def positions(self) -> list[slice]:
        """Where each sequence's tokens are among all positions."""
        if self.bounds is None:
            rows = self.token_ids.shape[0]
            return [slice(row, row + length * rows, rows) for row, length in enumerate(self.lengths)]
        return [slice(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True)]

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This context rank's [N, ...] of values of all positions."""
        return whole if self.held is None else whole[self.held[self.context_rank].to(whole.device)]

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of all positions from ``parts`` [N, ...], one of each context rank."""
        if self.held is None:
            return parts[0]
        whole = parts[0].new_zeros(self.num_positions, *parts[0].shape[1:])
        whole[self.held.flatten()] = torch.cat(list(parts))
        return whole

    def per_sample(self, values: torch.Tensor) -> list[torch.Tensor]:
        """``values`` of all positions as one tensor a sample, [length, ...], entry t for token t (entry 0: zeros).

        The inverse of the shift to labels.
        """
        found = []
        for place in self.positions():
            own = values[place]
            sample = torch.zeros_like(own)
            sample[1:] = own[:-1]
            found.append(sample)
        return found


def pack(
    samples: Sequence[Sample],
    *,
    weights: Mapping[str, Sequence[float | np.ndarray]],
    max_tokens: int,
    data_rank: int = 0,
    data_size: int = 1,
    multiple: int = 1,
    packed: bool = False,
    context_rank: int = 0,
    context_size: int = 1,
    by_domain: bool = False,
    device: torch.device | str = "cpu",
) -> list[MicroBatch]:
    """The micro-batches of ``data_rank``: the same number on every data rank, which pipelines and experts rely on.

    max_tokens: of one micro-batch on one context rank, padding included (a longer sample gets its own). multiple: what
    its length there is a multiple of, for sequence parallelism and FP8. packed: sequences end to end; context
    parallelism needs it. by_domain: no micro-batch holds two domains. weights: as in ``UpdateBatch``.
    """
    if context_size > 1 and not packed:
        raise UserError(
            f"context_parallel_size {context_size} cuts sequences that lie end to end: set micro_batch.packed to true"
        )
    layout = _Arrangement(packed, multiple, context_size, context_rank)
    present = [name for name in _SAMPLE_COLUMNS if any(getattr(sample, name) is not None for sample in samples)]
    for name in present:
        _refuse_gaps(name, samples, weights)
    found = []
    for domain in sorted({sample.domain for sample in samples}) if by_domain else [None]:
        chosen = [place for place, sample in enumerate(samples) if domain is None or sample.domain == domain]
        lengths = [len(samples[place].token_ids) for place in chosen]
        plan = plan_micro_batches(
            [layout.padded(length) for length in lengths],
            data_size=data_size,
            max_tokens=max_tokens * context_size,
            multiple=layout.whole_multiple,
            packed=packed,
        )
        for rows in plan[data_rank]:
            indices = [chosen[row] for row in rows]
            found.append(_build(samples, weights, present, indices, layout, domain, device))
    return found


@dataclasses.dataclass(frozen=True)
class _Arrangement:
    """How sequences share a micro-batch."""

    packed: bool
    multiple: int  # of a context rank's length
    context_size: int
    context_rank: int

    @property
    def whole_multiple(self) -> int:
        """What the length over all context ranks is a multiple of."""
        return self.context_size * (self.multiple if self.context_size == 1 else math.lcm(self.multiple, 2))

    def padded(self, length: int) -> int:
        """Places that a sequence takes."""
        return _padded(length, pieces(self.context_size))


def plan_micro_batches(
    lengths: Sequence[int], *, data_size: int, max_tokens: int, multiple: int = 1, packed: bool = False
) -> list[list[list[int]]]:
    """Indices of samples by data rank and micro-batch, longest first; ranks get like work.

    Padded, samples of like length share a micro-batch; packed, a sample goes where it fits first. Deterministic. Where
    there are fewer samples than ranks, some micro-batches are empty.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    size = _packed_size if packed else _padded_size
    batches: list[list[int]] = []
    for index in order:
        open_ones = batches if packed else batches[-1:]
        for batch in open_ones:
            if size([lengths[other] for other in [*batch, index]], multiple) <= max_tokens:
                batch.append(index)
                break
        else:
            batches.append([index])
    rounds = max(1, -(-len(batches) // data_size))
    while len(batches) < rounds * data_size:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]), default=None)
        if largest is None or len(batches[largest]) < 2:
            batches.append([])
            continue
        half = len(batches[largest]) // 2
        batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
    cost = [size([lengths[index] for index in batch], multiple) for batch in batches]
    by_cost = sorted(range(len(batches)), key=lambda i: (-cost[i], i))
    dealt: list[list[list[int]]] = [[] for _ in range(data_size)]
    for place, index in enumerate(by_cost):
        turn, rank = divmod(place, data_size)
        dealt[rank if turn % 2 == 0 else data_size - 1 - rank].append(batches[index])
    return dealt


def _refuse_gaps(name: str, samples: Sequence[Sample], weights: Mapping[str, Sequence[float | np.ndarray]]) -> None:
    """Some samples have ``name``: those without it may take part in the supervised term only."""
    columns = [weights[column] for column in weights if column != "supervised_weight"]
    for place, sample in enumerate(samples):
        if getattr(sample, name) is None and any(np.any(column[place]) for column in columns):
            raise UserError(f"sample {sample.id} has no {name}, others of the same update have it")


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _padded_size(lengths: Sequence[int], multiple: int) -> int:
    return len(lengths) * _padded(max(lengths, default=0), multiple)


def _packed_size(lengths: Sequence[int], multiple: int) -> int:
    return _padded(sum(lengths), multiple)


def _build(
    samples: Sequence[Sample],
    weights: Mapping[str, Sequence[float | np.ndarray]],
    present: list[str],
    indices: list[int],
    layout: _Arrangement,
    domain: str | None,
    device: torch.device | str,
) -> MicroBatch:
    rows = [samples[index] for index in indices]
    grid = _Grid.of([len(row.token_ids) for row in rows], layout)
    masks = [_predicted(row.response_mask) for row in rows]
    token_ids = grid.fill(np.int64, [row.token_ids for row in rows])
    columns = {}
    for name in present:
        given = [getattr(row, name) for row in rows]
        columns[name] = grid.fill(np.float32, [0.0 if values is None else values for values in given])
    for name, values in weights.items():
        own = [np.where(mask, values[index], 0.0) for index, mask in zip(indices, masks, strict=True)]
        columns[name] = grid.fill(np.float32, own)
    temperatures = [row.temperature if row.temperature > 0 else 1.0 for row in rows] or [1.0]
    temperature: float | torch.Tensor = temperatures[0]
    if any(value != temperatures[0] for value in temperatures):
        spread = grid.fill(np.float32, temperatures, elsewhere=1.0)
        temperature = torch.from_numpy(grid.own(spread.T.reshape(-1))).to(device)
    positions = [np.where(mask, mask.cumsum() - 1, 0) for mask in masks]
    padding = grid.own(grid.fill(np.bool_, [False] * len(rows), elsewhere=True))
    return MicroBatch(
        indices=tuple(indices),
        lengths=grid.lengths,
        starts=tuple(column for _, column in grid.places) if layout.packed else (),
        bounds=torch.tensor(grid.bounds, dtype=torch.int32, device=device) if layout.packed else None,
        longest=max(np.diff(grid.bounds).tolist()) if layout.packed else grid.shape[1],
        held=None if layout.context_size == 1 else torch.from_numpy(grid.held).to(device),
        context_rank=layout.context_rank,
        token_ids=torch.from_numpy(grid.own(token_ids)).to(device),
        padding_mask=torch.from_numpy(padding).to(device),
        labels=grid.by_predictor(token_ids, device),
        response_mask=grid.by_predictor(grid.fill(np.bool_, masks), device),
        response_positions=grid.by_predictor(grid.fill(np.int64, positions), device),
        temperature=temperature,
        columns=TokenColumns(**{name: grid.by_predictor(values, device) for name, values in columns.items()}),
        num_tokens=int((~padding).sum()),
        domain=domain,
    )


def _predicted(response_mask: np.ndarray) -> np.ndarray:
    """The mask without a sequence's first token, which nothing predicts."""
    mask = response_mask.copy()
    mask[:1] = False
    return mask


@dataclasses.dataclass(frozen=True, eq=False)
class _Grid:
    """Where the tokens of a micro-batch's sequences stand in arrays [B, S]."""

    lengths: tuple[int, ...]
    places: tuple[tuple[int, int], ...]  # row and column of each sequence's first token
    shape: tuple[int, int]
    layout: _Arrangement

    @classmethod
    def of(cls, lengths: Sequence[int], layout: _Arrangement) -> _Grid:
        """A batch without sequences is one row of padding."""
        if layout.packed:
            ends = np.cumsum([0, *(layout.padded(length) for length in lengths)]).tolist()
            places = tuple((0, end) for end in ends[:-1])
            return cls(tuple(lengths), places, (1, _padded(max(1, ends[-1]), layout.whole_multiple)), layout)
        places = tuple((row, 0) for row in range(len(lengths)))
        shape = (max(1, len(lengths)), _padded(max(lengths, default=1), layout.multiple))
        return cls(tuple(lengths), places, shape, layout)

    @property
    def bounds(self) -> list[int]:
        """Of a packed batch: where each sequence begins, that of the padding at the end included, and the end."""
        ends = [column + self.layout.padded(own) for (_, column), own in zip(self.places, self.lengths, strict=True)]
        starts = [column for _, column in self.places]
        filled = max(ends, default=0)
        return [*starts, *([filled] if filled < self.shape[1] else []), self.shape[1]]

    @functools.cached_property
    def held(self) -> np.ndarray:
        """[context ranks, N] the positions of every context rank."""
        return held_positions(self.bounds, self.layout.context_size)

    def own(self, values: np.ndarray) -> np.ndarray:
        """The context rank's part of ``values`` [..., S]."""
        return values if self.layout.context_size == 1 else values[..., self.held[self.layout.context_rank]]

    def fill(self, dtype: type, values: Sequence[Any], elsewhere: Any = 0) -> np.ndarray:
        """[B, S] with each sequence's ``values`` ([length], or one for all its tokens) at its tokens."""
        filled = np.full(self.shape, elsewhere, dtype=dtype)
        for (row, column), length, own in zip(self.places, self.lengths, values, strict=True):
            filled[row, column : column + length] = own
        return filled

    def by_predictor(self, values: np.ndarray, device: torch.device | str) -> torch.Tensor:
        """[B, S] by token -> [S * B] by the position that predicts it; 0 where a position predicts nothing."""
        shifted = np.zeros_like(values.T)
        shifted[:-1] = values.T[1:]
        for row, column in self.places:
            if column:
                shifted[column - 1, row] = 0
        return torch.from_numpy(self.own(shifted.reshape(-1))).to(device)
