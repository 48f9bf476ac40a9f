"""Moves teacher hidden states, and output-layer shards, from the ranks that compute them to those that train on them.

Only positions that predict a response token are kept ("counted" positions). The tensor-parallel ranks of a
data-parallel rank share them: each keeps those in its block of the micro-batch's positions, which under sequence
parallelism are the ones that it computes. Rows are offloaded to host memory; when the loss reads a micro-batch, its
tensor-parallel ranks gather the blocks on the device and free them afterwards. A teacher of another layout sends every
row from the rank that computes it straight to the one rank that keeps it; both derive from samples and layouts which
rows these are, so that nothing else is sent but the samples themselves.

Hidden states of a teacher with the student's layout are offloaded too: copying one micro-batch to the host and back
takes thousandths of its forward pass, and the states of a whole mini-batch would take the device memory of many
micro-batches.

Shapes: t counted positions of a micro-batch, h hidden size, n rows of a transfer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.data.packing import MicroBatch, MicroBatchPlan
from megatron_s2d.data.sample_exchange import dp_ranks, move_samples, ranks_in_layout
from megatron_s2d.kl.shards import VocabShard, redistribute_output_layer
from megatron_s2d.parallel import device, p2p
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, own_samples
from megatron_s2d.teachers.views import PromptViews
from megatron_s2d.train.megatron_model import MegatronModel


@dataclasses.dataclass(frozen=True, eq=False)
class OffloadedRows:
    """Rows of a micro-batch's counted positions in host memory, split over the ranks of a vocabulary shard's group."""

    block: torch.Tensor  # [counts[shard.rank], h], this rank's rows
    counts: tuple[int, ...]  # rows of every rank of the group
    shard: VocabShard
    order: torch.Tensor | None = None  # block[order] is in the order of positions; None: block is

    @classmethod
    def cut(cls, rows: torch.Tensor, positions: torch.Tensor, batch: MicroBatch, model: MegatronModel) -> OffloadedRows:
        """Return this rank's part of rows [t, h], which every rank has, in host memory.

        positions: [t], counted positions over all context-parallel ranks; those of other ranks are dropped.
        """
        blocks = counted_positions(batch, model.layout)
        start = sum(map(len, blocks[: model.shard.rank]))
        cp_ranks, local_positions = map(torch.from_numpy, batch.plan.locate(positions.numpy()))
        local_rows = (cp_ranks == batch.cp_rank).nonzero().squeeze(1)
        local_rows = local_rows[local_positions[local_rows].argsort()]
        block_rows = local_rows[start : start + len(blocks[model.shard.rank])]
        block = device.pinned_empty(len(block_rows), rows.shape[1], dtype=rows.dtype)
        torch.index_select(rows, 0, block_rows, out=block)
        return cls(block, tuple(map(len, blocks)), model.shard)

    def read(self) -> torch.Tensor:
        """Return the rows of all blocks on the device, [t, h] in the order of positions; collective over the group."""
        rows = self.block.to(device.device(), non_blocking=True)
        if self.order is not None:
            rows = rows[device.copy_to_device(self.order)]
        if self.shard.size == 1 or not any(self.counts):
            return rows
        padded = rows.new_empty(max(self.counts), rows.shape[1])
        padded[: len(rows)] = rows
        blocks = self.shard.gather(padded)
        return torch.cat([block[:count] for block, count in zip(blocks, self.counts, strict=True)])


def offload_hidden_states(model: MegatronModel, batches: Sequence[MicroBatch]) -> list[OffloadedRows | None]:
    """Compute final hidden states for a loss at the layout of ``model``; None on ranks without an output layer."""
    layout = model.layout

    def keep(number: int, hidden: torch.Tensor) -> OffloadedRows:
        blocks = counted_positions(batches[number], layout)
        rows = torch.from_numpy(blocks[layout.tp_rank])
        if layout.config.sequence_parallel:
            rows = rows - layout.tp_rank * hidden.shape[0]
        block = device.copy_to_host(hidden[device.copy_to_device(rows)])
        return OffloadedRows(block, tuple(map(len, blocks)), model.shard)

    return model.hidden_states(batches, keep)


def counted_positions(batch: MicroBatch, layout: Layout) -> list[np.ndarray]:
    """Return the counted positions (int64, in order) in the block of each tensor-parallel rank."""
    rows, size = batch.response_rows_on_host, _block_size(len(batch.labels), layout)
    return np.split(rows, np.searchsorted(rows, [size * rank for rank in range(1, layout.tp_size)]))


def _block_size(num_positions: int, layout: Layout) -> int:
    """Return how many positions of a micro-batch one tensor-parallel rank keeps the rows of."""
    return ceil_div(num_positions, layout.tp_size)


def transfer_hidden_states(
    teacher: MegatronModel,
    student: MegatronModel,
    samples: Sequence[AnySample],
    domain: str | None,
    batches: Sequence[MicroBatch],
    views: PromptViews | None = None,
) -> list[OffloadedRows | None]:
    """Compute the teacher's final hidden states for a student of another layout or with another prompt; collective.

    samples: of the whole mini-batch, as the student's data-parallel ranks hold them; they are sent to the ranks of the
    teacher that compute on them. domain: of those in ``batches``, the student's micro-batches; None for all. views: how
    the teacher reads the prompts; its micro-batches hold other tokens then, and rows are matched by their index in the
    response.
    """
    indices = [index for index, sample in enumerate(samples) if domain is None or sample.domain == domain]
    in_domain = [samples[index] for index in indices]
    if views is not None:
        in_domain = views.samples(in_domain, student.layout)
    ranks = ranks_in_layout(in_domain, student.layout, teacher.layout, by_domain=teacher.packs_by_domain)
    teacher_samples, _ = move_samples(in_domain, student.layout, teacher.layout, ranks)
    # Only the plans of data-parallel ranks that exchange rows with this one are computed.
    holders = dp_ranks(in_domain, student.layout)
    pairs = set(zip(ranks, holders, strict=True))
    teacher_ranks = {teacher.layout.dp_rank} | {rank for rank, holder in pairs if holder == student.layout.dp_rank}
    student_ranks = {student.layout.dp_rank} | {holder for rank, holder in pairs if rank == teacher.layout.dp_rank}
    sources = _sequences(teacher.plan_micro_batches(teacher_samples, sorted(teacher_ranks)))
    student_plans = {
        rank: [plan for plan in plans if domain is None or plan.domain == domain]
        for rank, plans in student.plan_micro_batches(samples, sorted(student_ranks)).items()
    }
    targets = _sequences(student_plans)
    transfers = []
    for number, (index, of_teacher) in enumerate(zip(indices, teacher_samples, strict=True)):
        # How many more tokens the teacher reads before the response: every rank knows both lengths.
        shift = of_teacher.length - samples[index].length
        for sample in own_samples([samples[index], of_teacher])[:1]:
            predicting = np.flatnonzero(sample.response_mask[1:])  # tokens before a response token
            if sample is of_teacher:
                predicting = predicting - shift
            transfers.append((predicting, shift, sources[number], targets[index]))
    plan = _TransferPlan.of(transfers, teacher.layout, student.layout)
    hidden_size, dtype = teacher.spec.hidden_size, teacher.params_dtype
    sent = _compute(teacher, teacher_samples, plan.sends(dist.get_rank()), hidden_size, dtype)
    receives = plan.receives(dist.get_rank())
    blocks = [
        device.pinned_empty(int((receives.target_batch == number).sum()), hidden_size, dtype=dtype)
        for number in range(len(batches))
    ]
    num_output_ranks = [sum(map(len, layout.output_ranks)) for layout in (teacher.layout, student.layout)]
    p2p.p2p_exchange(sent, _receive_buffers(receives, blocks), partners=max(num_output_ranks))
    if not student.layout.is_pipeline_last_stage:
        return [None] * len(batches)
    offloaded = []
    for number, (batch, block) in enumerate(zip(batches, blocks, strict=True)):
        counts = tuple(map(len, counted_positions(batch, student.layout)))
        order = np.argsort(receives.target_row[receives.target_batch == number])
        offloaded.append(OffloadedRows(block, counts, student.shard, torch.from_numpy(order)))
    return offloaded


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """A sample in a layout: sequence ``number`` of ``plan``, which is micro-batch ``batch`` of a data-parallel rank."""

    dp_rank: int
    batch: int
    plan: MicroBatchPlan
    number: int


def _sequences(plans: Mapping[int, Sequence[MicroBatchPlan]]) -> dict[int, _Sequence]:
    """Return the sequence of every sample of the planned ranks, by the sample's index. plans: by data-parallel rank."""
    return {
        index: _Sequence(dp_rank, batch, plan, number)
        for dp_rank, rank_plans in plans.items()
        for batch, plan in enumerate(rank_plans)
        for number, index in enumerate(plan.indices)
    }


@dataclasses.dataclass(frozen=True)
class _TransferPlan:
    """Which rank computes and which keeps each counted row of this rank's data-parallel ranks; int64 [n] each."""

    source: np.ndarray  # global rank
    source_batch: np.ndarray  # number of the micro-batch on that rank
    source_row: np.ndarray  # position in the micro-batch
    target: np.ndarray
    target_batch: np.ndarray
    target_row: np.ndarray

    @classmethod
    def of(
        cls, transfers: Sequence[tuple[np.ndarray, int, _Sequence, _Sequence]], source: Layout, target: Layout
    ) -> _TransferPlan:
        """transfers: of each sample that this rank holds in one of the two layouts, the tokens before a response token
        as the student reads them, their distance to those that the teacher reads, and its sequences in both.
        """
        columns = [np.zeros((6, 0), dtype=np.int64)]
        for predicting, shift, source_sequence, target_sequence in transfers:
            source_columns = _locations(source_sequence, source, predicting + shift)
            columns.append(np.stack([*source_columns, *_locations(target_sequence, target, predicting)]))
        return cls(*np.concatenate(columns, axis=1))

    def sends(self, rank: int) -> _TransferPlan:
        """Return the rows that ``rank`` computes: grouped by target, then in the order in which they are computed."""
        return self._select(self.source == rank, self.target)

    def receives(self, rank: int) -> _TransferPlan:
        """Return the rows that ``rank`` keeps: grouped by source, in the order in which the source sends them."""
        return self._select(self.target == rank, self.source)

    def _select(self, mask: np.ndarray, partner: np.ndarray) -> _TransferPlan:
        order = np.lexsort((self.target_row, self.target_batch, self.source_batch, partner))
        order = order[mask[order]]
        return _TransferPlan(*(values[order] for values in vars(self).values()))


def _locations(sequence: _Sequence, layout: Layout, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (global rank, micro-batch, position on its context-parallel rank) of a sample's tokens ``tokens``."""
    positions = sequence.plan.positions()[sequence.number]
    cp_ranks, local_positions = sequence.plan.locate(positions.start + (positions.step or 1) * tokens)
    ranks = np.array(layout.output_ranks[sequence.dp_rank]).reshape(layout.cp_size, layout.tp_size)
    size = _block_size(sequence.plan.cp_indices.shape[1], layout)
    batch = np.full_like(local_positions, sequence.batch)
    return ranks[cp_ranks, local_positions // size], batch, local_positions


def _compute(
    teacher: MegatronModel, samples: Sequence[AnySample], sends: _TransferPlan, hidden_size: int, dtype: torch.dtype
) -> dict[int, torch.Tensor]:
    """Return the rows [n, h] that this rank sends, by target rank; collective over the teacher's ranks."""
    buffer = device.pinned_empty(len(sends.source), hidden_size, dtype=dtype)

    def keep(number: int, hidden: torch.Tensor) -> None:
        indices = np.flatnonzero(sends.source_batch == number)
        positions = torch.from_numpy(sends.source_row[indices])
        if teacher.layout.config.sequence_parallel:
            positions = positions - teacher.layout.tp_rank * hidden.shape[0]
        rows = hidden[device.copy_to_device(positions)]
        for run in _runs(indices - np.arange(len(indices))):
            buffer[indices[run.start] : indices[run.stop - 1] + 1].copy_(rows[run], non_blocking=True)

    teacher.hidden_states(teacher.pack(samples, {}), keep)
    return {int(sends.target[run.start]): buffer[run] for run in _runs(sends.target)}


def _receive_buffers(receives: _TransferPlan, blocks: Sequence[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
    """Return the slices of ``blocks``, one tensor per micro-batch, that the rows of each source rank fill, in order."""
    buffers: dict[int, list[torch.Tensor]] = {}
    num_filled = [0] * len(blocks)
    for run in _runs(receives.source, receives.source_batch, receives.target_batch):
        source, batch = int(receives.source[run.start]), int(receives.target_batch[run.start])
        start, count = num_filled[batch], run.stop - run.start
        buffers.setdefault(source, []).append(blocks[batch][start : start + count])
        num_filled[batch] += count
    return buffers


def _runs(*columns: np.ndarray) -> Iterator[slice]:
    """Yield the runs of neighbours that are equal in all ``columns`` [n]."""
    if not len(columns[0]):
        return
    changes = np.flatnonzero(np.any([column[1:] != column[:-1] for column in columns], axis=0)) + 1
    edges = [0, *changes.tolist(), len(columns[0])]
    yield from (slice(start, stop) for start, stop in itertools.pairwise(edges))


class OutputLayers:
    """Output layers of frozen models, resharded like the student's: once each, at most one on the device at a time.

    A model that stays on the device keeps its layer there. Layers of models that take turns are offloaded.
    """

    def __init__(self) -> None:
        self._resharded: dict[MegatronModel, torch.Tensor] = {}  # of models of other layouts
        self._on_device: tuple[MegatronModel, torch.Tensor] | None = None

    def of(self, teacher: MegatronModel, student: MegatronModel, *, offload: bool) -> Callable[[], torch.Tensor] | None:
        """Return a function that gives the rows of the student's shard on the device; None without an output layer.

        Collective, with ``teacher`` on the device. offload: the model takes turns on the device with others.
        """
        if teacher.layout is not student.layout and teacher not in self._resharded:
            local_rows = (
                (teacher.output_weight.detach(), teacher.shard)
                if teacher.layout.is_pipeline_last_stage
                else (None, None)
            )
            target = student.shard if student.layout.is_pipeline_last_stage else None
            weight = redistribute_output_layer(*local_rows, target, dist.group.WORLD)
            if weight is not None and offload:
                weight = device.copy_to_host(weight)
            self._resharded[teacher] = weight
        return functools.partial(self._read, teacher) if student.layout.is_pipeline_last_stage else None

    def _read(self, teacher: MegatronModel) -> torch.Tensor:
        if self._on_device is None or self._on_device[0] is not teacher:
            self._on_device = None  # frees the previous one before the next is copied
            weight = self._resharded.get(teacher)
            if weight is None:
                weight = teacher.output_weight.detach()[: teacher.shard.columns]
            self._on_device = (teacher, weight.to(device.device(), non_blocking=True))
        return self._on_device[1]
