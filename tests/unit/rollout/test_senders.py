"""Which ranks push weights, to which servers, and which files they write."""

import itertools

import pytest

pytest.importorskip("torch")

from megatron_s2d.rollout.served.senders import Senders


@pytest.mark.parametrize(("count", "servers"), [(1, 3), (2, 3), (3, 3), (4, 2), (128, 512)])
def test_every_server_and_file_has_one_sender(count, servers):
    senders = [Senders(count, index) for index in range(count)]
    owned = [sender.own(range(servers)) for sender in senders]
    assert list(itertools.chain.from_iterable(owned)) == list(
        range(servers)
    )  # consecutive: servers are listed machine by machine
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
    for number in range(10):
        assert [sender.writes(number) for sender in senders].count(True) == 1


def test_other_ranks_send_nothing():
    assert Senders(4, None).own([1, 2]) == [] and not Senders(4, None).writes(0)
