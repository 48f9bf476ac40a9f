"""Collectives on Python values: broadcast from one rank, gather from all ranks, agree on flags, sums and errors.

Values travel as JSON, and nothing is pickled: these serve control flow and small results; samples and arrays go through
``data/sample_bytes.py`` and ``host_group.py``. Every function is collective: all ranks of the group (by default of the
job) must call it in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.errors import UserError
from megatron_s2d.parallel import device


def broadcast_from_rank0[Result](action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0 and return its result on all ranks; a ``UserError`` is raised on all of them, too.

    The result is a JSON value (a tuple would arrive as a list).
    """
    message: list[Any] = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            message[0] = action()
        except UserError as error:
            message[1] = str(error)
    if dist.get_world_size() > 1:
        message = _broadcast_json(message)
    result, refusal = message
    if refusal is not None:
        raise UserError(refusal)
    return result


def broadcast_flag(flag: bool) -> bool:
    """Return rank 0's ``flag`` on all ranks."""
    value = torch.tensor([int(flag)], device=device.device())
    dist.broadcast(value, src=0)
    return bool(value.item())


def all_gather_json[Value](value: Value) -> list[Value]:
    """Return every rank's JSON value, in the order of ranks, on all ranks.

    Each rank receives the longest one from every rank: for messages that are rare, such as failures.
    """
    if dist.get_world_size() == 1:
        return [value]
    padded = _to_equal_bytes(value)
    gathered = padded.new_empty(dist.get_world_size() * len(padded))
    dist.all_gather_into_tensor(gathered, padded)
    return [_from_bytes(row) for row in gathered.view(-1, len(padded))]


def gather_json_on_rank0[Value](value: Value) -> list[Value]:
    """Return every rank's JSON value, in the order of ranks, on rank 0, and an empty list on the others."""
    if dist.get_world_size() == 1:
        return [value]
    padded, is_rank0 = _to_equal_bytes(value), dist.get_rank() == 0
    rows = [torch.empty_like(padded) for _ in range(dist.get_world_size())] if is_rank0 else None
    dist.gather(padded, rows, dst=0)
    return [_from_bytes(row) for row in rows or ()]


def first_error(error: str | None) -> str | None:
    """Return the error of the lowest rank that has one, on all ranks; None if no rank has.

    Without an error one number is communicated.
    """
    if not any_rank(error is not None):
        return None
    return next((message for message in all_gather_json(error) if message is not None), None)


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


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    """Return the sums of ``values`` (float64 or int64, any shape) over all ranks of the job."""
    if dist.get_world_size() == 1:
        return values
    total = torch.from_numpy(values).to(device.device(), copy=True)
    dist.all_reduce(total)
    return total.cpu().numpy()


def is_same_on_all_ranks(value: int, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether all ranks of ``group`` have the same ``value``."""
    if dist.get_world_size(group) == 1:
        return True
    extremes = torch.tensor([value, -value], device=device.device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return extremes.tolist() == [value, -value]


def _broadcast_json(value: Any) -> Any:
    """Return rank 0's JSON value on all ranks."""
    data = _to_bytes(value)
    size = torch.tensor(len(data), device=device.device())
    dist.broadcast(size, src=0)
    buffer = (
        data.to(device.device())
        if dist.get_rank() == 0
        else torch.empty(int(size), dtype=torch.uint8, device=device.device())
    )
    dist.broadcast(buffer, src=0)
    return _from_bytes(buffer)


def _to_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _to_equal_bytes(value: Any) -> torch.Tensor:
    """Return a JSON value as bytes on the device, filled up to the longest value of all ranks."""
    data = _to_bytes(value)
    padded = torch.zeros(max_over_ranks(len(data)), dtype=torch.uint8, device=device.device())
    padded[: len(data)] = data
    return padded


def _from_bytes(data: torch.Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes().rstrip(b"\0"))
