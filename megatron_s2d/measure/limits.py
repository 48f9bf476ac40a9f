"""How much of a step is run when a stage is measured. No torch here."""

from __future__ import annotations

import dataclasses

from megatron_s2d.arithmetic import ceil_div, round_up
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.estimate.stage_memory import StageShape

STEPS = 2  # the first update allocates the optimizer's state


@dataclasses.dataclass(frozen=True)
class Limits:
    """What repeats itself is run a few times only; the memory of a pass does not depend on it."""

    micro_batches: int = 4  # of an update, where whole groups of responses allow it
    decoded_tokens: int = 8  # of a response
    saves: bool = False  # write checkpoints, of the size of real ones, to a temporary folder


def shortened(
    config: WorkflowConfig, name: str, shape: StageShape, limits: Limits
) -> tuple[WorkflowConfig, StageShape]:
    """Return the workflow with two steps of stage ``name`` and as many responses as fill the micro-batches.

    Responses are generated as many as in a full step (``shape.requests``). Limits on values, which are made up, are
    removed.
    """
    stage = config.stages[name]
    update: dict[str, object] = {"steps": STEPS, "validation": None} if hasattr(stage, "steps") else {}
    if isinstance(stage, OpdConfig):
        update["max_kl"] = None
    if limits.saves:  # after the first step: after the last one only weights are written
        update["checkpoint"] = stage.checkpoint.model_copy(update={"interval_steps": 1})
    if shape.responses:
        dp_size = config.parallel.data_parallel_size
        per_rank = min(ceil_div(shape.responses, dp_size), _filling(config, name, shape, limits))
        if isinstance(stage, GrpoConfig | OpdConfig):
            per_group, per_rank = _groups(per_rank, stage.num_generations)
            num_groups = per_rank * dp_size // per_group
            update |= {"num_generations": per_group, "train_batch_size": num_groups * stage.num_mini_batches}
        else:
            update["global_batch_size"] = per_rank * dp_size
        shape = dataclasses.replace(shape, responses=per_rank * dp_size)
    stages = dict(config.stages) | {name: stage.model_copy(update=update)}
    limits_of_values = {"max_mismatch_kl": None, "min_replayed_agreement": None}
    synchronous = {"async_mode": "sync", "max_staleness": None, "over_sampling_ratio": 1.0}
    rollout = config.rollout.model_copy(update=limits_of_values | synchronous)
    return config.model_copy(update={"stages": stages, "rollout": rollout, "tracking": []}), shape


def _groups(responses: int, num_generations: int) -> tuple[int, int]:
    """Return (responses of a group, responses): whole groups of the largest size up to ``num_generations``."""
    if num_generations > 1:
        responses += responses % 2  # a group has at least two
    return max(size for size in range(1, num_generations + 1) if responses % size == 0), responses


def _filling(config: WorkflowConfig, name: str, shape: StageShape, limits: Limits) -> int:
    """Return the responses of one data-parallel rank that fill the micro-batches of an update."""
    parallel = config.parallel
    alignment = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    tokens = config.stages[name].micro_batch.max_tokens_per_gpu * parallel.context_parallel_size
    return limits.micro_batches * max(1, tokens // round_up(shape.length, alignment))
