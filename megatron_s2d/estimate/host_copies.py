"""Copies of weights and of optimizer state that a rank makes beside its tensors: to decode on a CPU, and to save.

Follows ``models/decoding.py``, ``parallel/checkpoint.py`` and Megatron-Core's distributed optimizer. No torch here.
"""

from __future__ import annotations

from megatron_s2d.buffer_sizes import FEWEST_PACKED_VALUES, FEWEST_PREPARED_TOKENS
from megatron_s2d.config.stage import TrainingStageConfig
from megatron_s2d.estimate.layers import Build, ModelShard


def packed_weight_bytes(shard: ModelShard, build: Build, num_tokens: int) -> int:
    """Return bytes of the packed copies that decoding ``num_tokens`` tokens of a response makes on a CPU."""
    if build.on_gpu or build.bytes_per_value != 4 or num_tokens < FEWEST_PREPARED_TOKENS:
        return 0
    sizes = [count for count, _ in shard.parameter_sizes() if count >= FEWEST_PACKED_VALUES]
    embedding = shard.local_vocab_size * shard.spec.hidden_size
    if embedding >= FEWEST_PACKED_VALUES and shard.is_pipeline_first_stage and not shard.has_tied_output:
        sizes.remove(embedding)  # its rows are looked up, not multiplied
    return 4 * sum(sizes)


def save_phase(shard: ModelShard, build: Build, stage: TrainingStageConfig, optimizer: int) -> dict[str, int]:
    """Return bytes that saving adds: checkpoints with the state of training, or the final weights alone.

    On a CPU the writer copies what is part of a larger tensor: weights, which are in the gradients' buffer, and in
    float32 what the optimizer holds of them. Several data ranks gather all state on each of them before it is written.
    optimizer: bytes of its state on this rank.
    """
    count = sum(elements for elements, _ in shard.gradient_buffers(build.lora))
    data_ranks = shard.parallel.data_parallel_size * shard.parallel.context_parallel_size
    added: dict[str, int] = {}
    if _saves_checkpoints(stage):
        if data_ranks > 1:
            # Of weights, first and second moments: this rank's share; of one of them: what all ranks sent, twice.
            shares = 4 * count // data_ranks
            added["gathered state"] = 4 * count + shares if build.on_gpu else 3 * (4 * count + shares) + 8 * count
        if stage.offload_optimizer and build.on_gpu:
            added["optimizer"] = optimizer
        if not build.on_gpu:
            copied = build.bytes_per_value + (4 if build.bytes_per_value == 4 else 0)
            if stage.checkpoint.async_save or data_ranks > 1:
                copied = build.bytes_per_value + 12
            added["copies for the writer"] = copied * count
    elif not build.on_gpu and build.lora is None:
        added["copies for the writer"] = build.bytes_per_value * count
    return added


def staged_copies(shard: ModelShard, build: Build, stage: TrainingStageConfig) -> dict[str, int]:
    """Return bytes of pinned memory in which the writer of checkpoints stages what a GPU has, and which it keeps.

    Weights, and on a single data rank masters and moments; several gather these in host memory that is not pinned.
    """
    if not build.on_gpu or not _saves_checkpoints(stage):
        return {}
    count = sum(elements for elements, _ in shard.gradient_buffers(build.lora))
    data_ranks = shard.parallel.data_parallel_size * shard.parallel.context_parallel_size
    return {"checkpoints": (build.bytes_per_value + (12 if data_ranks == 1 else 0)) * count}


def _saves_checkpoints(stage: TrainingStageConfig) -> bool:
    """Whether the stage saves the state of training, rather than its final weights only."""
    return stage.checkpoint.interval_steps < stage.steps or stage.validation is not None
