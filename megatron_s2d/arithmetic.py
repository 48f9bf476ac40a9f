"""Integer arithmetic that many modules share: division rounded up, alignment, and power-of-two bins. No torch here."""

from __future__ import annotations


def ceil_div(dividend: int, divisor: int) -> int:
    """Return ``dividend / divisor`` rounded up."""
    return -(-dividend // divisor)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return ceil_div(value, multiple) * multiple


def log2_bin_starts(limit: int) -> list[int]:
    """Return the first value of each of the bins 0, 1, 2-3, 4-7, ... up to the one that contains ``limit``.

    A sorted list, as ``numpy.searchsorted`` and ``torch.bucketize`` take it.
    """
    return [0, *(2**power for power in range(limit.bit_length()))]
