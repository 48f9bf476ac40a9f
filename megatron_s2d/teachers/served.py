"""The likeliest tokens of teachers on SGLang servers as the distributions that a student trains on (methods.md M2, M3).

Each model replica asks for the samples that it trains on itself, so that nothing larger than that travels. Left out:
supports that the student chooses, which servers cannot score token by token, and whole distributions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.kl.teachers import TeacherSource, TopK
from megatron_s2d.objectives.terms import Metric
from megatron_s2d.parallel import device
from megatron_s2d.rollout.served.scoring import TopTokens
from megatron_s2d.teachers.frozen import ServedTeachers
from megatron_s2d.train.megatron_model import MegatronModel


@dataclasses.dataclass(frozen=True, eq=False)
class ServedTopK:
    """Distributions on the teacher's k likeliest tokens at temperature 1."""

    student: MegatronModel
    teachers: ServedTeachers
    k: int
    tail: str

    def distributions(self, update: MiniBatch, batches: Sequence[MicroBatch]) -> list[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        found: dict[int, TopTokens] = {}  # by place in the update
        mine = [index for batch in batches for index in batch.indices]
        for domain in sorted({sample.domain for sample in update.samples}):
            places = [index for index in mine if update.samples[index].domain == domain]
            engine = self.teachers.engine_for(domain)
            tokens = engine.top_tokens([update.samples[index] for index in places], self.k, self.student.layout)
            found |= dict(zip(places, tokens, strict=True))
        if not self.student.layout.is_pipeline_last_stage:
            return [None] * len(batches)
        return [self._source(update, batch, found) for batch in batches]

    def metrics(self) -> dict[str, Metric]:
        """Nothing is measured."""
        return {}

    def _source(self, update: MiniBatch, batch: MicroBatch, found: Mapping[int, TopTokens]) -> TopK:
        """The entry of token t stands at the position that predicts it."""
        # Positions that are not counted need k distinct ids too.
        ids = np.tile(np.arange(self.k), (batch.num_positions, 1))
        log_probs = np.zeros((batch.num_positions, self.k), dtype=np.float32)
        log_tail = np.zeros(batch.num_positions, dtype=np.float32)
        for place, index in zip(batch.positions(), batch.indices, strict=True):
            top, tokens = found[index], np.flatnonzero(update.samples[index].response_mask)
            ids[place][tokens - 1] = top.ids[tokens]
            log_probs[place][tokens - 1] = top.log_probs[tokens]
            log_tail[place][tokens - 1] = top.log_tail[tokens]
        parts = [batch.slice_for_cp(torch.from_numpy(part)).to(device.device()) for part in (ids, log_probs, log_tail)]
        return TopK(*parts, tail=self.tail, support="teacher")
