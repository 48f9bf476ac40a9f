"""The micro-batches of a model: samples balanced over data-parallel ranks, packed as many times on each.

Every method is collective over the data-parallel ranks; they exchange numbers, and the samples that are moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.data.packing import (
    MicroBatch,
    MicroBatchPlan,
    MiniBatch,
    RoutedLayers,
    count_micro_batches,
    pack,
    plan_micro_batches,
)
from megatron_s2d.data.sample_exchange import balance_samples, dp_ranks
from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, Sample, own_samples
from megatron_s2d.train.alignment import check_lengths


@dataclasses.dataclass(frozen=True, eq=False)
class MicroBatcher:
    """How a model's samples become micro-batches."""

    layout: Layout
    vocab_size: int
    max_tokens: int  # of a micro-batch and context rank
    packed: bool
    pad_to_multiple: int
    count_multiple: int
    by_domain: bool
    longest: int | None = None  # tokens of a sample at most, with ``tp_comm_overlap``
    routed: RoutedLayers | None = None  # the layers whose experts are replayed

    def pack(
        self, samples: Sequence[AnySample], loss_weights: Mapping[str, Sequence[float | np.ndarray]]
    ) -> list[MicroBatch]:
        """See ``MegatronModel.pack``."""
        with self.layout.host_dp.same_outcome():
            own = own_samples(samples)
            if self.longest is not None:
                check_lengths(own, self.longest)
            for sample in own:
                self._check_token_ids(sample)
        return pack(
            samples,
            loss_weights=loss_weights,
            num_batches=self._num_batches(samples),
            cp_rank=self.layout.cp_rank,
            device=device.device(),
            routed=self.routed,
            **self._settings,
        )

    def balance(self, mini_batch: MiniBatch) -> tuple[MiniBatch, int]:
        """Move samples to data-parallel ranks with fewer tokens where they differ; return also how many were moved."""
        samples, weights = mini_batch.samples, mini_batch.loss_weights
        by_token = [
            {name: column[index] for name, column in weights.items() if isinstance(column[index], np.ndarray)}
            for index in range(len(samples))
        ]
        balanced, moved_weights = balance_samples(samples, self.layout, by_domain=self.by_domain, extra=by_token)
        num_moved = sum(map(int.__ne__, dp_ranks(samples, self.layout), dp_ranks(balanced, self.layout)))
        if not num_moved:
            return mini_batch, 0
        columns = {
            name: [moved_weights[index].get(name, value) for index, value in enumerate(column)]
            for name, column in weights.items()
        }
        return MiniBatch(balanced, columns), num_moved

    def plan(self, samples: Sequence[AnySample], ranks: Iterable[int]) -> dict[int, list[MicroBatchPlan]]:
        """Return the plan of the micro-batches that ``pack`` makes, for the data-parallel ``ranks``."""
        counts, holders = self._num_batches(samples), dp_ranks(samples, self.layout)
        held: dict[int, list[int]] = {rank: [] for rank in ranks}
        for index, holder in enumerate(holders):
            if holder in held:
                held[holder].append(index)
        return {rank: plan_micro_batches(samples, indices, counts, **self._settings) for rank, indices in held.items()}

    def _num_batches(self, samples: Sequence[AnySample]) -> dict[str | None, int]:
        """Return the number of micro-batches of every data-parallel rank: as many as one of them needs."""
        held = [index for index, sample in enumerate(samples) if isinstance(sample, Sample)]
        counts = count_micro_batches(samples, held, **self._settings)
        largest = self.layout.host_dp.max(np.array(list(counts.values())))
        return dict(zip(counts, largest.tolist(), strict=True))

    def _check_token_ids(self, sample: Sample) -> None:
        ids = np.asarray(sample.token_ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise UserError(
                f"sample {sample.id} has token ids from {ids.min()} to {ids.max()}, outside of the vocabulary of "
                f"{self.vocab_size}: its tokenizer is not the model's"
            )

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "pad_to_multiple": self.pad_to_multiple,
            "packed": self.packed,
            "cp_size": self.layout.cp_size,
            "by_domain": self.by_domain,
            "count_multiple": self.count_multiple,
        }
