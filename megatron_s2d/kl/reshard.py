"""Bring a teacher's output layer to the student's vocabulary shard: other tensor-parallel size, other padding.

Rows are addressed by global token id only, so padding at the end of either layout is never read. Two ways: from storage
or memory that holds whole rows (``reshard_output_layer``), or live between ranks (``redistribute_output_layer``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_s2d.errors import UserError
from megatron_s2d.kl.shards import VocabShard

Piece = tuple[VocabShard, torch.Tensor]  # rows [start, stop) of the output layer, then possibly padding rows


def reshard_output_layer(source: object, shard: VocabShard) -> torch.Tensor:
    """Rows ``[shard.start, shard.stop)`` of an output layer: [shard.columns, d], no padding.

    source: a tensor [>= vocab_size, d]; a lazy slice of a safetensors file (only the rows needed are read); or the
    pieces of another layout, ``[(VocabShard, tensor [>= its columns, d]), ...]`` in any order.
    """
    if isinstance(source, Sequence):
        return _from_pieces(source, shard)
    rows = source.shape[0] if isinstance(source, torch.Tensor) else source.get_shape()[0]
    if rows < shard.vocab_size:
        raise UserError(
            f"the teacher's output layer has {rows} rows for a vocabulary of {shard.vocab_size}: "
            "teacher and student must share one vocabulary"
        )
    return source[shard.start : shard.stop]


def _from_pieces(pieces: Sequence[Piece], shard: VocabShard) -> torch.Tensor:
    for piece, _ in pieces:
        if piece.vocab_size != shard.vocab_size:
            raise UserError(
                f"teacher's vocabulary of {piece.vocab_size} against the student's {shard.vocab_size}: "
                "teacher and student must share one vocabulary"
            )
    if not pieces:
        raise UserError("no pieces of the teacher's output layer were given")
    first = pieces[0][1]
    result = first.new_empty(shard.columns, first.shape[1])
    covered = 0
    for piece, rows in pieces:
        covered += _copy_overlap(piece.start, piece.stop, rows, result, shard)
    if covered != shard.columns:
        raise UserError(
            f"the pieces of the teacher's output layer give {covered} of the rows [{shard.start}, {shard.stop}): "
            "pass every tensor-parallel piece exactly once"
        )
    return result


def _copy_overlap(start: int, stop: int, rows: torch.Tensor, result: torch.Tensor, shard: VocabShard) -> int:
    """Copy the rows with ids in both ``[start, stop)`` and the shard; their number."""
    low, high = max(start, shard.start), min(stop, shard.stop)
    if low >= high:
        return 0
    result[low - shard.start : high - shard.start] = rows[low - start : high - start]
    return high - low


def redistribute_output_layer(
    rows: torch.Tensor | None, held: VocabShard | None, wanted: VocabShard | None, group: dist.ProcessGroup
) -> torch.Tensor | None:
    """The rows of ``wanted`` [wanted.columns, d] from ranks of ``group`` that hold pieces in another layout.

    rows, held: this rank's piece, or None for both. wanted: None for a rank that needs no rows. Every rank of
    ``group`` calls; each distinct piece is broadcast once by the first rank that holds it, so replicas cost nothing
    and memory stays at one piece beside the result.
    """
    me = None if rows is None else (held.start, held.stop, rows.shape[1], str(rows.dtype).removeprefix("torch."))
    everyone: list[tuple | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, me, group=group)
    holders: dict[tuple, int] = {}
    for rank, piece in enumerate(everyone):
        if piece is not None:
            holders.setdefault(piece, rank)
    if wanted is not None and sum(stop - start for start, stop, _, _ in holders) != wanted.vocab_size:
        raise UserError(
            f"the group's pieces {sorted(piece[:2] for piece in holders)} do not cut the vocabulary of "
            f"{wanted.vocab_size} into disjoint shards"
        )
    device = rows.device if rows is not None else _device_of(group)
    result = None
    for (start, stop, width, dtype), rank in sorted(holders.items()):
        if start == stop:
            continue
        piece = torch.empty(stop - start, width, dtype=getattr(torch, dtype), device=device)
        if rank == dist.get_rank(group):
            piece.copy_(rows[: stop - start])
        dist.broadcast(piece, dist.get_global_rank(group, rank), group=group)
        if wanted is not None:
            if result is None:
                result = piece.new_empty(wanted.columns, width)
            _copy_overlap(start, stop, piece, result, wanted)
    return result


def _device_of(group: dist.ProcessGroup) -> torch.device:
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
