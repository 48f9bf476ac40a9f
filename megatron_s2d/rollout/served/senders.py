"""Which ranks send weights to servers: one of every machine, so that no link and no disk carries all of a push.

The buckets of a push are the same on every rank, so any of them can send. Each sender has servers of its own, which it
sends all weights to; files that all servers read are written in parts, one by each sender.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_s2d.parallel import device
from megatron_s2d.parallel.launcher_env import is_first_of_machine


@dataclasses.dataclass(frozen=True)
class Senders:
    """The senders of a job, numbered in the order of their ranks; rank 0 is the first."""

    count: int
    index: int | None  # of this rank; None: it sends nothing

    @classmethod
    def rank_zero(cls) -> Senders:
        """Return rank 0 alone."""
        return cls(1, 0 if dist.get_rank() == 0 else None)

    @classmethod
    def of_machines(cls) -> Senders:
        """Return the first rank of every machine; collective."""
        return cls.of(is_first_of_machine(dist.get_rank()))

    @classmethod
    def of(cls, is_sender: bool) -> Senders:
        """Return the ranks that say so, and rank 0; collective."""
        flag = torch.tensor([int(is_sender or dist.get_rank() == 0)], device=device.device())
        flags = flag.new_empty(dist.get_world_size())
        dist.all_gather_into_tensor(flags, flag)
        before = int(flags[: dist.get_rank()].sum())
        return cls(int(flags.sum()), before if int(flag) else None)

    def own[Item](self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's part of ``items``: consecutive ones, as servers are listed machine by machine."""
        if self.index is None:
            return []
        start, stop = (len(items) * index // self.count for index in (self.index, self.index + 1))
        return list(items[start:stop])

    def writes(self, number: int) -> bool:
        """Return whether this rank writes file ``number`` of those that all senders write together."""
        return self.index is not None and number % self.count == self.index
