"""Samples that exist before a stage starts: every rank knows their lengths, and reads only those that it trains on.

Which samples a step takes, and which data-parallel rank reads each, follows from their number and lengths, so nothing
is sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from megatron_s2d.data.balance import balanced_ranks
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, RemoteSample, Sample


class StoredSamples(Protocol):
    """Samples by index."""

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """Return the number of tokens, prompt and response, of the samples at ``indices``: int64 [n]."""
        ...

    def read(self, indices: Sequence[int], ranks: Sequence[int], dp_rank: int) -> list[AnySample]:
        """Return the samples at ``indices`` whose rank of ``ranks`` is ``dp_rank``, and records of the others."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ListedSamples:
    """Samples that every rank has in memory, or makes when they are asked for."""

    sample: Callable[[int], Sample]

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """See ``StoredSamples``."""
        return np.array([self.sample(index).length for index in indices], dtype=np.int64)

    def read(self, indices: Sequence[int], ranks: Sequence[int], dp_rank: int) -> list[AnySample]:
        """See ``StoredSamples``."""
        samples = map(self.sample, indices)
        return [
            sample if rank == dp_rank else RemoteSample.of(sample, rank)
            for sample, rank in zip(samples, ranks, strict=True)
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class JoinedSamples:
    """The samples of several stores, one store after the other. sizes: number of samples of each."""

    stores: Sequence[StoredSamples]
    sizes: Sequence[int]

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """See ``StoredSamples``."""
        return np.array([int(store.lengths([index])[0]) for store, index in map(self._locate, indices)], dtype=np.int64)

    def read(self, indices: Sequence[int], ranks: Sequence[int], dp_rank: int) -> list[AnySample]:
        """See ``StoredSamples``."""
        located = zip(map(self._locate, indices), ranks, strict=True)
        return [store.read([index], [rank], dp_rank)[0] for (store, index), rank in located]

    def _locate(self, index: int) -> tuple[StoredSamples, int]:
        ends = np.cumsum(self.sizes)
        number = int(np.searchsorted(ends, index, side="right"))
        return self.stores[number], index - int(ends[number] - self.sizes[number])


@dataclasses.dataclass(frozen=True, eq=False)
class OfflineSamples:
    """Stored samples in an order. order: returns the indices of positions ``start`` to ``start + count``."""

    samples: StoredSamples
    order: Callable[[int, int], Sequence[int]]

    def read(self, start: int, count: int, layout: Layout) -> list[AnySample]:
        """Return ``count`` samples, spread over data-parallel ranks in turn and balanced; nothing is sent."""
        indices = self.order(start, count)
        turns = [position % layout.dp_size for position in range(len(indices))]
        ranks = balanced_ranks(self.samples.lengths(indices).tolist(), turns, layout.dp_size)
        return self.samples.read(indices, ranks, layout.dp_rank)
