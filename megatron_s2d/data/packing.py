"""Samples to micro-batches: dealt to data ranks by a token budget, laid out, and shifted to labels (only here).

Every rank holds the samples of the whole update and computes the same plan, so denominators are global by construction
and nothing here communicates. A micro-batch has one of two layouts:

    padded   a row a sequence, padded at its end; attention is causal, so no token sees the padding
    packed   one row, the sequences end to end; what is missing to a multiple follows as a sequence of padding

Per-token arrays are flattened in Megatron's order, [sequence, batch]: entry ``s * B + b`` belongs to the position that
PREDICTS token ``s + 1`` of row ``b``. The last position of a sequence predicts nothing. Context-parallel ranks hold
parts of packed sequences (``parallel/context_parallel.py``), each of which is padded so that it can be cut.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_s2d.columns import TokenColumns
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.context_parallel import cp_positions, num_pieces
from megatron_s2d.records import Sample

_SAMPLE_COLUMNS = ("old_log_probs", "rollout_log_probs", "advantages", "teacher_log_probs", "reference_log_probs")


@dataclasses.dataclass(frozen=True, eq=False)
class MiniBatch:
    """What one optimizer update trains on, over all data-parallel ranks."""

    samples: Sequence[Sample]  # n
    # weight column -> one entry a sample: the weight of its response tokens, a number or [length]
    loss_weights: Mapping[str, Sequence[float | np.ndarray]]

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens, padding left out."""
        return sum(len(sample.token_ids) for sample in self.samples)


@dataclasses.dataclass(frozen=True)
class MicroBatchPlan:
    """A micro-batch before it is built: which samples, and where their tokens stand in arrays [rows, length]."""

    indices: tuple[int, ...]  # sequences' places in the samples; without any there is one row of padding
    lengths: tuple[int, ...]  # tokens of each
    domain: str | None  # of all, where samples were packed by domain
    packed: bool = False
    pad_to_multiple: int = 1  # of the length on one context rank
    cp_size: int = 1

    @functools.cached_property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """Row and column of each sequence's first token."""
        if not self.packed:
            return tuple((row, 0) for row in range(len(self.lengths)))
        ends = np.cumsum([0, *map(self._padded_length, self.lengths)]).tolist()
        return tuple((0, end) for end in ends[:-1])

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """Rows, and their length over all context ranks."""
        if not self.packed:
            return max(1, len(self.lengths)), _padded(max(self.lengths, default=1), self.pad_to_multiple)
        filled = max(1, sum(map(self._padded_length, self.lengths)))
        return 1, _padded(filled, packed_length_multiple(self.pad_to_multiple, self.cp_size))

    @property
    def cu_seqlens(self) -> list[int]:
        """Of a packed one: where each sequence begins, that of the padding at the end included, and the end."""
        filled = sum(map(self._padded_length, self.lengths))
        starts = [column for _, column in self.offsets] + ([filled] if filled < self.shape[1] else [])
        return [*starts, self.shape[1]]

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence, with padding."""
        return max(np.diff(self.cu_seqlens).tolist()) if self.packed else self.shape[1]

    @functools.cached_property
    def cp_indices(self) -> np.ndarray:
        """[context ranks, N] int64: the positions of every context rank. Positions are in the order [length, rows]."""
        rows, length = self.shape
        return cp_positions(self.cu_seqlens if self.packed else [0, rows * length], self.cp_size)

    def positions(self) -> list[slice]:
        """Where each sequence's tokens are among all positions."""
        rows = self.shape[0]
        return [
            slice(column * rows + row, (column + length) * rows + row - rows + 1, rows)
            for (row, column), length in zip(self.offsets, self.lengths, strict=True)
        ]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which context rank holds each of ``positions``, and its number there."""
        where = np.empty(self.cp_indices.size, dtype=np.int64)
        where[self.cp_indices.reshape(-1)] = np.arange(self.cp_indices.size)
        return np.divmod(where[positions], self.cp_indices.shape[1])

    def scatter_rows(self, dtype: type, values: Sequence[Any], elsewhere: Any = 0) -> np.ndarray:
        """[rows, length] with each sequence's ``values`` ([its length], or one for all tokens) at its tokens."""
        filled = np.full(self.shape, elsewhere, dtype=dtype)
        for (row, column), length, own in zip(self.offsets, self.lengths, values, strict=True):
            filled[row, column : column + length] = own
        return filled

    def shift_to_labels(self, values: np.ndarray) -> np.ndarray:
        """[rows, length] by token -> [positions] by the one that predicts it; 0 where a position predicts nothing."""
        shifted = np.zeros_like(values.T)
        shifted[:-1] = values.T[1:]
        for row, column in self.offsets:
            if column:
                shifted[column - 1, row] = 0
        return shifted.reshape(-1)

    def _padded_length(self, length: int) -> int:
        """Columns that a packed sequence takes."""
        return _padded(length, num_pieces(self.cp_size))


@dataclasses.dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass of one data-parallel rank; N = S * B, and B = 1 where it is packed.

    With context parallelism arrays by position are this rank's: N = S / ranks.
    """

    plan: MicroBatchPlan
    cp_rank: int
    cu_seqlens: torch.Tensor | None  # [sequences + 1] int32, where each begins and the last ends; None where padded
    token_ids: torch.Tensor  # [B, S] int64 (with context parallelism [1, N])
    padding_mask: torch.Tensor  # as token_ids, bool, True at padding
    labels: torch.Tensor  # [N] int64, the token that each position predicts (0 at the end of a sequence)
    response_mask: torch.Tensor  # [N] bool, True where the predicted token is part of a response
    response_positions: torch.Tensor  # [N] int64, place of the predicted token in its response; 0 elsewhere
    temperature: float | torch.Tensor  # of the log-probabilities; [N] where rows differ
    columns: TokenColumns  # [N] each
    num_tokens: int  # of this rank, without padding

    @property
    def indices(self) -> tuple[int, ...]:
        """The sequences' places in the samples that were packed."""
        return self.plan.indices

    @property
    def domain(self) -> str | None:
        """Of all sequences, where samples were packed by domain."""
        return self.plan.domain

    @property
    def shape(self) -> tuple[int, int]:
        """(sequence, batch), of this context rank."""
        return self.token_ids.shape[1], self.token_ids.shape[0]

    @property
    def num_positions(self) -> int:
        """S * B, over all context ranks."""
        return self.plan.cp_indices.size

    def positions(self) -> list[slice]:
        """Where each sequence's tokens are among all positions."""
        return self.plan.positions()

    def slice_for_cp(self, whole: torch.Tensor) -> torch.Tensor:
        """This context rank's [N, ...] of values of all positions."""
        if self.plan.cp_size == 1:
            return whole
        return whole[torch.from_numpy(self.plan.cp_indices[self.cp_rank]).to(whole.device)]

    def gather_from_cp(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Values of all positions from ``parts`` [N, ...], one of each context rank."""
        if self.plan.cp_size == 1:
            return parts[0]
        whole = parts[0].new_zeros(self.num_positions, *parts[0].shape[1:])
        whole[torch.from_numpy(self.plan.cp_indices.reshape(-1)).to(whole.device)] = torch.cat(list(parts))
        return whole

    def unpack(self, values: torch.Tensor) -> list[torch.Tensor]:
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


def plan_micro_batches(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    dp_size: int = 1,
    multiple: int = 1,
    packed: bool = False,
    cp_size: int = 1,
    by_domain: bool = False,
) -> list[list[MicroBatchPlan]]:
    """The micro-batches of every data rank, the same number for each; arguments as in ``pack``."""
    if cp_size > 1 and not packed:
        raise UserError(
            f"context_parallel_size {cp_size} cuts sequences that lie end to end: set micro_batch.sequence_packing to true"
        )
    found: list[list[MicroBatchPlan]] = [[] for _ in range(dp_size)]
    for domain in sorted({sample.domain for sample in samples}) if by_domain else [None]:
        chosen = [place for place, sample in enumerate(samples) if domain is None or sample.domain == domain]
        lengths = [len(samples[place].token_ids) for place in chosen]
        plan = assign_micro_batches(
            [_padded(length, num_pieces(cp_size)) for length in lengths],
            dp_size=dp_size,
            max_tokens=max_tokens * cp_size,
            multiple=packed_length_multiple(multiple, cp_size),
            packed=packed,
        )
        for dealt, batches in zip(found, plan, strict=True):
            for rows in batches:
                indices, own = tuple(chosen[row] for row in rows), tuple(lengths[row] for row in rows)
                dealt.append(MicroBatchPlan(indices, own, domain, packed, multiple, cp_size))
    return found


def packed_length_multiple(multiple: int, cp_size: int) -> int:
    """What a packed length over all context ranks is a multiple of, so that each rank's is one of ``multiple``."""
    return multiple if cp_size == 1 else cp_size * math.lcm(multiple, 2)


def pack(
    samples: Sequence[Sample],
    *,
    weights: Mapping[str, Sequence[float | np.ndarray]],
    max_tokens: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    multiple: int = 1,
    packed: bool = False,
    cp_rank: int = 0,
    cp_size: int = 1,
    by_domain: bool = False,
    device: torch.device | str = "cpu",
) -> list[MicroBatch]:
    """The micro-batches of ``dp_rank``: the same number on every data rank, which pipelines and experts rely on.

    max_tokens: of one micro-batch on one context rank, padding included (a longer sample gets its own). multiple: what
    its length there is a multiple of, for sequence parallelism and FP8. packed: sequences end to end; context
    parallelism needs it. by_domain: no micro-batch holds two domains. weights: as in ``MiniBatch``.
    """
    present = [name for name in _SAMPLE_COLUMNS if any(getattr(sample, name) is not None for sample in samples)]
    for name in present:
        _refuse_gaps(name, samples, weights)
    dealt = plan_micro_batches(
        samples, max_tokens=max_tokens, dp_size=dp_size, multiple=multiple, packed=packed,
        cp_size=cp_size, by_domain=by_domain,
    )  # fmt: skip
    return [_build(samples, weights, present, batch, cp_rank, device) for batch in dealt[dp_rank]]


def assign_micro_batches(
    lengths: Sequence[int], *, dp_size: int, max_tokens: int, multiple: int = 1, packed: bool = False
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
    rounds = max(1, -(-len(batches) // dp_size))
    while len(batches) < rounds * dp_size:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]), default=None)
        if largest is None or len(batches[largest]) < 2:
            batches.append([])
            continue
        half = len(batches[largest]) // 2
        batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
    cost = [size([lengths[index] for index in batch], multiple) for batch in batches]
    by_cost = sorted(range(len(batches)), key=lambda i: (-cost[i], i))
    dealt: list[list[list[int]]] = [[] for _ in range(dp_size)]
    for place, index in enumerate(by_cost):
        turn, rank = divmod(place, dp_size)
        dealt[rank if turn % 2 == 0 else dp_size - 1 - rank].append(batches[index])
    return dealt


def _refuse_gaps(name: str, samples: Sequence[Sample], weights: Mapping[str, Sequence[float | np.ndarray]]) -> None:
    """Some samples have ``name``: those without it may take part only in terms that can do without."""
    # What the engine said is used by the policy term; a divergence measures it where it is there.
    without = {"supervised_weight"} | ({"divergence_weight"} if name == "rollout_log_probs" else set())
    columns = [weights[column] for column in weights if column not in without]
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
    batch: MicroBatchPlan,
    cp_rank: int,
    device: torch.device | str,
) -> MicroBatch:
    rows = [samples[index] for index in batch.indices]
    masks = [_predicted(row.response_mask) for row in rows]

    def tensor(values: np.ndarray) -> torch.Tensor:
        """The context rank's part of ``values`` [..., positions]."""
        own = values if batch.cp_size == 1 else values[..., batch.cp_indices[cp_rank]]
        return torch.from_numpy(own).to(device)

    def shifted(dtype: type, values: Sequence[Any]) -> torch.Tensor:
        return tensor(batch.shift_to_labels(batch.scatter_rows(dtype, values)))

    columns = {}
    for name in present:
        missing = np.nan if name == "rollout_log_probs" else 0.0
        given = [getattr(row, name) for row in rows]
        columns[name] = shifted(np.float32, [missing if values is None else values for values in given])
    for name, values in weights.items():
        own = [np.where(mask, values[index], 0.0) for index, mask in zip(batch.indices, masks, strict=True)]
        columns[name] = shifted(np.float32, own)
    temperatures = [row.temperature if row.temperature > 0 else 1.0 for row in rows] or [1.0]
    temperature: float | torch.Tensor = temperatures[0]
    if any(value != temperatures[0] for value in temperatures):
        temperature = tensor(batch.scatter_rows(np.float32, temperatures, elsewhere=1.0).T.reshape(-1))
    padding = tensor(batch.scatter_rows(np.bool_, [False] * len(rows), elsewhere=True))
    return MicroBatch(
        plan=batch,
        cp_rank=cp_rank,
        cu_seqlens=torch.tensor(batch.cu_seqlens, dtype=torch.int32, device=device) if batch.packed else None,
        token_ids=tensor(batch.scatter_rows(np.int64, [row.token_ids for row in rows])),
        padding_mask=padding,
        labels=shifted(np.int64, [row.token_ids for row in rows]),
        response_mask=shifted(np.bool_, masks),
        response_positions=shifted(np.int64, [np.where(mask, mask.cumsum() - 1, 0) for mask in masks]),
        temperature=temperature,
        columns=TokenColumns(**columns),
        num_tokens=int((~padding).sum()),
    )


def _predicted(response_mask: np.ndarray) -> np.ndarray:
    """The mask without a sequence's first token, which nothing predicts."""
    mask = response_mask.copy()
    mask[:1] = False
    return mask
