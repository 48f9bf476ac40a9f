"""Where in the response verifier and teacher agree."""

import numpy as np
import pytest
import torch

from megatron_s2d.stages.distill import fractions_by_position
from megatron_s2d.train.policy import kl_by_position


def test_shares_of_each_group_of_places():
    places = np.array([0, 1, 2, 3, 0, 1, 2, 0, 4])
    agreement = np.array([1, -1, 1, 0, 1, 1, -1, -1, 1])
    found = fractions_by_position(agreement, places)
    assert {key: value for key, value in found.items() if "consensus" in key} == pytest.approx(
        {f"gate/consensus_by_position/{first}": value for first, value in ((0, 2 / 3), (1, 1 / 2), (2, 1 / 3), (4, 1))}
    )
    assert found["gate/conflict_by_position/0"] == pytest.approx(1 / 3) and found["gate/conflict_by_position/4"] == 0


def test_the_groups_are_those_of_the_kl():
    for place in (0, 1, 2, 3, 4, 7, 8, 15, 16, 1000):
        own = [key.rpartition("/")[2] for key in fractions_by_position(np.array([1]), np.array([place]))]
        kl = kl_by_position(torch.ones(1), torch.tensor([place]), 2048)
        assert own[0] == next(key.rpartition("/")[2] for key, metric in kl.items() if metric.denominator > 0)
