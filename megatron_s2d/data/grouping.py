"""Groups the lengths of samples into micro-batches under a token budget. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_s2d.arithmetic import round_up


def group_into_micro_batches(
    lengths: Sequence[int], *, max_tokens: int, alignment: int = 1, packed: bool = False
) -> list[list[int]]:
    """Return the indices of samples by micro-batch; at least one, which may be empty.

    Longest first. Padded: samples of similar length share a micro-batch; packed: first fit. Deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    size = _packed_size if packed else _padded_size
    batches: list[list[int]] = []
    for index in order:
        open_batches = batches if packed else batches[-1:]
        for batch in open_batches:
            if size([lengths[other] for other in [*batch, index]], alignment) <= max_tokens:
                batch.append(index)
                break
        else:
            batches.append([index])
    return batches or [[]]


def split_micro_batches(
    batches: Sequence[Sequence[int]], count: int, lengths: Sequence[int], *, alignment: int = 1, packed: bool = False
) -> list[list[int]]:
    """Return ``count`` micro-batches, by falling size: the largest are halved, and empty ones added after that."""
    result = [list(batch) for batch in batches]
    while len(result) < count:
        largest = max(range(len(result)), key=lambda i: len(result[i]))
        if len(result[largest]) < 2:
            result.append([])
            continue
        half = len(result[largest]) // 2
        result[largest : largest + 1] = [result[largest][:half], result[largest][half:]]
    size = _packed_size if packed else _padded_size
    cost = [size([lengths[index] for index in batch], alignment) for batch in result]
    return [result[i] for i in sorted(range(len(result)), key=lambda i: (-cost[i], i))]


def _padded_size(lengths: Sequence[int], alignment: int) -> int:
    return len(lengths) * round_up(max(lengths, default=0), alignment)


def _packed_size(lengths: Sequence[int], alignment: int) -> int:
    return round_up(sum(lengths), alignment)
