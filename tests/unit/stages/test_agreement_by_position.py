"""Shares of consensus and conflict of the SG-OPD gate by position in the response."""

import numpy as np
import pytest
import torch

from megatron_s2d.objectives.terms import means_by_position
from megatron_s2d.stages.sg_opd import agreement_by_position


def test_shares_of_each_bin():
    positions = np.array([0, 1, 2, 3, 0, 1, 2, 0, 4])
    agreement = np.array([1, -1, 1, 0, 1, 1, -1, -1, 1])
    metrics = agreement_by_position(agreement, positions, int(positions.max()))
    assert {key: value for key, value in metrics.items() if "consensus" in key} == pytest.approx(
        {f"gate/consensus_by_position/{first}": value for first, value in ((0, 2 / 3), (1, 1 / 2), (2, 1 / 3), (4, 1))}
    )
    assert metrics["gate/conflict_by_position/0"] == pytest.approx(1 / 3)
    assert metrics["gate/conflict_by_position/4"] == 0


def test_bins_are_those_of_the_kl():
    for position in (0, 1, 2, 3, 4, 7, 8, 15, 16, 1000):
        agreement_bins = [
            key.rpartition("/")[2] for key in agreement_by_position(np.array([1]), np.array([position]), position)
        ]
        kl = means_by_position("kl_by_position", torch.ones(1), torch.tensor([position]), 2048)
        assert agreement_bins[0] == next(key.rpartition("/")[2] for key, metric in kl.items() if metric.denominator > 0)
