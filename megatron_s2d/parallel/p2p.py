"""Rows that go from rank to rank: point to point, in their own dtype, a bucket at a time.

Both ends of a pair know how many rows pass between them and in which order, so nothing but rows is sent; ranks between
which nothing passes do not wait for each other. Rows wait in host memory on either side, and only a bucket of them is on
the device. Left out: who sends what to whom (``teachers/hidden_state_transfer.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_s2d.buffer_sizes import P2P_BUCKET_BYTES
from megatron_s2d.parallel import device


def p2p_exchange(
    sent: Mapping[int, torch.Tensor],
    received: Mapping[int, Sequence[torch.Tensor]],
    *,
    partners: int,
    bucket_bytes: int = P2P_BUCKET_BYTES,
) -> None:
    """Send ``sent`` and fill ``received``, both in host memory (``device.pinned_empty``).

    sent: rows [n, d] by the rank that they go to. received: by the rank that they come from, blocks [m, d] that its
    rows fill one after the other. A rank may be its own partner. partners: the most ranks that any one sends to or
    receives from; it and ``bucket_bytes`` are the same on all ranks. With NCCL the default group must have had a
    collective before, for ranks without a partner take no part.
    """
    own = dist.get_rank()
    if own in sent:
        device.synchronize()  # the only copy that the host makes itself
        _fill(received[own], 0, sent[own])
    sent = {rank: rows for rank, rows in sent.items() if rank != own}
    totals = {rank: sum(map(len, blocks)) for rank, blocks in received.items() if rank != own}
    tensors = [*sent.values(), *(block for rank in totals for block in received[rank])]
    if not tensors:
        return
    width, dtype = tensors[0].shape[1], tensors[0].dtype
    step = max(1, bucket_bytes // (width * dtype.itemsize * partners))  # rows of a pair in one round
    place = device.device()
    for start in range(0, max(*map(len, sent.values()), *totals.values(), 0, 0), step):
        operations, arrivals = [], []
        for rank, rows in sent.items():
            if start < len(rows):
                part = rows[start : start + step].to(place, non_blocking=True)
                operations.append(dist.P2POp(dist.isend, part, rank))
        for rank, total in totals.items():
            if start < total:
                part = torch.empty(min(step, total - start), width, dtype=dtype, device=place)
                operations.append(dist.P2POp(dist.irecv, part, rank))
                arrivals.append((received[rank], part))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        for blocks, part in arrivals:
            _fill(blocks, start, part)


def _fill(blocks: Sequence[torch.Tensor], start: int, rows: torch.Tensor) -> None:
    """Copy ``rows`` to place ``start`` and following of the blocks laid end to end."""
    for block in blocks:
        count = max(0, min(len(block) - start, len(rows)))
        if count:
            block[start : start + count].copy_(rows[:count], non_blocking=True)
            rows, start = rows[count:], start + count
        start -= len(block)
