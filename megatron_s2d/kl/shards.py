"""A vocabulary shard as a value: which global token ids a rank's columns stand for, and the one collective needed.

Columns beyond ``vocab_size`` are padding (output layers are padded to a multiple of the tensor-parallel size) and are
cut off before any arithmetic, so nothing here ever masks by adding minus infinity. Left out: how a model lays out its
output layer (the caller knows) and the merging of statistics (``kl/torch_backend.py``).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from megatron_s2d.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class VocabShard:
    """Global ids ``[start, stop)`` are this rank's valid columns; further local columns are padding.

    The shards of ``group`` must be disjoint and cover ``[0, vocab_size)``; a shard may be empty (``start == stop``).
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None  # None: this rank holds the whole vocabulary

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
    def whole(cls, vocab_size: int) -> VocabShard:
        """The only shard of an unsharded vocabulary."""
        return cls(0, vocab_size, vocab_size)

    @classmethod
    def of_padded(cls, local_columns: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabShard:
        """Megatron's layout: rank r holds ids ``[r * local_columns, (r + 1) * local_columns)``, the end is padding."""
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
        """Number of valid columns on this rank."""
        return self.stop - self.start

    @property
    def size(self) -> int:
        """Number of shards."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Place of this shard in its group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` [...] of every rank, stacked in rank order: [size, ...]. One all-gather (none without a group)."""
        if self.size == 1:
            return values.unsqueeze(0)
        values = values.contiguous()
        gathered = values.new_empty(self.size * values.numel())
        dist.all_gather_into_tensor(gathered, values.view(-1), group=self.group)
        return gathered.view(self.size, *values.shape)

    def local(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Local columns of global ``ids`` (0 where foreign) and a bool tensor of which are this rank's."""
        owned = (ids >= self.start) & (ids < self.stop)
        return (ids - self.start).masked_fill_(~owned, 0), owned


def check_ids(ids: torch.Tensor, vocab_size: int, what: str) -> None:
    """Refuse ids outside the vocabulary: no rank would own them and their terms would silently be missing."""
    if bool(((ids < 0) | (ids >= vocab_size)).any()):
        raise UserError(
            f"{what} holds ids from {int(ids.min())} to {int(ids.max())}, outside the vocabulary of {vocab_size}: "
            "mask such positions with response_mask and give them any valid id"
        )
