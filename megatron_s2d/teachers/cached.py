"""A teacher cache as the teacher of a stage: its distributions, micro-batch by micro-batch (methods.md M2).

Shapes: t response tokens of a micro-batch, k top-k entries, h hidden size.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.data.cache import CacheHeader, TeacherCache, cache_info
from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.data.row_digests import digests_by_position
from megatron_s2d.data.tokenizer import template_fingerprint, tokenizer_fingerprint
from megatron_s2d.errors import UserError
from megatron_s2d.kl.teachers import LazyHiddenStates, Logits, TeacherSource, TopK
from megatron_s2d.objectives.terms import Metric
from megatron_s2d.parallel import device
from megatron_s2d.records import AnySample, Sample, own_samples
from megatron_s2d.teachers.hidden_state_transfer import OffloadedRows
from megatron_s2d.train.megatron_model import MegatronModel


def open_cache(
    directory: StageDirectory,
    teacher: StageDirectory,
    tokenizer: Any,
    date: datetime.date,
    view_fingerprint: str | None = None,
) -> TeacherCache:
    """Open the cache in ``directory``; raise ``UserError`` if its teacher, tokenizer, template or view is another."""
    info = cache_info(directory.cache_path)
    header = CacheHeader(**{name: info[name] for name in CacheHeader.model_fields if name in info})
    expected = {
        "teacher_digest": teacher.finished()["outputs"][teacher.model_path.name],
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "template_fingerprint": template_fingerprint(tokenizer, date),
        "view_fingerprint": view_fingerprint,
    }
    return TeacherCache.open(directory.cache_path, expect=header.model_copy(update=expected))


class CachedTeacher:
    """The distributions of a teacher cache, for the columns of the student's shard."""

    def __init__(
        self, cache: TeacherCache, output_layer: Path | None, student: MegatronModel, *, tail: str, temperature: float
    ):
        """output_layer: file with the teacher's output layer, for a cache of hidden states. temperature: of both sides.

        Raises ``UserError`` for a cache of sampled log-probabilities only, and for log-probabilities of a top-k cache
        at another temperature.
        """
        header = cache.header
        if header.representation == "sampled_token":
            raise UserError(
                f"{cache.directory}: a cache of representation sampled_token holds no distributions; use "
                "hidden_states, full_vocab or top_k"
            )
        if header.representation == "top_k" and header.temperature != temperature:
            raise UserError(
                f"{cache.directory}: top-k log-probabilities at temperature {header.temperature} cannot be used at "
                f"{temperature}; set the stage's temperature to the cache's, or cache hidden states"
            )
        self._cache, self._student, self._tail, self._temperature = cache, student, tail, temperature
        self._weight = None
        if header.representation == "hidden_states" and student.layout.is_pipeline_last_stage:
            with safe_open(output_layer, "pt") as file:
                rows = file.get_slice("weight")
                shard = student.shard
                self._weight = rows[shard.start : shard.stop].to(device.device())

    def distributions(
        self, mini_batch: MiniBatch, micro_batches: Sequence[MicroBatch]
    ) -> Sequence[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        if not self._student.layout.is_pipeline_last_stage:
            return [None] * len(micro_batches)
        return [self._source(mini_batch.samples, batch) for batch in micro_batches]

    def metrics(self) -> dict[str, Metric]:
        """Return nothing: distributions are not measured."""
        return {}

    def _source(self, samples: Sequence[AnySample], batch: MicroBatch) -> TeacherSource:
        header = self._cache.header
        rows = own_samples([samples[index] for index in batch.indices])
        cached = [self._cache.distribution(sample).tensors() for sample in rows]
        cached = cached or [_no_rows(header)]
        tensors = {name: torch.cat([item[name] for item in cached]) for name in cached[0]}
        positions = predicting_positions(rows, batch)
        self._check_positions(tensors.pop("token_digests"), positions, samples, batch)
        if header.representation == "hidden_states":
            hidden = OffloadedRows.cut(tensors["hidden"], positions, batch, self._student)
            return LazyHiddenStates(hidden.read, lambda: self._weight, self._temperature)
        columns = {name: scatter_rows(values, positions, batch) for name, values in tensors.items()}
        if header.representation == "full_vocab":
            shard = self._student.shard
            log_probs = columns["log_probs"][:, shard.start : shard.stop]
            # log-probabilities times their temperature are logits up to a constant
            return Logits(log_probs * header.temperature, temperature=self._temperature)
        # Positions that are not counted need k distinct ids too.
        counted = batch.response_mask.unsqueeze(1)
        ids = torch.where(counted, columns["ids"], torch.arange(header.k, dtype=torch.int32, device=counted.device))
        return TopK(ids, columns["log_probs"], columns["log_tail_mass"], tail=self._tail)

    def _check_positions(
        self, digests: torch.Tensor, positions: torch.Tensor, samples: Sequence[AnySample], batch: MicroBatch
    ) -> None:
        """Raise ``UserError`` unless each row [t] is at the position that predicts the token it was cached for."""
        found = torch.zeros(batch.num_positions, dtype=torch.int32)
        found[positions] = digests
        differs = found != torch.from_numpy(digests_by_position(samples, batch.plan))
        if differs.any():
            pairs = zip(batch.indices, batch.positions(), strict=True)
            names = [samples[index].id for index, of_sample in pairs if differs[of_sample].any()]
            raise UserError(
                f"{self._cache.directory}: rows of other tokens were read for sample {names[0]}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                + "; rebuild the cache, and report a bug if that does not help"
            )


def _no_rows(header: CacheHeader) -> dict[str, torch.Tensor]:
    """Return the tensors of a cache without rows, for a micro-batch without samples."""
    dtypes = {"ids": torch.int32, "token_digests": torch.int32}
    return {name: torch.zeros(shape, dtype=dtypes.get(name, torch.float32)) for name, shape in header.shapes(0).items()}


def predicting_positions(rows: Sequence[Sample], batch: MicroBatch) -> torch.Tensor:
    """Return the positions [t] int64 that predict response tokens of ``rows``, the samples of the micro-batch."""
    all_positions = torch.arange(batch.num_positions)
    parts = [
        all_positions[positions][torch.from_numpy(sample.response_mask).nonzero().squeeze(1) - 1]
        for positions, sample in zip(batch.positions(), rows, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def scatter_rows(values: torch.Tensor, positions: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return rows [t, ...] at ``positions`` of this context-parallel rank's positions; zeros elsewhere."""
    scattered = values.new_zeros(batch.num_positions, *values.shape[1:])
    scattered[positions] = values
    return batch.slice_for_cp(scattered).to(device.device())
