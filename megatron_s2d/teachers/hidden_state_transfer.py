"""Final hidden states from the ranks that compute them to the ranks whose loss reads them, and output layers likewise.

Only positions that predict a response token are kept. The tensor ranks of a data rank share them: each keeps those in
its part of the micro-batch's positions, which under sequence parallelism are the ones that it computes. They wait in
host memory; when the loss reads a micro-batch, its tensor ranks gather the parts on the device and let them go
afterwards. A model of another layout sends every row from the rank that has it straight to the one rank that keeps it;
all ranks derive from samples and layouts which rows these are, so that nothing else is sent.

States of a model with the student's layout wait in host memory too: a copy of one micro-batch there and back takes
thousandths of its forward pass, and the states of an update would take the device memory of many micro-batches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.data.packing import MicroBatch, MicroBatchPlan
from megatron_s2d.kl.shards import VocabShard, redistribute_output_layer
from megatron_s2d.parallel import device, p2p
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import Sample
from megatron_s2d.train.megatron_model import MegatronModel


@dataclasses.dataclass(frozen=True, eq=False)
class OffloadedRows:
    """Rows of a micro-batch's counted positions in host memory, shared out over the ranks of a shard's group."""

    part: torch.Tensor  # [counts[shard.rank], d] of this rank's part of the positions
    counts: tuple[int, ...]  # rows of every rank of the group
    shard: VocabShard
    order: torch.Tensor | None = None  # row i of the part in order is part[order[i]]; None: it is in order

    @classmethod
    def cut(
        cls, rows: torch.Tensor, positions: torch.Tensor, batch: MicroBatch, policy: MegatronModel
    ) -> OffloadedRows:
        """Of rows [R, d] in host memory that every rank has, at the counted ``positions`` [R] of a micro-batch.

        Positions are those over all context ranks, and those that this one has not are left out.
        """
        cuts = own_positions(batch, policy.layout)
        start = sum(map(len, cuts[: policy.shard.rank]))
        holder, places = map(torch.from_numpy, batch.plan.locate(positions.numpy()))
        mine = (holder == batch.cp_rank).nonzero().squeeze(1)
        chosen = mine[places[mine].argsort()][start : start + len(cuts[policy.shard.rank])]
        part = device.pinned_empty(len(chosen), rows.shape[1], dtype=rows.dtype)
        torch.index_select(rows, 0, chosen, out=part)
        return cls(part, tuple(map(len, cuts)), policy.shard)

    def read(self) -> torch.Tensor:
        """The rows of all parts on the device, [R, d] in the order of positions; collective over the group."""
        rows = self.part.to(device.device(), non_blocking=True)
        if self.order is not None:
            rows = rows[self.order.to(rows.device)]
        if self.shard.size == 1 or not any(self.counts):
            return rows
        largest = rows.new_empty(max(self.counts), rows.shape[1])
        largest[: len(rows)] = rows
        parts = self.shard.gather(largest)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])


def rows_of(policy: MegatronModel, batches: Sequence[MicroBatch]) -> list[OffloadedRows | None]:
    """Final hidden states of ``batches`` for a loss at the layout of ``policy``; None before the last stage."""
    layout = policy.layout

    def keep(number: int, hidden: torch.Tensor) -> OffloadedRows:
        cuts = own_positions(batches[number], layout)
        rows = torch.from_numpy(cuts[layout.tp_rank])
        if layout.config.sequence_parallel:
            rows = rows - layout.tp_rank * hidden.shape[0]
        kept = device.copy_to_host(hidden[rows.to(hidden.device)])
        return OffloadedRows(kept, tuple(map(len, cuts)), policy.shard)

    return policy.hidden_states(batches, keep)


def own_positions(batch: MicroBatch, layout: Layout) -> list[np.ndarray]:
    """Counted positions (int64, in order) of each tensor rank's part of a micro-batch."""
    mask = batch.response_mask.cpu().numpy()
    part = _part(len(mask), layout)
    cuts = range(0, part * layout.tp_size, part)
    return [start + np.flatnonzero(mask[start : start + part]) for start in cuts]


def _part(positions: int, layout: Layout) -> int:
    """Positions of a micro-batch that one tensor rank answers for."""
    return ceil_div(positions, layout.tp_size)


def transfer_hidden_states(
    policy: MegatronModel,
    student: MegatronModel,
    samples: Sequence[Sample],
    domain: str | None,
    batches: Sequence[MicroBatch],
) -> list[OffloadedRows | None]:
    """Final hidden states of ``policy`` for the micro-batches of a student of another layout; collective.

    samples: of the whole update. domain: of those that ``batches``, the student's, hold; None for all.
    """
    chosen = [i for i, sample in enumerate(samples) if domain is None or sample.domain == domain]
    asked = [samples[i] for i in chosen]
    sources = _places(policy.plan_micro_batches(asked))
    dealt = [
        [deal for deal in deals if domain is None or deal.domain == domain]
        for deals in student.plan_micro_batches(samples)
    ]
    targets = _places(dealt)
    journeys = [(samples[i], sources[place], targets[i]) for place, i in enumerate(chosen)]
    rows = _TransferPlan.of(journeys, policy.layout, student.layout)
    width, dtype = policy.spec.hidden_size, policy.params_dtype
    sent = _compute(policy, asked, rows.sends(dist.get_rank()), width, dtype)
    arriving = rows.receives(dist.get_rank())
    kept = [
        device.pinned_empty(int((arriving.target_batch == n).sum()), width, dtype=dtype) for n in range(len(batches))
    ]
    ranks = [sum(map(len, layout.output_ranks)) for layout in (policy.layout, student.layout)]
    p2p.p2p_exchange(sent, _blocks(arriving, kept), partners=max(ranks))
    if not student.layout.is_pipeline_last_stage:
        return [None] * len(batches)
    found = []
    for number, (batch, part) in enumerate(zip(batches, kept, strict=True)):
        counts = tuple(map(len, own_positions(batch, student.layout)))
        order = np.argsort(arriving.target_row[arriving.target_batch == number])
        found.append(OffloadedRows(part, counts, student.shard, torch.from_numpy(order)))
    return found


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a layout has a sample: sequence ``number`` of a deal, which is micro-batch ``batch`` of a data rank."""

    dp_rank: int
    batch: int
    deal: MicroBatchPlan
    number: int


def _places(dealt: Sequence[Sequence[MicroBatchPlan]]) -> dict[int, _Place]:
    """The place of every sample, by its index."""
    return {
        index: _Place(dp_rank, batch, deal, number)
        for dp_rank, deals in enumerate(dealt)
        for batch, deal in enumerate(deals)
        for number, index in enumerate(deal.indices)
    }


@dataclasses.dataclass(frozen=True)
class _TransferPlan:
    """Counted rows that this rank's data ranks have to do with: where each is computed, where it is kept; int64 [n]."""

    source: np.ndarray  # global rank
    source_batch: np.ndarray  # number of the micro-batch on that rank
    source_row: np.ndarray  # position in the micro-batch
    target: np.ndarray
    target_batch: np.ndarray
    target_row: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[tuple[Sample, _Place, _Place]], source: Layout, target: Layout) -> _TransferPlan:
        """samples: each with its places in the two layouts."""
        parts = [np.zeros((6, 0), dtype=np.int64)]
        for sample, begin, end in samples:
            if begin.dp_rank == source.dp_rank or end.dp_rank == target.dp_rank:
                predicted = np.flatnonzero(sample.response_mask[1:])
                parts.append(np.stack([*_locations(begin, source, predicted), *_locations(end, target, predicted)]))
        return cls(*np.concatenate(parts, axis=1))

    def sends(self, rank: int) -> _TransferPlan:
        """The rows that ``rank`` computes: together by target, then in the order in which they are computed."""
        return self._chosen(self.source == rank, self.target)

    def receives(self, rank: int) -> _TransferPlan:
        """The rows that ``rank`` keeps: together by source, in the order in which the source sends them."""
        return self._chosen(self.target == rank, self.source)

    def _chosen(self, mask: np.ndarray, partner: np.ndarray) -> _TransferPlan:
        order = np.lexsort((self.target_row, self.target_batch, self.source_batch, partner))
        order = order[mask[order]]
        return _TransferPlan(*(values[order] for values in vars(self).values()))


def _locations(place: _Place, layout: Layout, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(global rank, micro-batch, position on its context rank) of the tokens at places ``predicted`` + 1 of a sample."""
    first, step = place.deal.positions()[place.number].start, place.deal.positions()[place.number].step or 1
    context, positions = place.deal.locate(first + step * predicted)
    ranks = np.array(layout.output_ranks[place.dp_rank]).reshape(layout.cp_size, layout.tp_size)
    part = _part(place.deal.cp_indices.shape[1], layout)
    return ranks[context, positions // part], np.full_like(positions, place.batch), positions


def _compute(
    policy: MegatronModel, samples: Sequence[Sample], rows: _TransferPlan, width: int, dtype: torch.dtype
) -> dict[int, torch.Tensor]:
    """The rows [n, width] that leave this rank by the rank that they go to; collective over the model's ranks."""
    waiting = device.pinned_empty(len(rows.source), width, dtype=dtype)

    def keep(number: int, hidden: torch.Tensor) -> None:
        places = np.flatnonzero(rows.source_batch == number)
        positions = torch.from_numpy(rows.source_row[places])
        if policy.layout.config.sequence_parallel:
            positions = positions - policy.layout.tp_rank * hidden.shape[0]
        found = hidden[positions.to(hidden.device)]
        for run in _runs(places - np.arange(len(places))):
            waiting[places[run.start] : places[run.stop - 1] + 1].copy_(found[run], non_blocking=True)

    policy.hidden_states(policy.pack(samples, {}), keep)
    return {int(rows.target[run.start]): waiting[run] for run in _runs(rows.target)}


def _blocks(rows: _TransferPlan, kept: Sequence[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
    """Room in ``kept``, one tensor a micro-batch, for the rows that come from each rank, in the order of ``rows``."""
    found: dict[int, list[torch.Tensor]] = {}
    filled = [0] * len(kept)
    for run in _runs(rows.source, rows.source_batch, rows.target_batch):
        batch, count = int(rows.target_batch[run.start]), run.stop - run.start
        found.setdefault(int(rows.source[run.start]), []).append(kept[batch][filled[batch] : filled[batch] + count])
        filled[batch] += count
    return found


def _runs(*columns: np.ndarray) -> Iterator[slice]:
    """Stretches of neighbours that are equal in all ``columns`` [n]."""
    if not len(columns[0]):
        return
    changes = np.flatnonzero(np.any([column[1:] != column[:-1] for column in columns], axis=0)) + 1
    edges = [0, *changes.tolist(), len(columns[0])]
    yield from (slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False))


class OutputLayers:
    """Output layers of frozen models cut like the student's: cut once, and at most one on the device at a time.

    A model that stays on the device has its own there for good. Those of models that take turns wait in host memory.
    """

    def __init__(self) -> None:
        self._cut: dict[MegatronModel, torch.Tensor] = {}  # of models of other layouts
        self._open: tuple[MegatronModel, torch.Tensor] | None = None

    def of(self, policy: MegatronModel, student: MegatronModel, *, waits: bool) -> Callable[[], torch.Tensor] | None:
        """What gives the rows of the student's shard on the device; None on ranks without an output layer.

        Collective, with ``policy`` on the device. waits: the model takes turns on the device with others.
        """
        if policy.layout is not student.layout and policy not in self._cut:
            held = (
                (policy.output_weight.detach(), policy.shard) if policy.layout.is_pipeline_last_stage else (None, None)
            )
            wanted = student.shard if student.layout.is_pipeline_last_stage else None
            weight = redistribute_output_layer(*held, wanted, dist.group.WORLD)
            if weight is not None and waits:
                weight = device.copy_to_host(weight)
            self._cut[policy] = weight
        return functools.partial(self._read, policy) if student.layout.is_pipeline_last_stage else None

    def _read(self, policy: MegatronModel) -> torch.Tensor:
        if self._open is None or self._open[0] is not policy:
            self._open = None  # the last one leaves before the next comes
            found = self._cut.get(policy)
            if found is None:
                found = policy.output_weight.detach()[: policy.shard.columns]
            self._open = (policy, found.to(device.device(), non_blocking=True))
        return self._open[1]
