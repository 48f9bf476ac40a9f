"""Collectives on Python values: broadcast from one rank, gather from all ranks, agree on flags and errors.

Objects are pickled, so these serve control flow and small results; tensors go through ``torch.distributed`` itself.
Every function is collective: all ranks of the group (by default of the job) must call it in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device


def broadcast_from_rank0[Result](action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0 and return its result on all ranks; a ``UserError`` is raised on all of them, too."""
    message: list[Any] = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            message[0] = action()
        except UserError as error:
            message[1] = str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(message, src=0)
    result, refusal = message
    if refusal is not None:
        raise UserError(refusal)
    return result


def broadcast_in_group[Value](values: list[Value], group: dist.ProcessGroup) -> list[Value]:
    """Return ``values`` of the first rank of ``group`` on all its ranks."""
    if group.size() == 1:
        return values
    message = [values]
    dist.broadcast_object_list(message, group=group, group_src=0)
    return message[0]


def broadcast_flag(flag: bool) -> bool:
    """Return rank 0's ``flag`` on all ranks."""
    value = torch.tensor([int(flag)], device=device.device())
    dist.broadcast(value, src=0)
    return bool(value.item())


def all_gather_object[Value](value: Value) -> list[Value]:
    """Return every rank's ``value``, in the order of ranks, on all ranks."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_dicts[Key, Value](local: dict[Key, Value], *, first_only: bool = False) -> dict[Key, Value]:
    """Return the union of every rank's dictionary, whose keys must differ; ``first_only``: only on rank 0."""
    size = dist.get_world_size()
    if size == 1:
        return local
    parts: list[Any] = [{}] * size
    if first_only:
        dist.gather_object(local, parts if dist.get_rank() == 0 else None, dst=0)
    else:
        dist.all_gather_object(parts, local)
    return {key: value for part in parts for key, value in part.items()}


def first_error(error: str | None) -> str | None:
    """Return the error of the lowest rank that has one, on all ranks; None if no rank has."""
    return next((message for message in all_gather_object(error) if message is not None), None)


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether ``flag`` is set on any rank of ``group``."""
    return bool(max_over_ranks(int(flag), group))


def max_over_ranks(value: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the largest ``value`` of the ranks of ``group``."""
    if dist.get_world_size(group) == 1:
        return value
    largest = torch.tensor(value, device=device.device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)


def is_same_on_all_ranks(value: int, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether all ranks of ``group`` have the same ``value``."""
    if dist.get_world_size(group) == 1:
        return True
    extremes = torch.tensor([value, -value], device=device.device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return extremes.tolist() == [value, -value]
