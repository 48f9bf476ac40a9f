"""Peak memory while gradient buffers and optimizer are made, before the first update. No torch here.

Follows Megatron's distributed optimizer: gradient buffers are cut into buckets, every data rank has an equal share of
each bucket, and for every parameter in its share it makes a float32 master, one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.estimate.layers import Build, ModelShard

_FEWEST_BUCKET_ELEMENTS = 40_000_000  # with overlapped reductions, and a million for each data rank


def prepare_training_peak(
    shard: ModelShard, build: Build, stage_rank: int | None = None, fp8_parameters: bool = False
) -> int:
    """Return peak bytes while gradient buffers and optimizer are made; the moments come with the first update.

    The weights of each buffer (dense, then experts) are copied into it beside its gradients, and freed. Then masters
    are made, each of a copy in the weights' dtype.

    stage_rank: of one pipeline stage's ranks, in Megatron's order; None: the one that needs most. fp8_parameters: the
    layers' weights are stored in FP8, which have a buffer of their own, the last one.
    """
    size = build.bytes_per_value
    buffers = shard.gradient_buffers(build.lora)
    made, old, copying = 0, sum(count for count, _ in shard.trained_sizes(build.lora)) * size, 0
    if build.lora is not None:
        made = shard.num_parameters * size  # they stay where they are
    for count, _ in buffers:
        made += count * (size + 4)
        copying = max(copying, made + old)
        old -= count * size
    if size == 4:
        return copying
    peaks = _masters_peaks(shard, build, fp8_parameters)
    return max(copying, made + (max(peaks) if stage_rank is None else peaks[stage_rank]))


@dataclasses.dataclass
class _Masters:
    """Bytes of the masters of one data rank: at most, and when all are made."""

    peak: int = 0
    total: int = 0

    def add(self, elements: int, size: int) -> None:
        self.peak = max(self.peak, self.total + (4 + size) * elements)
        self.total += 4 * elements


def _masters_peaks(shard: ModelShard, build: Build, fp8_parameters: bool) -> list[int]:
    """Return the peak of each rank of the pipeline stage: dense masters are made first, then those of experts."""
    num_ranks = shard.parallel.world_size // shard.parallel.pipeline_model_parallel_size
    sizes, buffers = shard.trained_sizes(build.lora), shard.gradient_buffers(build.lora)
    if fp8_parameters:  # masters of the embedding and the output layer are made first
        vocabulary = shard.local_vocab_size * shard.spec.hidden_size
        sizes.sort(key=lambda item: item[0] == vocabulary)
    kinds = [[count for count, is_expert in sizes if is_expert == kind] for kind in (False, True)]
    if len(buffers) == 1:
        kinds = [[count for count, _ in sizes]]
    of_buffers = [_masters_of_ranks(shard, build, kind, ranks) for kind, (_, ranks) in zip(kinds, buffers, strict=True)]
    peaks = []
    for rank in range(num_ranks):
        peak = total = 0
        for masters in of_buffers:  # neighbouring ranks have the same share of different tensor or expert ranks
            item = masters[rank * len(masters) // num_ranks]
            peak, total = max(peak, total + item.peak), total + item.total
        peaks.append(peak)
    return peaks


def _masters_of_ranks(shard: ModelShard, build: Build, sizes: Sequence[int], num_ranks: int) -> list[_Masters]:
    """Return the masters of each of ``num_ranks`` data ranks, for parameters of ``sizes`` in the model's order."""
    masters = [_Masters() for _ in range(num_ranks)]
    for bucket in _buckets(shard, build, sizes, num_ranks):
        share = ceil_div(sum(bucket), num_ranks)
        start = 0
        for count in bucket:
            for rank in range(start // share, ceil_div(start + count, share)):
                piece = min(start + count, (rank + 1) * share) - max(start, rank * share)
                masters[rank].add(piece, build.bytes_per_value)
            start += count
    return masters


def _buckets(shard: ModelShard, build: Build, sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return the sizes of the parameters of each bucket; the last parameters of the model come first."""
    overlaps, _ = shard.parallel.overlaps(on_gpu=build.on_gpu or build.fused)
    fewest = max(_FEWEST_BUCKET_ELEMENTS, 1_000_000 * num_ranks) if overlaps else None
    tied = shard.spec.tie_word_embeddings and shard.parallel.pipeline_model_parallel_size > 1
    shared = shard.local_vocab_size * shard.spec.hidden_size if tied else None  # has a bucket of its own
    buckets: list[list[int]] = [[]]
    for count in reversed(sizes):
        if count == shared and buckets[-1]:
            buckets.append([])
        buckets[-1].append(count)
        if count == shared or (fewest is not None and sum(buckets[-1]) >= fewest):
            buckets.append([])
    return [bucket for bucket in buckets if bucket]
