"""What a teacher server computes, on all its ranks: scores and hidden states at the response tokens of a request.

Shapes: r response tokens of all sequences of a request, k top-k entries, h hidden size, v vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from megatron_s2d.buffer_sizes import TOP_K_ROWS_PER_CHUNK
from megatron_s2d.data.packing import MicroBatch
from megatron_s2d.kl.logits import vocab_parallel_topk
from megatron_s2d.kl.teachers import Projection
from megatron_s2d.records import Sample
from megatron_s2d.teachers.frozen import select_support
from megatron_s2d.teachers.service.wire import ScoreRequest
from megatron_s2d.train.megatron_model import MegatronModel

OUTPUT_BLOCK_ROWS = 8192  # rows of the output layer that are sent, and have a digest, together


def samples_of(request: ScoreRequest) -> list[Sample]:
    """Return the sequences of a request as samples."""
    starts = np.cumsum(request.lengths) - request.lengths
    return [
        Sample(
            id=str(number),
            prompt_id="",
            group_id="",
            domain="",
            seed=0,
            token_ids=request.token_ids[start : start + length].astype(np.int64),
            response_mask=request.response_mask[start : start + length].astype(bool),
            temperature=float(request.temperatures[number]),
            finish_reason="stop",
        )
        for number, (start, length) in enumerate(zip(starts.tolist(), request.lengths.tolist(), strict=True))
    ]


@torch.no_grad()
def answer(model: MegatronModel, request: ScoreRequest) -> dict[str, np.ndarray]:
    """Return the tensors of the reply, on the leader; empty on other ranks. Collective over the model's ranks."""
    samples = samples_of(request)
    if request.payload == "sampled":
        scores = model.score_replicated(samples)
        rows = [score[sample.response_mask] for score, sample in zip(scores, samples, strict=True)]
        return {"log_probs": np.concatenate(rows)} if model.layout.is_dp_leader else {}
    batches = model.pack(samples, {})

    def keep(number: int, hidden: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        return list(_rows_by_sample(model, samples, batches[number], hidden))

    found: dict[int, torch.Tensor] = {}
    for rows_of_batch in model.hidden_states(batches, keep):
        found |= dict(rows_of_batch or [])
    if not model.layout.is_pipeline_last_stage:
        return {}
    hidden = torch.cat([found[index] for index in range(len(samples))])
    if request.payload == "hidden":
        return {"hidden": to_wire(hidden)} if model.layout.is_dp_leader else {}
    return _top_k(model, request, hidden)


def _rows_by_sample(
    model: MegatronModel, samples: list[Sample], batch: MicroBatch, hidden: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index of a sample, hidden states [r, h] that predict its response tokens) of a micro-batch."""
    rows = batch.unpack(model.gather_sequence_parallel(hidden))
    for index, of_sample in zip(batch.indices, rows, strict=True):
        yield index, of_sample[torch.from_numpy(samples[index].response_mask).to(of_sample.device)]


def _top_k(model: MegatronModel, request: ScoreRequest, hidden: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the entries of ``kl.teachers.TopK``, computed as the trainer does, and how many of the student's tokens
    are the teacher's too. Collective over the tensor-parallel ranks.
    """
    shard, device = model.shard, hidden.device
    teacher = Projection(hidden, model.output_weight.detach()[: shard.columns], 1.0, torch.float32)
    counts = np.add.reduceat(request.response_mask, np.cumsum(request.lengths) - request.lengths, dtype=np.int64)
    by_row = np.repeat(np.where(request.temperatures == 0, 1.0, request.temperatures), counts)
    temperature = torch.from_numpy(by_row.astype(np.float32)).to(device)
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(hidden), TOP_K_ROWS_PER_CHUNK):
        rows = slice(start, min(start + TOP_K_ROWS_PER_CHUNK, len(hidden)))
        logits = teacher.logits(rows, torch.empty(rows.stop - start, shard.columns, device=device))
        student_ids = None
        if request.student_ids is not None:
            student_ids = torch.from_numpy(request.student_ids[rows].astype(np.int64)).to(device)
            own = vocab_parallel_topk(logits, request.k, shard, temperature[rows])[0]
            shared = (student_ids.unsqueeze(2) == own.unsqueeze(1)).any(2).sum(1)
            parts.setdefault("num_shared", []).append(shared)
        entries = select_support(logits, student_ids, request.source, request.k, shard, temperature[rows])
        for name, value in zip(("ids", "log_probs", "log_tail_mass"), entries, strict=True):
            parts.setdefault(name, []).append(value)
    if not model.layout.is_dp_leader:
        return {}
    integers = ("ids", "num_shared")
    return {
        name: torch.cat(values).to(torch.int32 if name in integers else torch.float32).cpu().numpy()
        for name, values in parts.items()
    }


def to_wire(values: torch.Tensor) -> np.ndarray:
    """Return float32 values, or the bits of bfloat16 ones (uint16), in host memory."""
    values = values.detach().contiguous().cpu()
    return values.view(torch.int16).numpy().view(np.uint16) if values.dtype == torch.bfloat16 else values.numpy()


def from_wire(values: np.ndarray) -> torch.Tensor:
    """Invert ``to_wire``."""
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def output_layer(model: MegatronModel) -> tuple[np.ndarray, list[str]] | None:
    """Return the output layer [v, h] in host memory and the SHA-256 of its blocks of rows; None on other ranks than
    the leader. Collective.
    """
    if not model.layout.is_pipeline_last_stage:
        return None
    weight = model.shard.gather(model.output_weight.detach()).flatten(0, 1)[: model.spec.vocab_size]
    if not model.layout.is_dp_leader:
        return None
    rows = to_wire(weight)
    return rows, [block_digest(rows[start : start + OUTPUT_BLOCK_ROWS]) for start in _starts(len(rows))]


def _starts(num_rows: int) -> range:
    return range(0, num_rows, OUTPUT_BLOCK_ROWS)


def block_digest(rows: np.ndarray) -> str:
    """Return the SHA-256 of a block of the output layer."""
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
