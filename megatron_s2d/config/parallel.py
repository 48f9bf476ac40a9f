"""Parallel sizes of a model: tensor, pipeline, context, expert, data and sequence parallelism. No torch here."""

from __future__ import annotations

from typing import Literal

import pydantic

from megatron_s2d.config.base import Config

DEFAULT_TIMEOUT_MINUTES = 90.0  # of one collective


class ParallelConfig(Config):
    """Megatron-Core parallel sizes of one model; their product (without expert parallelism) is the number of ranks."""

    tensor_model_parallel_size: int = pydantic.Field(1, ge=1, description="ranks that share each layer")
    pipeline_model_parallel_size: int = pydantic.Field(1, ge=1, description="ranks that share the depth")
    virtual_pipeline_model_parallel_size: int = pydantic.Field(
        1,
        ge=1,
        description="parts of the depth on each pipeline rank, which Megatron's interleaved schedule runs in turn: the "
        "pipeline idles less and sends more",
    )
    context_parallel_size: int = pydantic.Field(
        1, ge=1, description="ranks that share a sequence (needs micro_batch.sequence_packing)"
    )
    expert_model_parallel_size: int = pydantic.Field(
        1, ge=1, description="ranks that share the experts of a layer; taken from tensor x context x data ranks"
    )
    data_parallel_size: int = pydantic.Field(1, ge=1, description="replicas, each with its own micro-batches")
    sequence_parallel: bool = pydantic.Field(False, description="shard norms and activations over the tensor ranks")
    overlap_grad_reduce: bool | None = pydantic.Field(
        None,
        description="reduce gradients over the data ranks in buckets while the backward pass runs; null: on GPUs with "
        "more than one data x context rank",
    )
    overlap_param_gather: bool | None = pydantic.Field(
        None,
        description="gather updated weights from the data ranks while the code after the update runs; needs "
        "overlap_grad_reduce; null: as overlap_grad_reduce",
    )
    tp_comm_overlap: bool = pydantic.Field(
        False,
        description="of the trained model: tensor ranks exchange activations while products run (Transformer Engine's "
        "userbuffers); micro-batches are then padded to exactly micro_batch.max_tokens_per_gpu",
    )
    moe_token_dispatcher: Literal["alltoall", "flex"] = pydantic.Field(
        "alltoall",
        description="how tokens reach their experts: alltoall (NCCL), flex (DeepEP's kernels, which have to be "
        "installed)",
    )

    @pydantic.model_validator(mode="after")
    def _check_consistent(self) -> ParallelConfig:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size > 1")
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError("virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1")
        if self.tp_comm_overlap and not self.sequence_parallel:
            raise ValueError(
                "tp_comm_overlap overlaps the communication of sequence parallelism: set sequence_parallel to true "
                "with tensor_model_parallel_size > 1, or leave tp_comm_overlap out"
            )
        if self.moe_token_dispatcher == "flex" and self.expert_model_parallel_size == 1:
            raise ValueError(
                "moe_token_dispatcher flex sends tokens between ranks: set expert_model_parallel_size > 1, or "
                "moe_token_dispatcher to alltoall"
            )
        ranks = self.tensor_model_parallel_size * self.context_parallel_size * self.data_parallel_size
        if ranks % self.expert_model_parallel_size:
            raise ValueError(
                f"expert_model_parallel_size {self.expert_model_parallel_size} must divide "
                f"tensor_model_parallel_size x context_parallel_size x data_parallel_size = {ranks}"
            )
        if self.overlap_param_gather and self.overlap_grad_reduce is False:
            raise ValueError(
                "overlap_param_gather gathers the buckets that overlap_grad_reduce makes: set overlap_grad_reduce to "
                "true, or leave overlap_param_gather out"
            )
        return self

    def overlaps(self, *, on_gpu: bool) -> tuple[bool, bool]:
        """Return (overlap_grad_reduce, overlap_param_gather) with their defaults filled in."""
        reduces = self.overlap_grad_reduce
        if reduces is None:
            shared = self.data_parallel_size * self.context_parallel_size > 1
            reduces = bool(self.overlap_param_gather) or (on_gpu and shared)
        gathers = self.overlap_param_gather
        return reduces, reduces if gathers is None else gathers

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
