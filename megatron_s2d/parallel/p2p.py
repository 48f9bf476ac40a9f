"""Point-to-point exchange of tensor rows between ranks, in their own dtype, one bucket at a time.

Both ranks of a pair know how many rows pass between them and in which order, so only rows are sent; ranks that exchange
nothing do not wait for each other. Rows stay in pinned host memory on both sides, and only a bucket of them is on the
device. Who sends what to whom is decided by the caller (``teachers/hidden_state_transfer.py``).

Shapes: h hidden size.
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

    sent: rows [n, h] by destination rank. received: by source rank, the blocks [m, h] that its rows fill one after the
    other. A rank may send to itself. partners: the largest number of ranks that any rank sends to or receives from;
    ``partners`` and ``bucket_bytes`` are the same on all ranks. Ranks without a partner do not take part, so with NCCL
    the default group must have run a collective before.
    """
    rank = dist.get_rank()
    if rank in sent:
        device.synchronize()  # this copy is the only one that the host makes itself
        _fill(received[rank], 0, sent[rank])
    remote_sent = {peer: rows for peer, rows in sent.items() if peer != rank}
    num_received = {peer: sum(map(len, blocks)) for peer, blocks in received.items() if peer != rank}
    tensors = [*remote_sent.values(), *(block for peer in num_received for block in received[peer])]
    if not tensors:
        return
    width, dtype = tensors[0].shape[1], tensors[0].dtype
    rows_per_bucket = max(1, bucket_bytes // (width * dtype.itemsize * partners))  # of one pair
    for start in range(0, max(*map(len, remote_sent.values()), *num_received.values(), 0, 0), rows_per_bucket):
        operations, arrivals = [], []
        for peer, rows in remote_sent.items():
            if start < len(rows):
                bucket = rows[start : start + rows_per_bucket].to(device.device(), non_blocking=True)
                operations.append(dist.P2POp(dist.isend, bucket, peer))
        for peer, num_rows in num_received.items():
            if start < num_rows:
                size = min(rows_per_bucket, num_rows - start)
                bucket = torch.empty(size, width, dtype=dtype, device=device.device())
                operations.append(dist.P2POp(dist.irecv, bucket, peer))
                arrivals.append((received[peer], bucket))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        for blocks, bucket in arrivals:
            _fill(blocks, start, bucket)


def _fill(blocks: Sequence[torch.Tensor], start: int, rows: torch.Tensor) -> None:
    """Copy ``rows`` to index ``start`` and following of the concatenation of ``blocks``."""
    for block in blocks:
        count = max(0, min(len(block) - start, len(rows)))
        if count:
            block[start : start + count].copy_(rows[:count], non_blocking=True)
            rows, start = rows[count:], start + count
        start -= len(block)
