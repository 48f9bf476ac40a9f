"""Rounded division, alignment and power-of-two bins."""

import numpy as np

from megatron_s2d.arithmetic import ceil_div, log2_bin_starts, round_up


def test_division_and_alignment_round_up():
    assert [ceil_div(value, 4) for value in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [round_up(value, 4) for value in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_bins_double_in_width_and_cover_the_limit():
    assert log2_bin_starts(0) == [0]
    assert log2_bin_starts(7) == [0, 1, 2, 4]
    assert log2_bin_starts(8) == [0, 1, 2, 4, 8]
    bins = np.searchsorted(log2_bin_starts(8), range(9), side="right") - 1
    assert bins.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]
