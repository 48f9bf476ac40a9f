"""Samples to micro-batches: dealt to data-parallel ranks by a token budget, padded, and shifted to labels (only here).

Every rank holds the samples of the whole update and computes the same plan, so denominators are global by construction
and nothing here communicates. A micro-batch is padded at the end of each row: attention is causal, so no token sees the
padding. Per-token arrays are flattened in Megatron's order, [sequence, batch]: entry ``s * B + b`` belongs to the
position that PREDICTS token ``s + 1`` of row ``b``.

Left out: sequences laid end to end and context parallelism, which need Transformer Engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megatron_s2d.config.base import UserError
from megatron_s2d.objectives.terms import TokenColumns
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
    """One forward pass of one data-parallel rank; N = S * B."""

    indices: tuple[int, ...]  # rows' positions in the samples that were packed; a batch without any has one padding row
    token_ids: torch.Tensor  # [B, S] int64
    padding_mask: torch.Tensor  # [B, S] bool, True at padding
    labels: torch.Tensor  # [N] int64, the token that each position predicts (0 at the end of a row)
    response_mask: torch.Tensor  # [N] bool, True where the predicted token is part of a response
    response_positions: torch.Tensor  # [N] int64, place of the predicted token in its response; 0 elsewhere
    temperature: float | torch.Tensor  # of the log-probabilities; [N] where rows differ
    columns: TokenColumns  # [N] each
    num_tokens: int  # without padding
    domain: str | None  # of all rows, where samples were packed by domain

    @property
    def shape(self) -> tuple[int, int]:
        """(sequence, batch)."""
        return self.token_ids.shape[1], self.token_ids.shape[0]

    def per_sample(self, values: torch.Tensor) -> list[torch.Tensor]:
        """``values`` [N, ...] of positions as one tensor a sample, [length, ...], entry t for token t (entry 0: zeros).

        The inverse of the shift to labels.
        """
        values = values.view(*self.shape, *values.shape[1:])
        lengths = (~self.padding_mask).sum(dim=1).tolist()
        found = []
        for row, length in enumerate(lengths[: len(self.indices)]):
            sample = values.new_zeros(length, *values.shape[2:])
            sample[1:] = values[: length - 1, row]
            found.append(sample)
        return found


@dataclasses.dataclass(frozen=True)
class Deal:
    """A micro-batch before it is built: which samples, and the shape [rows, length] that they are padded to."""

    indices: tuple[int, ...]
    length: int
    domain: str | None

    @property
    def rows(self) -> int:
        """A micro-batch without samples has one row of padding."""
        return max(1, len(self.indices))


def deal(
    samples: Sequence[Sample], *, max_tokens: int, data_size: int = 1, multiple: int = 1, by_domain: bool = False
) -> list[list[Deal]]:
    """The micro-batches of every data rank, the same number for each; arguments as in ``pack``."""
    found: list[list[Deal]] = [[] for _ in range(data_size)]
    for domain in sorted({sample.domain for sample in samples}) if by_domain else [None]:
        chosen = [place for place, sample in enumerate(samples) if domain is None or sample.domain == domain]
        lengths = [len(samples[place].token_ids) for place in chosen]
        plan = plan_micro_batches(lengths, data_size=data_size, max_tokens=max_tokens, multiple=multiple)
        for dealt, batches in zip(found, plan, strict=True):
            for rows in batches:
                longest = _padded(max((lengths[row] for row in rows), default=1), multiple)
                dealt.append(Deal(tuple(chosen[row] for row in rows), longest, domain))
    return found


def pack(
    samples: Sequence[Sample],
    *,
    weights: Mapping[str, Sequence[float | np.ndarray]],
    max_tokens: int,
    data_rank: int = 0,
    data_size: int = 1,
    multiple: int = 1,
    by_domain: bool = False,
    device: torch.device | str = "cpu",
) -> list[MicroBatch]:
    """The micro-batches of ``data_rank``: the same number on every data rank, which pipelines and experts rely on.

    max_tokens: rows times padded length of one micro-batch (a longer sample gets its own). multiple: what the padded
    length is a multiple of, for sequence parallelism. by_domain: no micro-batch holds two domains. weights: as in
    ``UpdateBatch``.
    """
    present = [name for name in _SAMPLE_COLUMNS if any(getattr(sample, name) is not None for sample in samples)]
    for name in present:
        _refuse_gaps(name, samples, weights)
    dealt = deal(samples, max_tokens=max_tokens, data_size=data_size, multiple=multiple, by_domain=by_domain)
    return [_build(samples, weights, present, batch, device) for batch in dealt[data_rank]]


def plan_micro_batches(
    lengths: Sequence[int], *, data_size: int, max_tokens: int, multiple: int = 1
) -> list[list[list[int]]]:
    """Indices of samples by data rank and micro-batch. Samples of like length share a micro-batch; ranks get like work.

    Deterministic. Where there are fewer samples than ranks, some micro-batches are empty.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        # The first sample of a micro-batch is its longest.
        if batches and (len(batches[-1]) + 1) * _padded(lengths[batches[-1][0]], multiple) <= max_tokens:
            batches[-1].append(index)
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
    cost = [len(batch) * _padded(lengths[batch[0]], multiple) if batch else 0 for batch in batches]
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


def _build(
    samples: Sequence[Sample],
    weights: Mapping[str, Sequence[float | np.ndarray]],
    present: list[str],
    batch: Deal,
    device: torch.device | str,
) -> MicroBatch:
    indices, num_rows, longest = batch.indices, batch.rows, batch.length
    rows = [samples[index] for index in indices]
    token_ids = np.zeros((num_rows, longest), dtype=np.int64)
    padding = np.ones((num_rows, longest), dtype=bool)
    mask = np.zeros((num_rows, longest), dtype=bool)
    for place, row in enumerate(rows):
        length = len(row.token_ids)
        token_ids[place, :length] = row.token_ids
        padding[place, :length] = False
        mask[place, :length] = row.response_mask
    mask[:, 0] = False  # nothing predicts the first token
    columns = {}
    for name in present:
        values = np.zeros((num_rows, longest), dtype=np.float32)
        for place, row in enumerate(rows):
            if getattr(row, name) is not None:
                values[place, : len(row.token_ids)] = getattr(row, name)
        columns[name] = values
    for name, values in weights.items():
        columns[name] = np.zeros((num_rows, longest), dtype=np.float32)
        for place, index in enumerate(indices):
            length = len(samples[index].token_ids)
            columns[name][place, :length] = np.where(mask[place, :length], values[index], 0.0)
    temperatures = [row.temperature if row.temperature > 0 else 1.0 for row in rows] or [1.0]
    temperature: float | torch.Tensor = temperatures[0]
    if any(value != temperatures[0] for value in temperatures):
        temperature = torch.tensor(temperatures, dtype=torch.float32, device=device).repeat(longest)
    return MicroBatch(
        indices=indices,
        token_ids=torch.from_numpy(token_ids).to(device),
        padding_mask=torch.from_numpy(padding).to(device),
        labels=_to_positions(token_ids, device),
        response_mask=_to_positions(mask, device),
        response_positions=_to_positions(np.where(mask, mask.cumsum(axis=1) - 1, 0), device),
        temperature=temperature,
        columns=TokenColumns(**{name: _to_positions(values, device) for name, values in columns.items()}),
        num_tokens=int((~padding).sum()),
        domain=batch.domain,
    )


def _to_positions(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """[B, S] by token -> [S * B] by the position that predicts it."""
    shifted = np.zeros_like(values.T)
    shifted[:-1] = values.T[1:]
    return torch.from_numpy(shifted.reshape(-1)).to(device)
