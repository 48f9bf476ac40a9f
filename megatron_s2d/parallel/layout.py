"""Parallel layouts: the sizes, ranks and process groups of one model's tensor, pipeline, context and data parallelism.

Megatron-Core stores its groups in module globals and lets most calls fall back to them. A run may have models of
several layouts on the same ranks (a teacher at TP 4, a student at TP 2), so a ``Layout`` remembers the globals that
belong to it and installs them within ``with layout.active():``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import random
from collections.abc import Iterator
from pathlib import Path

import megatron_s2d.parallel.plain_functions  # noqa: F401

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_s2d.config.parallel import DEFAULT_TIMEOUT_MINUTES, ParallelConfig
from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.parallel.launcher_env import is_launched, local_rank

# A rank may wait in a collective for others that wait for servers: longer than the watchdog's limit.
_timeout_minutes = DEFAULT_TIMEOUT_MINUTES


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Sizes, this rank's coordinates and the process groups of one layout; a frozen value."""

    config: ParallelConfig
    groups: ProcessGroupCollection
    # [dp_rank][cp_rank * tp_size + tp_rank] -> global rank on the last pipeline stage
    output_ranks: tuple[tuple[int, ...], ...]
    host_dp: HostGroup  # on the host: one rank of every data-parallel replica
    host_replica: HostGroup  # on the host: all ranks of this data-parallel rank's replica
    host_ep: HostGroup  # on the host: the ranks that share the experts of a layer, in the order of ``groups.ep``
    _globals: dict[str, object] = dataclasses.field(repr=False)
    _created: tuple[dist.ProcessGroup, ...] = dataclasses.field(repr=False)  # every process group of this rank

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def tp_size(self) -> int:
        return self.config.tensor_model_parallel_size

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def pp_size(self) -> int:
        return self.config.pipeline_model_parallel_size

    @property
    def vp_size(self) -> int:
        """Number of model chunks on each rank (virtual pipeline stages)."""
        return self.config.virtual_pipeline_model_parallel_size

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def cp_size(self) -> int:
        return self.config.context_parallel_size

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.config.data_parallel_size

    @property
    def is_pipeline_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.pp_rank == 0

    @property
    def is_pipeline_last_stage(self) -> bool:
        """Whether this rank has the output layer and therefore computes outputs and losses."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_output_rank(self) -> bool:
        """Whether this rank reports the outputs of its tokens: last pipeline stage, first tensor-parallel rank."""
        return self.is_pipeline_last_stage and self.tp_rank == 0

    @property
    def is_dp_leader(self) -> bool:
        """Whether this rank reports for its data-parallel rank: an output rank, the first of its CP group."""
        return self.is_output_rank and self.cp_rank == 0

    @property
    def is_replica_root(self) -> bool:
        """Whether this rank is the first of its data-parallel rank's replica."""
        return self.host_replica.rank == 0

    @property
    def leader_in_replica(self) -> int:
        """Rank, in ``host_replica``, of the replica's data-parallel leader."""
        return (self.pp_size - 1) * self.cp_size * self.tp_size

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Install this layout's groups as Megatron's global groups within the block."""
        before = _snapshot_parallel_state()
        _install_parallel_state(self._globals)
        try:
            yield
        finally:
            _install_parallel_state(before)

    def destroy(self) -> None:
        """Destroy the process groups of this layout, with their threads and connections; every rank calls it.

        A gloo group keeps threads and sockets for as long as the process lives, and a layout has about 40 groups.
        """
        for group in self._created:
            dist.destroy_process_group(group)


def initialize_distributed(
    *,
    rank: int | None = None,
    world_size: int = 1,
    rendezvous: Path | None = None,
    timeout_minutes: float = DEFAULT_TIMEOUT_MINUTES,
) -> None:
    """Initialise the default process group; no-op if it exists. One collective of any group may last timeout_minutes.

    With ``rank``: one of ``world_size`` processes on this machine, with the file ``rendezvous`` as their store.
    Without: from the launcher's variables (torchrun, srun), or as a single process.
    """
    device.prepare()
    if dist.is_initialized():
        return
    global _timeout_minutes
    _timeout_minutes = timeout_minutes
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if device.capabilities().cuda:
        torch.cuda.set_device(local_rank() if rank is None else rank)
    if rank is None and is_launched():
        dist.init_process_group(device.backend(), timeout=timeout)
    else:
        store = dist.HashStore() if world_size == 1 else dist.FileStore(str(rendezvous), world_size)
        dist.init_process_group(device.backend(), store=store, rank=rank or 0, world_size=world_size, timeout=timeout)


def shutdown_distributed() -> None:
    """Destroy the process group; the barrier keeps a fast rank from closing a connection that a slow one still uses."""
    if dist.is_initialized():
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_layout(config: ParallelConfig) -> Layout:
    """Create the groups of ``config`` over all ranks of the job; collective. ``UserError`` if the sizes do not fit."""
    world_size = dist.get_world_size()
    if config.world_size != world_size:
        raise UserError(
            f"layout tensor {config.tensor_model_parallel_size} x pipeline {config.pipeline_model_parallel_size} x "
            f"context {config.context_parallel_size} x data {config.data_parallel_size} needs {config.world_size} "
            f"ranks, but the job has {world_size}: change the parallel sizes or the number of processes"
        )
    virtual = config.virtual_pipeline_model_parallel_size
    before = _snapshot_parallel_state()
    groups_before = set(_process_groups())
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        # An expert is narrow (768 in Qwen3-30B-A3B): it is not split, and tensor ranks divide the experts instead.
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=_timeout_minutes,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    _check_rank_order(config, groups)
    host_dp = HostGroup(parallel_state.get_data_parallel_group_gloo() if config.data_parallel_size > 1 else None)
    host_replica = _host_replica(config, groups.dp.rank())
    host_ep = _host_ep(config, groups)
    created = tuple(group for group in _process_groups() if group not in groups_before)
    layout = Layout(
        config, groups, _output_ranks(config), host_dp, host_replica, host_ep, _snapshot_parallel_state(), created
    )
    with layout.active():
        # Megatron's random-state tracker must exist before a model is built; nothing here samples from it, because
        # weights are initialised by name (models/weights.py) and no family uses dropout.
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    if before.get("_TENSOR_MODEL_PARALLEL_GROUP") is not None:
        _install_parallel_state(before)
    return layout


def global_rank(config: ParallelConfig, *, tp: int, cp: int, dp: int, pp: int) -> int:
    """Return the rank at the coordinates, in Megatron's order: tensor, context, data, pipeline."""
    tp_size, cp_size = config.tensor_model_parallel_size, config.context_parallel_size
    return tp + tp_size * (cp + cp_size * (dp + config.data_parallel_size * pp))


def _check_rank_order(config: ParallelConfig, groups: ProcessGroupCollection) -> None:
    coordinates = {name: getattr(groups, name).rank() for name in ("tp", "cp", "dp", "pp")}
    if global_rank(config, **coordinates) != dist.get_rank():
        raise RuntimeError(f"Megatron-Core orders ranks otherwise: rank {dist.get_rank()} is at {coordinates}")


def _output_ranks(config: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    last = config.pipeline_model_parallel_size - 1
    return tuple(
        tuple(
            global_rank(config, tp=tp, cp=cp, dp=dp, pp=last)
            for cp in range(config.context_parallel_size)
            for tp in range(config.tensor_model_parallel_size)
        )
        for dp in range(config.data_parallel_size)
    )


def _replica_ranks(config: ParallelConfig, dp_rank: int) -> list[int]:
    return [
        global_rank(config, tp=tp, cp=cp, dp=dp_rank, pp=pp)
        for pp in range(config.pipeline_model_parallel_size)
        for cp in range(config.context_parallel_size)
        for tp in range(config.tensor_model_parallel_size)
    ]


def _host_replica(config: ParallelConfig, dp_rank: int) -> HostGroup:
    """Create the group of every replica and return this rank's; collective, as Megatron's own groups are.

    With ``use_local_synchronization`` a rank would create its own group only, but PyTorch then names a group after its
    ranks and the number of groups that a rank is in: ranks of a pipeline differ in it, and a second layout of the same
    ranks would find the addresses of the first. Both wait forever.
    """
    if len(_replica_ranks(config, dp_rank)) == 1:
        return HostGroup()
    timeout = datetime.timedelta(minutes=_timeout_minutes)
    ranks = [_replica_ranks(config, dp) for dp in range(config.data_parallel_size)]
    groups = [dist.new_group(of_replica, timeout=timeout, backend="gloo") for of_replica in ranks]
    return HostGroup(groups[dp_rank])


def _host_ep(config: ParallelConfig, groups: ProcessGroupCollection) -> HostGroup:
    """Create the groups of ranks that share experts and return this rank's; collective, as ``_host_replica``."""
    size = config.expert_model_parallel_size
    if size == 1:
        return HostGroup()
    timeout = datetime.timedelta(minutes=_timeout_minutes)
    ranks = [list(range(start, start + size)) for start in range(0, config.world_size, size)]
    index = dist.get_rank() // size
    if dist.get_process_group_ranks(groups.ep) != ranks[index]:
        raise RuntimeError(f"Megatron-Core shares experts among other ranks than {ranks[index]}")
    return HostGroup([dist.new_group(sharing, timeout=timeout, backend="gloo") for sharing in ranks][index])


def seed_everything(seed: int) -> None:
    """Seed the global generators that libraries use; the project's own sampling never uses them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _process_groups() -> list[dist.ProcessGroup]:
    """Process groups that this rank belongs to, in order of creation; torch offers no public list of them."""
    return list(dist.distributed_c10d._world.pg_map)


def _snapshot_parallel_state() -> dict[str, object]:
    return {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and name[1:2].isupper()
    }


def _install_parallel_state(state: dict[str, object]) -> None:
    vars(parallel_state).update(state)
