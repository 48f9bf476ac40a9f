"""What senders saw of their servers, shared with all ranks as numbers, and as texts only where there is a problem.

Every server has one sender (``senders.py``); rank 0 asks none of the others' servers.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

from megatron_s2d.parallel.collectives import all_gather_json, any_rank, sum_over_ranks
from megatron_s2d.rollout.served.server_pool import Server

ServerCheck = tuple[str, float, str, str]  # address, largest difference, problem and digest of the weights


def shared_checks(servers: Sequence[Server], own: Sequence[ServerCheck]) -> list[ServerCheck]:
    """Return the checks of all ``servers``, in their order, on all ranks: ``own`` are those of this rank's servers.

    Numbers of each server are summed over ranks, because every server has one sender: 24 bytes a server at any number
    of ranks, and a text only of servers with a problem. Digests become numbers, equal where those are. Collective.
    """
    numbers = {server.url: number for number, server in enumerate(servers)}
    values, digests = np.zeros((len(servers), 2)), np.zeros(len(servers), dtype=np.int64)
    for url, difference, problem, digest in own:
        values[numbers[url]] = difference, bool(problem)
        if digest:
            # Without the highest bit, so that it is positive, and with the lowest, so that it is not 0 (no digest).
            digests[numbers[url]] = int(hashlib.sha256(digest.encode()).hexdigest()[:16], 16) >> 1 | 1
    values, digests = sum_over_ranks(values), sum_over_ranks(digests)
    problems = _texts_of_senders({url: problem for url, _, problem, _ in own}) if values[:, 1].any() else {}
    return [
        (server.url, float(difference), problems.get(server.url, ""), f"{digest:x}" if digest else "")
        for server, (difference, _), digest in zip(servers, values, digests, strict=True)
    ]


def shared_problems(urls: Sequence[str], own: dict[str, str]) -> dict[str, str]:
    """Return the problems of the servers at ``urls`` on all ranks; ``own`` are those that this rank saw. Collective."""
    failed = any_rank(any(own.get(url) for url in urls))
    return _texts_of_senders(own) if failed else {}


def _texts_of_senders(own: dict[str, str]) -> dict[str, str]:
    """Return address -> text of all ranks; empty texts are left out. Collective."""
    texts: dict[str, str] = {}
    for of_sender in all_gather_json({url: text for url, text in own.items() if text}):
        texts |= of_sender
    return texts


def mismatching_digests(digests: Sequence[tuple[str, str]]) -> tuple[dict[str, str], int]:
    """Return address -> problem of servers whose weights differ from the majority's, and the number of digests.

    digests: address and digest of each server; empty for one that can compute none.
    """
    known = [(url, digest) for url, digest in digests if digest]
    if len(digests) < 2 or not known:
        return {}, 0
    (common, count), *_ = collections.Counter(digest for _, digest in known).most_common(1)
    is_majority = 2 * count > len(known)  # without one it is unknown which are right
    problem = "the digest of its weights is not that of the other servers"
    return {url: problem for url, digest in known if not is_majority or digest != common}, len(known)
