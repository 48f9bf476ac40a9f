"""Moves samples, and the scores computed from them, between data-parallel ranks, of one layout or of two.

A data-parallel rank holds its own samples: all ranks of its replica have them, and other ranks have a ``RemoteSample``
for each. Every rank derives from that list who sends what to whom, so only samples travel: from the leader of the data
rank that holds them to the leader of the one that needs them, point to point, and from there once to the other ranks
of its replica. All functions are collective over the ranks of the job.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_s2d.data.balance import SCORING_SHARE, SCORING_TOLERANCE, SHARE, TOLERANCE, balanced_ranks
from megatron_s2d.data.sample_bytes import decode_arrays, decode_samples, encode_arrays, encode_samples
from megatron_s2d.parallel import device, p2p
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import AnySample, RemoteSample, Sample, own_samples

Extra = Mapping[str, np.ndarray]


def dp_ranks(samples: Sequence[AnySample], layout: Layout) -> list[int]:
    """Return which data-parallel rank of ``layout`` holds each sample."""
    return [layout.dp_rank if isinstance(sample, Sample) else sample.dp_rank for sample in samples]


def keep_own(samples: Sequence[Sample], layout: Layout) -> list[AnySample]:
    """Distribute samples that every rank has read over data-parallel ranks, in turn and balanced; nothing is sent."""
    turns = [index % layout.dp_size for index in range(len(samples))]
    ranks = balanced_ranks([sample.length for sample in samples], turns, layout.dp_size)
    return [
        sample if rank == layout.dp_rank else RemoteSample.of(sample, rank)
        for sample, rank in zip(samples, ranks, strict=True)
    ]


def broadcast_samples(samples: Sequence[Sample], layout: Layout) -> list[Sample]:
    """Return the samples of the replica's first rank on all its ranks."""
    group = layout.host_replica
    if group.size == 1:
        return list(samples)
    data = group.broadcast(encode_samples(samples) if group.rank == 0 else None, 0)
    return list(samples) if group.rank == 0 else decode_samples(data)[0]


def balance_samples(
    samples: Sequence[AnySample], layout: Layout, *, by_domain: bool = False, extra: Sequence[Extra] | None = None
) -> tuple[list[AnySample], list[Extra]]:
    """Move samples from data-parallel ranks with too many tokens; by_domain: those of each domain are balanced.

    Returns the samples and their further arrays, like ``move_samples``.
    """
    return move_samples(samples, layout, layout, ranks_of_balance(samples, layout, by_domain=by_domain), extra)


def ranks_of_balance(
    samples: Sequence[AnySample],
    layout: Layout,
    *,
    by_domain: bool = False,
    ranks: Sequence[int] | None = None,
    tolerance: float = TOLERANCE,
    share: float = SHARE,
) -> list[int]:
    """Return the data-parallel rank of every sample once they are balanced.

    ranks: of now, by default the holders. tolerance, share: as in ``balanced_ranks``.
    """
    ranks = dp_ranks(samples, layout) if ranks is None else list(ranks)
    if layout.dp_size == 1:
        return ranks
    result = list(ranks)
    for domain in sorted({sample.domain for sample in samples}) if by_domain else [None]:
        indices = [index for index, sample in enumerate(samples) if domain is None or sample.domain == domain]
        lengths = [samples[index].length for index in indices]
        balanced = balanced_ranks(lengths, [ranks[index] for index in indices], layout.dp_size, tolerance, share)
        for index, rank in zip(indices, balanced, strict=True):
            result[index] = rank
    return result


def ranks_in_layout(
    samples: Sequence[AnySample], source: Layout, target: Layout, *, by_domain: bool = False
) -> list[int]:
    """Return the data-parallel rank of ``target`` that computes on each sample of ``source``, balanced."""
    ranks = dp_ranks(samples, source)
    if source is not target:
        # Neighbours stay neighbours; several ranks of the target take turns at one of the source.
        seen = [0] * source.dp_size
        for index, rank in enumerate(ranks):
            share = max(1, target.dp_size // source.dp_size)
            ranks[index] = min(rank * target.dp_size // source.dp_size + seen[rank] % share, target.dp_size - 1)
            seen[rank] += 1
    # All samples travel to another layout, so no rank has any there.
    tolerance, share = (SCORING_TOLERANCE, SCORING_SHARE) if source is target else (TOLERANCE, math.inf)
    return ranks_of_balance(samples, target, by_domain=by_domain, ranks=ranks, tolerance=tolerance, share=share)


def move_samples(
    samples: Sequence[AnySample],
    source: Layout,
    target: Layout,
    ranks: Sequence[int],
    extra: Sequence[Extra] | None = None,
) -> tuple[list[AnySample], list[Extra]]:
    """Bring every sample, held by a data rank of ``source``, to data rank ``ranks[index]`` of ``target``.

    extra: further arrays of each sample that travel with it; those of remote samples are not read. Returns the samples
    as ``target`` holds them, and the arrays of this rank's own (empty ones for the others). Raises ``ValueError``, on
    all ranks, if several data ranks of ``source`` hold one sample: each would send it elsewhere.
    """
    check_held_once(samples, source)
    extra = [{}] * len(samples) if extra is None else extra
    holders = dp_ranks(samples, source)
    routes = _routes(holders, ranks, source, target)
    me = dist.get_rank() if routes else 0
    sent = {
        to: encode_samples(own_samples([samples[index] for index in indices]), [extra[index] for index in indices])
        for (sender, to), indices in routes.items()
        if sender == me
    }
    arrived = _to_replica(_exchange(sent, routes), routes, target)
    received: dict[int, tuple[Sample, Extra]] = {}
    for route, data in arrived.items():
        received |= dict(zip(routes[route], zip(*decode_samples(data), strict=True), strict=True))
    result: list[AnySample] = []
    further: list[Extra] = []
    for index, (sample, rank) in enumerate(zip(samples, ranks, strict=True)):
        if index in received:
            sample, arrays = received[index]
        elif rank == target.dp_rank:
            arrays = extra[index]
        else:
            arrays = {}
            known = isinstance(sample, RemoteSample)
            sample = dataclasses.replace(sample, dp_rank=rank) if known else RemoteSample.of(sample, rank)
        result.append(sample)
        further.append(arrays)
    return result, further


def check_held_once(samples: Sequence[AnySample], layout: Layout) -> None:
    """Raise ``ValueError``, on all ranks, unless each sample is on one data-parallel rank of ``layout``. Collective."""
    num_held = int(layout.host_dp.sum(np.array([len(own_samples(samples))]))[0])
    if num_held != len(samples):
        raise ValueError(
            f"data-parallel ranks hold {num_held} samples of {len(samples)}: each must be on one of them (keep_own)"
        )


def return_arrays(
    arrays: Mapping[int, np.ndarray],
    samples: Sequence[AnySample],
    source: Layout,
    target: Layout,
    ranks: Sequence[int],
) -> list[np.ndarray | None]:
    """Bring one array of each sample from the data rank of ``target`` that computed it to the one that holds it.

    arrays: by index in ``samples``, on the leaders of ``target``. source, ranks: as in ``move_samples``. Returns the
    arrays of this rank's own samples on all ranks of its replica; None for the others.
    """
    holders = dp_ranks(samples, source)
    there = _routes(holders, ranks, source, target)
    routes = dict(sorted(((to, sender), indices) for (sender, to), indices in there.items()))
    me = dist.get_rank() if routes else 0
    sent = {
        to: encode_arrays([arrays[index] for index in indices])
        for (sender, to), indices in routes.items()
        if sender == me
    }
    own = dict(arrays)
    for route, data in _exchange(sent, routes).items():
        own |= dict(zip(routes[route], decode_arrays(data), strict=True))
    held = [index for index, holder in enumerate(holders) if holder == source.dp_rank]
    group = source.host_replica
    if group.size > 1:
        leads = group.rank == source.leader_in_replica
        data = group.broadcast(
            encode_arrays([own[index] for index in held]) if leads else None, source.leader_in_replica
        )
        own = dict(zip(held, decode_arrays(data), strict=True))
    return [own[index] if holder == source.dp_rank else None for index, holder in enumerate(holders)]


Route = tuple[int, int]  # global ranks of sender and receiver


def _routes(holders: Sequence[int], ranks: Sequence[int], source: Layout, target: Layout) -> dict[Route, list[int]]:
    """Return the samples that travel by sender and receiver, in one order on all ranks."""
    routes: dict[Route, list[int]] = {}
    for index, (holder, rank) in enumerate(zip(holders, ranks, strict=True)):
        if source is not target or holder != rank:
            route = source.output_ranks[holder][0], target.output_ranks[rank][0]
            routes.setdefault(route, []).append(index)
    return dict(sorted(routes.items()))


def _exchange(sent: Mapping[int, np.ndarray], routes: Mapping[Route, Sequence[int]]) -> dict[Route, np.ndarray]:
    """Return the bytes that arrive at this rank. sent: uint8 [n] by receiver; all ranks know ``routes``."""
    if not routes:
        return {}
    me = dist.get_rank()
    senders = [sender for sender, to in routes if to == me]
    partners = max(*map(len, _by_end(routes, 0).values()), *map(len, _by_end(routes, 1).values()))
    sizes = {sender: [torch.zeros(1, 1, dtype=torch.int64)] for sender in senders}
    p2p.p2p_exchange({to: torch.tensor([[len(data)]]) for to, data in sent.items()}, sizes, partners=partners)
    device.synchronize()
    buffers = {sender: [device.pinned_empty(int(size), 1, dtype=torch.uint8)] for sender, (size,) in sizes.items()}
    rows = {to: torch.from_numpy(data).unsqueeze(1) for to, data in sent.items()}
    p2p.p2p_exchange(rows, buffers, partners=partners)
    device.synchronize()
    return {(sender, me): buffer.squeeze(1).numpy() for sender, (buffer,) in buffers.items()}


def _by_end(routes: Mapping[Route, Sequence[int]], end: int) -> dict[int, list[int]]:
    partners: dict[int, list[int]] = {}
    for route in routes:
        partners.setdefault(route[end], []).append(route[1 - end])
    return partners


def _to_replica(
    arrived: Mapping[Route, np.ndarray], routes: Mapping[Route, Sequence[int]], target: Layout
) -> dict[Route, np.ndarray]:
    """Return what arrived at the leader of this rank's replica of ``target``, on all its ranks."""
    group = target.host_replica
    if not routes or group.size == 1:
        return dict(arrived)
    leader = target.output_ranks[target.dp_rank][0]
    wanted = [route for route in routes if route[1] == leader]
    return {route: group.broadcast(arrived.get(route), target.leader_in_replica) for route in wanted}
