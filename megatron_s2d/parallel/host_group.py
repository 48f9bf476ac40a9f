"""Collectives of numbers on the host: numpy arrays over a gloo group, without pickles and without the device.

What every data-parallel rank must know of the samples of an update (lengths, rewards, counts, sums) is a few numbers a
response. They stay in host memory: nothing waits for the device, and no buffer on it grows with the number of ranks.
A group of one rank communicates nothing. Every method is collective over the group, except ``send`` and ``receive``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class HostGroup:
    """Ranks that share numbers over gloo; ``group`` is None for a single rank."""

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sums of ``values`` [n] over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: np.ndarray) -> np.ndarray:
        """Return the maxima of ``values`` [n] over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def all_gather(self, values: np.ndarray) -> list[np.ndarray]:
        """Return the ``values`` [n] of every rank, in the order of ranks; n may differ between them."""
        if self.group is None:
            return [values]
        counts = self._all_gather_equal(np.array([len(values)]))[:, 0]
        padded = np.zeros(int(counts.max()), dtype=values.dtype)
        padded[: len(values)] = values
        gathered = self._all_gather_equal(padded.view(np.uint8)).view(values.dtype)
        return [row[:count] for row, count in zip(gathered, counts, strict=True)]

    def broadcast(self, values: np.ndarray | None, root: int) -> np.ndarray:
        """Return the bytes ``values`` (uint8 [n]) of the rank ``root`` of the group on all its ranks."""
        if self.group is None:
            return values
        size = torch.tensor([0 if values is None else len(values)])
        dist.broadcast(size, group=self.group, group_src=root)
        data = torch.from_numpy(values) if self.rank == root else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, group=self.group, group_src=root)
        return data.numpy()

    def send(self, values: np.ndarray, to: int) -> None:
        """Send bytes (uint8 [n]) to another rank of the group, which calls ``receive``."""
        dist.send(torch.tensor([len(values)]), group=self.group, group_dst=to)
        dist.send(torch.from_numpy(values), group=self.group, group_dst=to)

    def receive(self, sender: int) -> np.ndarray:
        """Return the bytes that another rank of the group sends."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, group=self.group, group_src=sender)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, group=self.group, group_src=sender)
        return data.numpy()

    @contextlib.contextmanager
    def same_outcome(self) -> Iterator[None]:
        """Raise ``UserError`` on every rank if the block raised one on any: the others would wait for it forever."""
        error = None
        try:
            yield
        except UserError as refusal:
            error = refusal
        failed = self.max(np.array([int(error is not None)]))[0]
        if error is not None:
            raise error
        if failed:
            raise UserError("another data-parallel rank refused its samples; its log says why")

    def _reduce(self, values: np.ndarray, operation: dist.ReduceOp) -> np.ndarray:
        values = np.asarray(values)
        if self.group is None:
            return values
        reduced = torch.from_numpy(values.copy())
        dist.all_reduce(reduced, op=operation, group=self.group)
        return reduced.numpy()

    def _all_gather_equal(self, values: np.ndarray) -> np.ndarray:
        """Return [ranks, n] of the ``values`` [n] of every rank."""
        gathered = torch.empty(self.size * len(values), dtype=torch.from_numpy(values[:0]).dtype)
        dist.all_gather_into_tensor(gathered, torch.from_numpy(values), group=self.group)
        return gathered.view(self.size, len(values)).numpy()
