"""A workflow on another number of ranks: the number of replicas changes, their layout does not."""

from pathlib import Path

import pytest

from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"


def workflow(*overrides):
    return load_workflow(SMOKE, list(overrides))


def test_replicas_follow_the_ranks():
    config = workflow(
        "parallel={tensor_model_parallel_size: 2, data_parallel_size: 4}",
        "teacher_parallel={rl_teacher: {pipeline_model_parallel_size: 4, data_parallel_size: 2}}",
    )
    fewer = config.with_world_size(4)
    assert (fewer.parallel.tensor_model_parallel_size, fewer.parallel.data_parallel_size) == (2, 2)
    assert fewer.frozen_parallel("rl_teacher").world_size == 4 and fewer.frozen_parallel("opd") == fewer.parallel
    assert fewer.stages == config.stages and config.with_world_size(8) == config


@pytest.mark.parametrize("world_size", [3, 2])
def test_ranks_that_are_no_multiple_of_a_replica_are_refused(world_size):
    config = workflow(
        "parallel={tensor_model_parallel_size: 2, data_parallel_size: 2}",
        "teacher_parallel={pipeline_model_parallel_size: 4}",
    )
    with pytest.raises(UserError, match=f"--elastic: {world_size} ranks are not a multiple of the"):
        config.with_world_size(world_size)
