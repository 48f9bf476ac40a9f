"""Lengths of micro-batches that a model's layers can compute."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import RECIPES, Fp8Config
from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample


def length_multiple(parallel: ParallelConfig, fp8: Fp8Config | None, overlapped_tokens: int | None) -> int:
    """Return the alignment of a micro-batch's length on a context rank.

    Each rank's tokens then fill the blocks of the FP8 recipe. overlapped_tokens: with ``tp_comm_overlap`` the limit of
    a micro-batch; the alignment is then the largest length within it, so that every micro-batch has this length.
    """
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    multiple = shards * (1 if fp8 is None else RECIPES[fp8.recipe].tokens)
    if overlapped_tokens is None:
        return multiple
    if parallel.context_parallel_size > 1:
        multiple = math.lcm(multiple, 2)
    return max(1, overlapped_tokens // multiple) * multiple


def check_lengths(samples: Sequence[Sample], limit: int) -> None:
    """Raise ``UserError`` for a sample that is longer than the ``limit`` tokens of every micro-batch."""
    for sample in samples:
        if len(sample.token_ids) > limit:
            raise UserError(
                f"sample {sample.id} has {len(sample.token_ids)} tokens, and with parallel.tp_comm_overlap every "
                f"micro-batch has {limit}: raise micro_batch.max_tokens_per_gpu, or leave tp_comm_overlap out"
            )
