"""Which graded groups a step trains on: a policy of the rollout buffer, which replaces the others.

Shapes: b samples of all data-parallel ranks, group by group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_s2d.objectives.advantages import zero_variance_groups
from megatron_s2d.records import AnySample


@dataclasses.dataclass(frozen=True)
class GroupFilter:
    """Accepts groups whose rewards differ (DAPO's dynamic sampling) and whose share of correct responses fits."""

    max_num_gen_batches: int  # batches of prompts that are sampled for one step at most, with the first
    min_pass_rate: float = 0.0
    max_pass_rate: float = 1.0

    def accepted(self, samples: Sequence[AnySample]) -> list[AnySample]:
        """Return the samples of accepted groups; the same on all ranks."""
        groups = np.array([sample.group_id for sample in samples])
        dropped = set(zero_variance_groups(np.array([sample.reward for sample in samples]), groups).tolist())
        if (self.min_pass_rate, self.max_pass_rate) != (0.0, 1.0):
            ids, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
            correct = np.array([sample.verifier_label == "correct" for sample in samples])
            rates = np.bincount(members, weights=correct, minlength=len(ids)) / sizes
            dropped |= set(ids[(rates < self.min_pass_rate) | (rates > self.max_pass_rate)].tolist())
        return [sample for sample in samples if sample.group_id not in dropped]
