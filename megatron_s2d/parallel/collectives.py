"""What one rank does or knows, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_s2d.errors import UserError


def broadcast_from_rank0[Result](action: Callable[[], Result]) -> Result:
    """The result of ``action``, which rank 0 carries out, on all ranks; so is its ``UserError``. Collective."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except UserError as error:
            box[1] = str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def all_gather_object[Value](value: Value) -> list[Value]:
    """Every rank's ``value``, on all ranks; collective."""
    if dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast_in_group[Value](values: list[Value], group: dist.ProcessGroup) -> list[Value]:
    """``values`` of the first rank of ``group``, on all its ranks."""
    if group.size() == 1:
        return values
    box = [values]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def gather_dicts(found: dict[Any, Any], *, first_only: bool = False) -> dict[Any, Any]:
    """The union of every rank's dictionary, on all ranks, or on rank 0 (and empty elsewhere). Keys must differ."""
    size = dist.get_world_size()
    if size == 1:
        return found
    parts: list[dict[Any, Any]] = [{}] * size
    if first_only:
        dist.gather_object(found, parts if dist.get_rank() == 0 else None, dst=0)
    else:
        dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}
