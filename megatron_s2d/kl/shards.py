"""Vocabulary shards: the global token ids of a rank's columns, and the collectives that gather or move shards.

Output layers are padded to a multiple of the tensor-parallel size. Padding columns are cut off before any arithmetic,
so nothing here masks by adding minus infinity. Rows of an output layer are addressed by global token id only, so two
layouts may pad differently.

Shapes: v_tp local vocabulary columns, h hidden size.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from megatron_s2d.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of output layers


@dataclasses.dataclass(frozen=True, eq=False)
class VocabShard:
    """Global ids ``[start, stop)`` are this rank's valid columns; further local columns are padding.

    The shards of ``group`` must be disjoint and cover ``[0, vocab_size)``; a shard may be empty (``start == stop``).
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None  # None: this rank holds all columns

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.vocab_size:
            raise UserError(
                f"vocabulary shard [{self.start}, {self.stop}) does not lie in [0, {self.vocab_size}): "
                "give global token ids of the valid columns"
            )
        if self.group is None and self.stop - self.start != self.vocab_size:
            raise UserError(
                f"vocabulary shard [{self.start}, {self.stop}) of {self.vocab_size} has no process group: "
                "pass the tensor-parallel group that holds the other columns"
            )

    @classmethod
    def unsharded(cls, vocab_size: int) -> VocabShard:
        """Return the only shard of an unsharded vocabulary."""
        return cls(0, vocab_size, vocab_size)

    @classmethod
    def of_padded(cls, local_columns: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """Return this rank's shard in Megatron's layout: rank r holds the ids from ``r * local_columns`` on.

        Columns for ids from ``vocab_size`` on are padding.
        """
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if local_columns * size < vocab_size:
            raise UserError(
                f"{size} shards of {local_columns} columns do not hold a vocabulary of {vocab_size}: "
                "check vocab_size against the output layer"
            )
        start = min(rank * local_columns, vocab_size)
        return cls(start, min(start + local_columns, vocab_size), vocab_size, group)

    @property
    def columns(self) -> int:
        """Number of valid columns on this rank, v_tp without padding."""
        return self.stop - self.start

    @property
    def size(self) -> int:
        """Number of shards."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Index of this shard in its group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Stack ``values`` [...] of all ranks in rank order: [size, ...]. One all-gather (none without a group)."""
        if self.size == 1:
            return values.unsqueeze(0)
        values = values.contiguous()
        gathered = values.new_empty(self.size * values.numel())
        dist.all_gather_into_tensor(gathered, values.view(-1), group=self.group)
        return gathered.view(self.size, *values.shape)

    def local(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return local columns of global ``ids`` (0 for other ranks' ids), and which of them are this rank's (bool)."""
        owned = (ids >= self.start) & (ids < self.stop)
        return (ids - self.start).masked_fill_(~owned, 0), owned


def check_ids(ids: torch.Tensor, vocab_size: int, what: str) -> None:
    """Raise ``UserError`` for ids outside the vocabulary: no rank owns them, so terms would silently be missing."""
    if bool(((ids < 0) | (ids >= vocab_size)).any()):
        raise UserError(
            f"{what} holds ids from {int(ids.min())} to {int(ids.max())}, outside the vocabulary of {vocab_size}: "
            "mask such positions with response_mask and give them any valid id"
        )


def redistribute_output_layer(
    rows: torch.Tensor | None, source: VocabShard | None, target: VocabShard | None, group: dist.ProcessGroup
) -> torch.Tensor | None:
    """Bring an output layer to another vocabulary layout: the rows of ``target`` [target.columns, h].

    rows [>= source.columns, h], source: this rank's piece, or None for both on a rank without one. target: None for a
    rank that needs no rows. Every rank of ``group`` calls. Each distinct piece is broadcast once by the first rank that
    has it, so replicas cost nothing and memory stays at one piece beside the result.
    """
    device = rows.device if rows is not None else _device_of(group)
    description = [-1] * 4
    if rows is not None and source is not None:
        description = [source.start, source.stop, rows.shape[1], DTYPES.index(rows.dtype)]
    senders: dict[tuple[int, ...], int] = {}
    for rank, piece_description in enumerate(gather_numbers(description, group, device)):
        if piece_description[0] >= 0:
            senders.setdefault(tuple(piece_description), rank)
    if target is not None and sum(stop - start for start, stop, _, _ in senders) != target.vocab_size:
        raise UserError(
            f"the group's pieces {sorted(piece[:2] for piece in senders)} do not cut the vocabulary of "
            f"{target.vocab_size} into disjoint shards"
        )
    result = None
    for (start, stop, width, dtype), rank in sorted(senders.items()):
        if start == stop:
            continue
        piece = torch.empty(stop - start, width, dtype=DTYPES[dtype], device=device)
        if rows is not None and rank == dist.get_rank(group):
            piece.copy_(rows[: stop - start])
        dist.broadcast(piece, dist.get_global_rank(group, rank), group=group)
        if target is not None:
            if result is None:
                result = piece.new_empty(target.columns, width)
            _copy_overlap(start, stop, piece, result, target)
    return result


def gather_numbers(numbers: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """Return the ``numbers`` of every rank."""
    gathered = torch.empty(dist.get_world_size(group), len(numbers), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(gathered, torch.tensor([numbers], device=device), group=group)
    result: list[list[int]] = gathered.tolist()
    return result


def _copy_overlap(start: int, stop: int, piece: torch.Tensor, result: torch.Tensor, target: VocabShard) -> None:
    """Copy the rows with ids in both ``[start, stop)`` and ``target``."""
    low, high = max(start, target.start), min(stop, target.stop)
    if low < high:
        result[low - target.start : high - target.start] = piece[low - start : high - start]


def _device_of(group: dist.ProcessGroup) -> torch.device:
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
