"""The teacher's log-probabilities of the responses that a step shows to people, out of the training pass.

A loss that reads the teacher's distributions needs no scores of the sampled tokens, but its pass knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.data.sample_exchange import dp_ranks, return_arrays
from megatron_s2d.kl.outputs import TokenOutputs
from megatron_s2d.objectives.terms import Objective
from megatron_s2d.records import AnySample
from megatron_s2d.train.megatron_model import MegatronModel

OUTPUT = "teacher_log_probs"


class ShownResponses(Protocol):
    """A few responses of a step (``rollout/sampler.py``)."""

    @property
    def samples(self) -> Sequence[AnySample]:
        """The responses, the same list on every rank."""
        ...

    def lines(self, teacher_log_probs: Mapping[str, np.ndarray]) -> list[str]:
        """Return their JSON lines on rank 0; teacher_log_probs: [length] by sample id, of own samples. Collective."""
        ...


class TeacherLogProbs:
    """Collects them over the updates of a step. Every method is collective over the job."""

    def __init__(self, shown: ShownResponses | None, objective: Objective, model: MegatronModel):
        """shown: None if the step shows nothing that the pass adds to."""
        self._shown, self._model = shown, model
        is_measured = shown is not None and OUTPUT in objective.needs
        self._missing = {sample.id: sample for sample in shown.samples} if shown is not None and is_measured else {}
        self._in_pass: dict[int, np.ndarray] = {}  # index in the mini-batch -> [length], on the leaders of data ranks
        self._values: dict[str, np.ndarray] = {}

    def observer(self, mini_batch: MiniBatch) -> dict[str, Any]:
        """Return the argument ``observe`` of ``MegatronModel.forward_backward``; nothing if it shows no sample."""
        wanted = {index for index, sample in enumerate(mini_batch.samples) if sample.id in self._missing}
        return {"observe": self._observe(wanted)} if wanted else {}

    def _observe(self, wanted: set[int]) -> Callable[[MicroBatch, TokenOutputs], None]:
        def observe(batch: MicroBatch, outputs: TokenOutputs) -> None:
            if wanted.isdisjoint(batch.indices):
                return
            values = self._model.gather_context_parallel(batch, outputs.require(OUTPUT))
            if self._model.layout.is_dp_leader:
                rows = batch.unpack(values.float().cpu())
                self._in_pass |= {i: row.numpy() for i, row in zip(batch.indices, rows, strict=True) if i in wanted}

        return observe

    def collect(self, mini_batch: MiniBatch) -> None:
        """Bring what the pass over ``mini_batch`` gave to the data-parallel ranks that hold the samples."""
        indices = [index for index, sample in enumerate(mini_batch.samples) if sample.id in self._missing]
        if not indices:
            return
        trained = [mini_batch.samples[index] for index in indices]
        originals = [self._missing.pop(sample.id) for sample in trained]
        arrays = {number: self._in_pass[index] for number, index in enumerate(indices) if index in self._in_pass}
        layout = self._model.layout
        returned = return_arrays(arrays, originals, layout, layout, dp_ranks(trained, layout))
        self._values |= {
            sample.id: values for sample, values in zip(originals, returned, strict=True) if values is not None
        }
        self._in_pass = {}

    def lines(self) -> list[str]:
        """Return the JSON lines of the responses on rank 0."""
        return [] if self._shown is None else self._shown.lines(self._values)
