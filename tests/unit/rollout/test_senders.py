"""Which ranks push weights, to which servers, and which files they write."""

import itertools
import types

import pytest

pytest.importorskip("torch")

from megatron_s2d.rollout.served import server_group, shared_checks
from megatron_s2d.rollout.served.senders import Senders
from megatron_s2d.rollout.served.server_pool import Server


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


def shared(monkeypatch, servers, by_rank) -> tuple[list, int]:
    """Return what every rank gets of ``by_rank``, the checks by each of them, and how often they gathered texts."""
    sent, gathered = [[] for _ in by_rank], []
    texts = [{url: problem for url, _, problem, _ in own if problem} for own in by_rank]
    monkeypatch.setattr(shared_checks, "all_gather_json", lambda own: gathered.append(own) or texts)
    for own, arrays in zip(by_rank, sent, strict=True):
        monkeypatch.setattr(
            shared_checks, "sum_over_ranks", lambda values, arrays=arrays: arrays.append(values) or values
        )
        shared_checks.shared_checks(servers, own)
    gathered.clear()
    sums = [sum(arrays) for arrays in zip(*sent, strict=True)]
    assert sum(values.nbytes for values in sums) == 24 * len(servers)
    results = []
    for own in by_rank:
        remaining = iter(sums)
        monkeypatch.setattr(shared_checks, "sum_over_ranks", lambda _, remaining=remaining: next(remaining))
        results.append(shared_checks.shared_checks(servers, own))
    assert all(str(result) == str(results[0]) for result in results)  # text, because nan differs from nan
    return results[0], len(gathered)


def test_checks_of_servers_travel_as_numbers(monkeypatch):
    """Of three senders, one of which is not at all; equal digests stay equal, and others different."""
    servers = [Server(f"http://{number}") for number in range(4)]
    first = [("http://0", 1e-6, "", "a"), ("http://1", 2e-6, "", "b")]
    by_rank = [first, [], [("http://2", 0.0, "", "a"), ("http://3", 3e-6, "", "")]]
    checks, num_gathered = shared(monkeypatch, servers, by_rank)
    assert num_gathered == 0, "texts are sent though no server has a problem"
    assert [check[:3] for check in checks] == [check[:3] for own in by_rank for check in own]
    digests = [check[3] for check in checks]
    assert digests[0] == digests[2] != digests[1] and all(digests[:3]) and digests[3] == ""


def test_a_problem_of_a_server_reaches_every_rank_with_its_text(monkeypatch):
    servers = [Server("http://0"), Server("http://1")]
    by_rank = [[("http://0", 1e-6, "", "a")], [("http://1", float("nan"), "status 500", "")]]
    checks, num_gathered = shared(monkeypatch, servers, by_rank)
    assert num_gathered == 2  # once on each of two ranks
    assert [check[2] for check in checks] == ["", "status 500"] and str(checks[1][1]) == "nan"


@pytest.mark.parametrize(("index", "asked"), [(0, ["http://0"]), (1, ["http://1", "http://2"]), (None, None)])
def test_a_sender_puts_its_own_servers_to_sleep(monkeypatch, index, asked):
    """Rank 0 does not ask the servers of other machines, and all ranks know of those that failed."""
    calls = []

    def release_memory(urls):
        calls.append(urls)
        return {"http://2": "status 500"} if "http://2" in urls else {}

    group = object.__new__(server_group.ServerGroup)
    group._backend = types.SimpleNamespace(can_sleep=True, senders=Senders(2, index), release_memory=release_memory)
    marked = []
    servers = [Server(f"http://{number}") for number in range(3)]
    group.pool = types.SimpleNamespace(servers=servers, problems={}, mark_failed=marked.append)
    group._sleeping = frozenset()
    monkeypatch.setattr(shared_checks, "any_rank", lambda failed: True)
    monkeypatch.setattr(shared_checks, "all_gather_json", lambda own: [{}, {"http://2": "status 500"}])
    group.sleep()
    assert calls == ([] if asked is None else [asked])
    assert marked == [{"http://2": "status 500"}] and group._sleeping == {"http://0", "http://1"}
