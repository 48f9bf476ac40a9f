"""Parallel sizes of a model: tensor, pipeline, context, expert, data and sequence parallelism. No torch here."""

from __future__ import annotations

import pydantic

from megatron_s2d.config.base import Config


class ParallelConfig(Config):
    """Megatron-Core parallel sizes of one model; their product (without expert parallelism) is the number of ranks."""

    tensor_model_parallel_size: int = pydantic.Field(1, ge=1, description="ranks that share each layer")
    pipeline_model_parallel_size: int = pydantic.Field(1, ge=1, description="ranks that share the depth")
    context_parallel_size: int = pydantic.Field(
        1, ge=1, description="ranks that share a sequence (needs micro_batch.sequence_packing)"
    )
    expert_model_parallel_size: int = pydantic.Field(
        1, ge=1, description="ranks that share the experts of a layer; taken from tensor x context x data ranks"
    )
    data_parallel_size: int = pydantic.Field(1, ge=1, description="replicas, each with its own micro-batches")
    sequence_parallel: bool = pydantic.Field(False, description="shard norms and activations over the tensor ranks")

    @pydantic.model_validator(mode="after")
    def _check_consistent(self) -> ParallelConfig:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size > 1")
        ranks = self.tensor_model_parallel_size * self.context_parallel_size * self.data_parallel_size
        if ranks % self.expert_model_parallel_size:
            raise ValueError(
                f"expert_model_parallel_size {self.expert_model_parallel_size} must divide "
                f"tensor_model_parallel_size x context_parallel_size x data_parallel_size = {ranks}"
            )
        return self

    def with_world_size(self, world_size: int) -> ParallelConfig:
        """Return the layout with as many data-parallel replicas as fit ``world_size`` ranks.

        Raises ``ValueError`` unless ``world_size`` is a multiple of a replica's ranks.
        """
        replica = self.world_size // self.data_parallel_size
        if world_size % replica:
            raise ValueError(f"{world_size} ranks are not a multiple of the {replica} ranks of a replica")
        return ParallelConfig(**self.model_dump() | {"data_parallel_size": world_size // replica})

    @property
    def world_size(self) -> int:
        """Number of ranks that this layout occupies."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )
