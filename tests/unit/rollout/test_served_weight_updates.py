"""Weight updates of served engines over toy servers: sent, proven, and retried where a server fails."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from concurrent.futures import Future

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from served_helpers import SERVER, SPEC, VOCAB_SIZE, change_weights, make_engine, make_requests, max_difference, tokens

from megatron_s2d.config.base import UserError
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.records import WeightVersionSpan
from megatron_s2d.rollout.served import server_group
from megatron_s2d.rollout.served.backend import WeightUpdateFailed
from megatron_s2d.rollout.sglang import weight_sync
from megatron_s2d.rollout.sglang.weight_sync import BroadcastWeightSync, refuse_remote, trainer_address

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_responses_are_sampled_with_the_updated_weights(chunks, layout, servers, tmp_path, capsys):
    engine = make_engine(chunks, layout, tmp_path, servers, bucket_bytes=4000)
    first = engine.generate(make_requests())
    assert max_difference(chunks, first) < 1e-5
    change_weights(chunks)
    engine.update_weights(chunks, 5)
    second = engine.generate(make_requests())
    assert max_difference(chunks, second) < 1e-5 < max_difference(chunks, first)
    assert {span for sample in second for span in sample.weight_versions} == {
        WeightVersionSpan(sample.prompt_length, len(sample.token_ids), 5) for sample in second
    }
    assert engine.metrics()["weight_sync/max_log_prob_diff"] < 1e-5 and engine.metrics()["weight_sync/gb_per_s"] > 0
    assert "GB/s" in capsys.readouterr().out
    paths = [path for path, _ in servers[0].log if path != "/generate"]
    update = ["/pause_generation", "/flush_cache?timeout=120", "/update_weights_from_disk", "/continue_generation"]
    assert paths == [*update, "/weights_checker"] * 2
    engine.close()
    assert not (tmp_path / "weights").exists()


def test_an_update_without_problems_gathers_no_texts(chunks, layout, servers, tmp_path, monkeypatch):
    engine = make_engine(chunks, layout, tmp_path, servers)
    monkeypatch.setattr(server_group, "all_gather_json", lambda value: pytest.fail(f"{value} is gathered"))
    engine.update_weights(chunks, 1)
    assert not engine._server_group.pool.problems


def test_servers_whose_digests_differ_are_updated_again(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    servers[0].digests, servers[1].digests = itertools.repeat("a"), itertools.chain(["b"], itertools.repeat("a"))
    for server in servers:
        server.log.clear()
    engine.update_weights(chunks, 1)
    assert not engine._server_group.pool.problems and next(servers[1].digests) == "a"
    for server in servers:
        assert [path for path, _ in server.log].count("/update_weights_from_disk") == 2
    servers[1].digests = itertools.repeat("c")
    with pytest.raises(UserError, match="digest of its weights is not that of the other servers"):
        engine.update_weights(chunks, 2)


def test_progress_counts_every_response(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    calls = []
    engine.generate(make_requests(), lambda done, total: calls.append((done, total)))
    assert calls == [(done, 12) for done in range(1, 13)]
    engine.close()


def test_files_of_a_weight_update_are_a_complete_checkpoint(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, bucket_bytes=4000)
    engine.update_weights(chunks, 1)
    (directory,) = (tmp_path / "weights").iterdir()  # the older version is gone
    checkpoint = HfCheckpoint(directory)
    assert checkpoint.spec == dataclasses.replace(SPEC) and len(checkpoint.shards) > 3
    for name, tensor in itertools.chain.from_iterable(export_buckets(chunks, SPEC, layout)):
        assert torch.equal(checkpoint.read(name), tensor), name
    engine.close()


def test_versions_of_another_run_are_refused(chunks, layout, servers, tmp_path):
    one, other = (make_engine(chunks, layout, tmp_path / name, servers) for name in "ab")
    with pytest.raises(UserError, match="instead of"):
        one._rollout = one._rollout.model_copy(update={"server": SERVER.model_copy(update={"max_restarts": 0})})
        one.generate(make_requests())
    assert len(other.generate(make_requests())) == 12


def test_server_that_reports_an_update_it_did_not_do_gets_no_requests(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    servers[0].control_faults["/update_weights_from_disk"] = "ignore"
    change_weights(chunks)
    engine.update_weights(chunks, 1)
    servers[0].log.clear()
    samples = engine.generate(make_requests())
    assert max_difference(chunks, samples) < 1e-5
    assert not [path for path, _ in servers[0].log if path == "/generate"]
    # The next update sends it the weights again, and it is used.
    servers[0].control_faults.clear()
    engine.update_weights(chunks, 2)
    engine.generate(make_requests())
    assert [path for path, _ in servers[0].log if path == "/generate"]


@pytest.mark.parametrize("fault", ["500", "ignore"])
def test_update_that_reaches_no_server_is_an_error(chunks, layout, servers, tmp_path, fault):
    engine = make_engine(chunks, layout, tmp_path, servers)
    change_weights(chunks)
    for server in servers:
        server.control_faults["/update_weights_from_disk"] = fault
    with pytest.raises(UserError, match="no SGLang server holds the current weights") as error:
        engine.update_weights(chunks, 1)
    assert ("status 500" if fault == "500" else "nats") in str(error.value) and "\n" not in str(error.value)


def test_server_with_stale_weights_is_updated_again(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    clean = engine.generate(make_requests())
    for server in servers:
        server.weight_version = "restored from somewhere"
        server.embedding = np.zeros_like(server.embedding)
    again = engine.generate(make_requests())
    assert tokens(again) == tokens(clean) and max_difference(chunks, again) < 1e-5


def test_requests_that_keep_failing_raise_one_line(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, max_restarts=1)
    for server in servers:
        server.faults.extend(["nan"] * 1000)
    with pytest.raises(UserError, match="after 1 recoveries too.*is nan") as error:
        engine.generate(make_requests())
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_weights_are_sent_to_idle_servers_only(chunks, layout, servers, tmp_path):
    """SGLang ends itself if it has to drop old keys and values while a request runs."""
    engine = make_engine(chunks, layout, tmp_path, servers, max_restarts=0)
    for server in servers:
        server.log.clear()
        server.control_faults["/flush_cache?timeout=120"] = "400"
    with pytest.raises(UserError, match="no SGLang server holds the current weights .*flush_cache"):
        engine.update_weights(chunks, 1)
    assert not [path for server in servers for path, _ in server.log if path.startswith("/update")]


def test_weight_files_stay_until_every_server_has_read_newer_ones(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, max_restarts=0)
    engine.update_weights(chunks, 1)
    assert len(servers[0].seen_versions) == 2  # the older ones, and those that are read now
    (first,) = (path.name for path in (tmp_path / "weights").iterdir())
    servers[1].control_faults["/update_weights_from_disk"] = "500"
    for version in (2, 3, 4):  # servers with a problem may still read; older versions are removed
        engine.update_weights(chunks, version)
        assert len(list((tmp_path / "weights").iterdir())) == 2
    servers[1].control_faults.clear()
    engine.update_weights(chunks, 4)
    assert len({first, *(path.name for path in (tmp_path / "weights").iterdir())}) == 2


def test_slow_server_is_not_marked_failed(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, max_restarts=0)
    servers[0].weight_version = "another"  # so that its health is checked
    servers[0].health_faults.extend(["503", "503"])
    engine.generate(make_requests())
    engine.update_weights(chunks, 1)
    assert not engine._server_group.pool.problems and not servers[0].health_faults
    servers[0].weight_version = "another"
    servers[0].health_faults.extend(["503"] * 3)
    engine.generate(make_requests())
    engine.update_weights(chunks, 2)
    assert list(engine._server_group.pool.problems) == [servers[0].url]


def test_prompt_outside_the_vocabulary_is_refused_before_it_is_sent(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    request = make_requests()[0]
    prompt = dataclasses.replace(request.prompt, token_ids=np.array([1, VOCAB_SIZE]))
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        engine.generate([dataclasses.replace(request, prompt=prompt)])


def test_attached_server_that_is_gone_does_not_block_an_update(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    servers[0].close()
    engine.generate(make_requests())
    change_weights(chunks)
    engine.update_weights(chunks, 1)
    assert max_difference(chunks, engine.generate(make_requests())) < 1e-5
    assert list(engine._server_group.pool.problems) == [servers[0].url]


def test_shared_memory_needs_servers_on_this_machine():
    with pytest.raises(UserError, match="http://10.0.0.2:30000 is another machine"):
        refuse_remote(["http://localhost:1", "http://10.0.0.2:30000"])


def test_trainer_address_is_one_that_the_servers_reach():
    assert trainer_address(["http://127.0.0.1:1", "http://localhost:2"]) == "127.0.0.1"
    assert trainer_address(["http://127.0.0.1:1", "http://127.0.0.2:2"]) == "127.0.0.1"
    with pytest.raises(WeightUpdateFailed, match="no route to that machine"):
        trainer_address(["http://no-such-machine.invalid:1"])


def test_only_files_reach_servers_with_pipeline_parallelism(chunks, layout, servers, tmp_path):
    servers[0].info |= {"pp_size": 2}
    engine = make_engine(chunks, layout, tmp_path, servers)
    assert engine.generate(make_requests())
    engine.close()
    with pytest.raises(UserError, match=r"runs with --pp-size 2, and only rollout.sglang.weight_sync: disk reaches"):
        make_engine(chunks, layout, tmp_path, servers, weight_sync="distributed")


@pytest.mark.parametrize("refusal", [True, False])
def test_a_group_that_does_not_form_is_given_up(monkeypatch, refusal):
    """NCCL's first call returns when all ranks have connected; a server that refused, or is gone, never does."""
    connecting, replies = threading.Event(), [Future()]
    monkeypatch.setattr(weight_sync.dist, "broadcast", lambda *arguments, **options: connecting.wait())
    if refusal:
        replies[0].set_exception(WeightUpdateFailed("status 400"))
    else:
        monkeypatch.setattr(weight_sync, "_GROUP_SECONDS", 0.01)
    sync = BroadcastWeightSync()
    with pytest.raises(WeightUpdateFailed, match="status 400" if refusal else "did not form within 0.01 s"):
        sync._start_broadcast(torch.zeros(1), replies)
    connecting.set()
