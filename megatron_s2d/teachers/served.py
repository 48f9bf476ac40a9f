"""Teachers on SGLang servers: scores of sampled tokens, and top-k distributions for the loss (methods.md M2, M3).

Each model replica requests the top tokens of the samples that it trains on itself, so that only those are transferred.
Left out: supports that the student selects, which servers cannot score token by token, and full distributions.

Shapes: t positions of a micro-batch, k top-k entries.
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
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, Sample, own_samples
from megatron_s2d.rollout.served.engine import ServedEngine
from megatron_s2d.rollout.served.scoring import TopTokens
from megatron_s2d.teachers.routing import is_routed, score_by_domain, teacher_of
from megatron_s2d.teachers.views import PromptViews, from_view, score_in_view
from megatron_s2d.train.megatron_model import MegatronModel


@dataclasses.dataclass(frozen=True, eq=False)
class ServedTeachers:
    """Servers with a teacher's weights for every domain, or one engine (under the key ``None``) for all."""

    engines: Mapping[str | None, ServedEngine]
    views: PromptViews | None = None  # the prompts as the teachers read them; None: as the student does

    @property
    def is_routed(self) -> bool:
        """Whether each domain has a teacher of its own."""
        return is_routed(self.engines)

    def engine_for(self, domain: str) -> ServedEngine:
        """Return the servers of the teacher of ``domain``."""
        return teacher_of(self.engines, domain)

    def score(self, samples: Sequence[AnySample], *, holders: Layout) -> list[np.ndarray | None]:
        """See ``TeacherRouter.score``; at temperature 1. Each replica requests the scores of its own samples."""

        def score(domain: str, in_domain: list[AnySample]) -> list[np.ndarray | None]:
            def request(as_read: list[AnySample]) -> list[np.ndarray | None]:
                scores = iter(self.engine_for(domain).score(own_samples(as_read), holders))
                return [next(scores) if isinstance(sample, Sample) else None for sample in as_read]

            return score_in_view(in_domain, domain, self.views, holders, request)

        return score_by_domain(samples, score)

    def top_tokens(
        self, samples: Sequence[AnySample], domain: str, indices: Sequence[int], k: int, holders: Layout
    ) -> list[TopTokens]:
        """Return the teacher's k likeliest tokens at the tokens of the samples ``indices``, all of ``domain``.

        samples: of the mini-batch, of which this rank holds those at ``indices``. Collective over its replicas.
        """
        of_domain = [index for index, sample in enumerate(samples) if sample.domain == domain]
        as_read: dict[int, AnySample] = {index: samples[index] for index in of_domain}
        in_view = self.views is not None and self.views.has(domain)
        if self.views is not None and in_view:
            as_read = dict(zip(of_domain, self.views.samples(list(as_read.values()), holders), strict=True))
        requested = own_samples([as_read[index] for index in indices])
        replies = self.engine_for(domain).top_tokens(requested, k, holders)
        if not in_view:
            return replies
        own = own_samples([samples[index] for index in indices])
        return [
            TopTokens(*(from_view(values, sample) for values in vars(reply).values()))
            for sample, reply in zip(own, replies, strict=True)
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class ServedTopK:
    """Distributions on the teacher's k most likely tokens at temperature 1."""

    student: MegatronModel
    teachers: ServedTeachers
    k: int
    tail: str

    def distributions(
        self, mini_batch: MiniBatch, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        samples = mini_batch.samples
        local_indices = [index for batch in micro_batches for index in batch.indices]
        top_tokens: dict[int, TopTokens] = {}  # by index in the mini-batch
        for domain in sorted({sample.domain for sample in samples}):
            indices = [index for index in local_indices if samples[index].domain == domain]
            replies = self.teachers.top_tokens(samples, domain, indices, self.k, self.student.layout)
            top_tokens |= dict(zip(indices, replies, strict=True))
        if not self.student.layout.is_pipeline_last_stage:
            return [None] * len(micro_batches)
        return [self._source(samples, batch, top_tokens) for batch in micro_batches]

    def metrics(self) -> dict[str, Metric]:
        """Return nothing: distributions are not measured."""
        return {}

    def _source(self, samples: Sequence[AnySample], batch: MicroBatch, top_tokens: Mapping[int, TopTokens]) -> TopK:
        """Place the entries of each token at the position that predicts it."""
        # Positions that are not counted need k distinct ids too.
        ids = np.tile(np.arange(self.k), (batch.num_positions, 1))
        log_probs = np.zeros((batch.num_positions, self.k), dtype=np.float32)
        log_tail = np.zeros(batch.num_positions, dtype=np.float32)
        for positions, index in zip(batch.positions(), batch.indices, strict=True):
            top, tokens = top_tokens[index], np.flatnonzero(samples[index].response_mask)
            ids[positions][tokens - 1] = top.ids[tokens]
            log_probs[positions][tokens - 1] = top.log_probs[tokens]
            log_tail[positions][tokens - 1] = top.log_tail[tokens]
        columns = [
            batch.slice_for_cp(torch.from_numpy(values)).to(device.device()) for values in (ids, log_probs, log_tail)
        ]
        return TopK(*columns, tail=self.tail, support="teacher")
