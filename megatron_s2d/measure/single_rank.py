"""Makes this process one rank of a job whose other ranks do not exist.

Process groups are PyTorch's own (``ProcessGroupNCCL`` with its checks) over the stub's NCCL, where every other rank
sends what this one sends. Where that is not what it would send, this module knows better: the pieces of an output
layer, the shapes of pipeline neighbours, and the samples of other data-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"

from megatron_s2d.data import sample_exchange
from megatron_s2d.data.packing import MicroBatch
from megatron_s2d.data.sample_exchange import Extra
from megatron_s2d.kl import logits, shards
from megatron_s2d.measure.host_values import on_host
from megatron_s2d.measure.te_values import spread_tokens_over_experts
from megatron_s2d.models.families import padded_vocab_size
from megatron_s2d.parallel import device
from megatron_s2d.parallel.collectives import broadcast_from_rank0
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, RemoteSample, Sample
from megatron_s2d.rollout import response_table
from megatron_s2d.stages import sg_opd
from megatron_s2d.teachers import hidden_state_transfer
from megatron_s2d.teachers.hidden_state_transfer import OutputLayers
from megatron_s2d.train import megatron_model, shown_responses
from megatron_s2d.train.megatron_model import MegatronModel

_store: _AnsweringStore | None = None  # PyTorch keeps the C++ half only


class _AnsweringStore(dist.Store):
    """A store in which every other rank has already written what this one asks for."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value if isinstance(value, bytes) else str(value).encode()

    def get(self, key: str) -> bytes:
        return self._values.get(key, b"\x01" * 128)  # the length of NCCL's id

    def add(self, key: str, amount: int) -> int:
        self.set(key, int(self._values.get(key, b"0")) + amount)
        return int(self._values[key])

    def wait(self, *_: Any) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        return True

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def compare_set(self, key: str, expected: Any, value: Any) -> Any:
        self.set(key, value)
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def append(self, key: str, value: bytes) -> None:
        self._values[key] = self._values.get(key, b"") + value

    def has_extended_api(self) -> bool:
        return False

    def set_timeout(self, timeout: Any) -> None:
        pass


def become_rank(rank: int, world_size: int) -> None:
    """Initialise the default process group as ``rank`` of ``world_size``, and answer for the other ranks."""
    device.prepare()
    if device.capabilities().transformer_engine:
        spread_tokens_over_experts()
    distributed_c10d._store_based_barrier = lambda *args, **kwargs: None
    _use_fake_groups_on_the_host()
    _replace_everywhere(broadcast_from_rank0, lambda action: action())  # rank 0 would do the same
    P2PCommunicator._communicate_shapes = _shapes_of_neighbours(P2PCommunicator._communicate_shapes)
    OutputLayers.of = _with_pieces_of_all_ranks(OutputLayers.of)
    logits._chunk_topk = _distinct_tokens(logits._chunk_topk)
    response_table.gather_rows = _rows_of_all_ranks
    for module in (megatron_model, hidden_state_transfer, sg_opd):
        module.move_samples = _moved_samples
    megatron_model.return_arrays = shown_responses.return_arrays = _returned_arrays
    sample_exchange.check_held_once = lambda samples, layout: None  # the other ranks have theirs
    HostGroup.broadcast = lambda self, values, root: values  # of a replica, whose ranks have the same
    # Lines of responses that are shown to people; the samples themselves are replaced above.
    HostGroup.receive = lambda self, sender: np.frombuffer(zlib.compress(b"{}"), dtype=np.uint8)
    torch.cuda.set_device(rank % torch.cuda.device_count())
    global _store
    _store = _AnsweringStore()
    dist.init_process_group("nccl", store=_store, rank=rank, world_size=world_size)


def _replace_everywhere(original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Replace a function in every module of the project that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron_s2d.") and vars(module).get(original.__name__) is original:
            setattr(module, original.__name__, replacement)


def _use_fake_groups_on_the_host() -> None:
    """Gloo would connect to the other ranks."""
    new_group = dist.new_group

    def create(ranks=None, timeout=None, backend=None, pg_options=None, **options):
        if backend == "gloo":
            backend, pg_options = "fake", None
        return new_group(ranks, timeout, backend, pg_options, **options)

    dist.new_group = distributed_c10d.new_group = create


# -------------------------------------------------------------------------------- pieces of an output layer


def _with_pieces_of_all_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    def of(self: OutputLayers, teacher: MegatronModel, student: MegatronModel, *, offload: bool) -> Any:
        layout, spec = teacher.layout, teacher.spec
        rows = padded_vocab_size(spec.vocab_size, layout.tp_size) // layout.tp_size
        pieces = [[-1] * 4 for _ in range(dist.get_world_size())]
        for ranks in layout.output_ranks:
            for index, rank in enumerate(ranks):
                start = min(index % layout.tp_size * rows, spec.vocab_size)
                stop = min(start + rows, spec.vocab_size)
                pieces[rank] = [start, stop, spec.hidden_size, shards.DTYPES.index(teacher.params_dtype)]
        gather = shards.gather_numbers

        def answer(*arguments: Any) -> list[list[int]]:
            gather(*arguments)  # for its traffic
            return pieces

        shards.gather_numbers = answer
        try:
            return original(self, teacher, student, offload=offload)
        finally:
            shards.gather_numbers = gather

    return of


def _distinct_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the likeliest tokens be distinct: every tensor rank would send columns of its own, and not this one's."""

    def chunk_topk(z: torch.Tensor, k: int, shard: shards.VocabShard) -> Any:
        ids, *others = original(z, k, shard)
        first = torch.arange(len(ids))[:, None] * k
        on_host(ids).copy_((first + torch.arange(k)) % shard.vocab_size)
        return ids, *others

    return chunk_topk


# -------------------------------------------------------------------------------- pipeline neighbours

_expected_shapes: list[list[int]] = []  # of the hidden states of each micro-batch, in order
_num_received = {"previous": 0, "next": 0}


def expect_micro_batches(batches: Sequence[MicroBatch], layout: Layout, hidden_size: int) -> None:
    """Say which micro-batches the next pass of the pipeline runs: neighbours send their hidden states and gradients."""
    shards = layout.tp_size if layout.config.sequence_parallel else 1
    _expected_shapes[:] = [[batch.shape[0] // shards, batch.shape[1], hidden_size] for batch in batches]
    _num_received.update(previous=0, next=0)


def _shapes_of_neighbours(original: Callable[..., Any]) -> Callable[..., Any]:
    def shapes(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
        result = list(original(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next))
        for index, (side, receives) in enumerate((("previous", recv_prev), ("next", recv_next))):
            if receives:
                # With virtual stages a micro-batch is received once for each chunk, in groups.
                result[index] = _expected_shapes[_num_received[side] % len(_expected_shapes)]
                _num_received[side] += 1
        return tuple(result)

    return shapes


# -------------------------------------------------------------------------------- other data-parallel ranks


def _rows_of_all_ranks(layout: Layout, rows: np.ndarray) -> list[np.ndarray]:
    """Return this rank's rows as those of every data-parallel rank, of other groups; all got no reward."""
    layout.host_dp.all_gather(rows)  # for its traffic
    rows = rows.copy()
    rows["reward"] = 0.0
    everyone = [rows.copy() for _ in range(layout.dp_size)]
    for rank, copies in enumerate(everyone):
        copies["repeat"] += 0 if rank == layout.dp_rank else 1 + rank
    return everyone


def _moved_samples(
    samples: Sequence[AnySample],
    source: Layout,
    target: Layout,
    ranks: Sequence[int],
    extra: Sequence[Extra] | None = None,
) -> tuple[list[AnySample], list[Extra]]:
    """Return ``samples`` at ``target``; those that would arrive have the tokens of one of this rank."""
    like = next(sample for sample in samples if isinstance(sample, Sample))
    moved: list[AnySample] = []
    for sample, rank in zip(samples, ranks, strict=True):
        if rank == target.dp_rank:
            moved.append(dataclasses.replace(like, id=sample.id, group_id=sample.group_id, domain=sample.domain))
        elif isinstance(sample, Sample):
            moved.append(RemoteSample.of(sample, rank))
        else:
            moved.append(dataclasses.replace(sample, dp_rank=rank))
    return moved, [{}] * len(samples)


def _returned_arrays(
    arrays: Mapping[int, np.ndarray],
    samples: Sequence[AnySample],
    source: Layout,
    target: Layout,
    ranks: Sequence[int],
) -> list[np.ndarray | None]:
    """Return the arrays that this rank computed, and zeros for those that would arrive."""
    return [
        arrays.get(index, np.zeros(sample.length, np.float32)) if isinstance(sample, Sample) else None
        for index, sample in enumerate(samples)
    ]
