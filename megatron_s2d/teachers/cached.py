"""A teacher cache opened for a stage, and as a source of distributions, micro-batch by micro-batch (methods.md M2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.data.cache import CacheHeader, TeacherCache, cache_info
from megatron_s2d.data.packing import MicroBatch, MiniBatch
from megatron_s2d.data.tokenizer import template_fingerprint, tokenizer_fingerprint
from megatron_s2d.errors import UserError
from megatron_s2d.kl.teachers import LazyHiddenStates, Logits, TeacherSource, TopK
from megatron_s2d.objectives.terms import Metric
from megatron_s2d.parallel import device
from megatron_s2d.teachers.hidden_state_transfer import OffloadedRows
from megatron_s2d.train.megatron_model import MegatronModel


def open_cache(directory: StageDirectory, teacher: StageDirectory, tokenizer: Any) -> TeacherCache:
    """The cache in ``directory``; ``UserError`` where it is of another teacher, tokenizer or chat template."""
    info = cache_info(directory.cache_path)
    found = CacheHeader(**{name: info[name] for name in CacheHeader.model_fields})
    expected = {
        "teacher_digest": teacher.finished()["outputs"][teacher.model_path.name],
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "template_fingerprint": template_fingerprint(tokenizer),
    }
    return TeacherCache.open(directory.cache_path, expect=found.model_copy(update=expected))


class CachedTeacher:
    """The distributions of a teacher cache, for the columns of the student's shard."""

    def __init__(
        self, cache: TeacherCache, output_layer: Path | None, student: MegatronModel, *, tail: str, temperature: float
    ):
        """output_layer: file with the teacher's output layer, for a cache of hidden states. temperature: of both sides.

        Raises ``UserError`` for a cache of sampled log-probabilities only, and for log-probabilities of a top-k cache
        that were taken at another temperature.
        """
        header = cache.header
        if header.representation == "sampled_token":
            raise UserError(
                f"{cache.directory}: a cache of representation sampled_token holds no distributions; use hidden_states, full_vocab or top_k"
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

    def distributions(self, update: MiniBatch, batches: Sequence[MicroBatch]) -> list[TeacherSource | None]:
        """See ``train.loop.Teacher``."""
        if not self._student.layout.is_pipeline_last_stage:
            return [None] * len(batches)
        return [self._source(update, batch) for batch in batches]

    def metrics(self) -> dict[str, Metric]:
        """Nothing is measured."""
        return {}

    def _source(self, update: MiniBatch, batch: MicroBatch) -> TeacherSource:
        header = self._cache.header
        found = [self._cache.distribution(update.samples[index]).tensors() for index in batch.indices] or [
            _empty(header)
        ]
        rows = _rows(update, batch)
        if header.representation == "hidden_states":
            hidden = OffloadedRows.cut(torch.cat([item["hidden"] for item in found]), rows, batch, self._student)
            return LazyHiddenStates(hidden.read, lambda: self._weight, self._temperature)
        spread = {name: _spread(torch.cat([item[name] for item in found]), rows, batch) for name in found[0]}
        if header.representation == "full_vocab":
            shard = self._student.shard
            log_probs = spread["log_probs"][:, shard.start : shard.stop]
            # log-probabilities times their temperature are logits up to a constant
            return Logits(log_probs * header.temperature, temperature=self._temperature)
        # Positions that are not counted need k distinct ids too.
        counted = batch.response_mask.unsqueeze(1)
        ids = torch.where(counted, spread["ids"], torch.arange(header.k, dtype=torch.int32, device=counted.device))
        return TopK(ids, spread["log_probs"], spread["log_tail_mass"], tail=self._tail)


def _empty(header) -> dict[str, torch.Tensor]:
    dtypes = {"ids": torch.int32}
    return {name: torch.zeros(shape, dtype=dtypes.get(name, torch.float32)) for name, shape in header.shapes(0).items()}


def _rows(update: MiniBatch, batch: MicroBatch) -> torch.Tensor:
    """Positions [response tokens] int64 among all of the batch, sample by sample in the batch's order."""
    everywhere = torch.arange(batch.num_positions)
    parts = [
        everywhere[place][torch.from_numpy(update.samples[index].response_mask).nonzero().squeeze(1) - 1]
        for place, index in zip(batch.positions(), batch.indices, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _spread(values: torch.Tensor, rows: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Rows of response tokens at their positions in [N, ...]; zeros elsewhere, where nothing is counted."""
    whole = values.new_zeros(batch.num_positions, *values.shape[1:])
    whole[rows] = values
    return batch.slice_for_cp(whole).to(device.device())
