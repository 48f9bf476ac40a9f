"""LoRA adapters on servers: loaded beside the base weights, one a version, named in requests; refusals."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fake_sglang import log_prob_table
from served_helpers import SPEC, VOCAB_SIZE, embedding_of, make_engine, make_requests

from megatron_s2d.config.base import UserError
from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.config.training import SglangConfig
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.lora import SeededAdapter, add_adapters, gather_adapters
from megatron_s2d.models.peft_files import PeftAdapter
from megatron_s2d.models.weights import export_buckets
from megatron_s2d.rollout.sglang.adapter_sync import AdapterSync

pytestmark = pytest.mark.usefixtures("short_pauses")
LORA = LoraConfig(rank=3, targets=["q_proj", "v_proj"])
CAN_LOAD = {"enable_lora": True, "max_lora_rank": 3, "lora_target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def adapted(chunks, layout):
    add_adapters(chunks, SPEC, layout, LORA, SeededAdapter(1))
    return chunks


@pytest.fixture
def loading(servers, adapted):
    """The toy servers, started with the base weights and able to load the adapter."""
    for server in servers:
        server.info |= CAN_LOAD
        server.embedding = embedding_of(adapted).copy()
    return servers


def toy_table(chunks, layout) -> np.ndarray:
    values = torch.cat([tensor.flatten() for tensor in gather_adapters(chunks, SPEC, layout, LORA).values()])
    return log_prob_table(embedding_of(chunks) + np.float32(values.double().mean()))


def toy_score(chunks, layout):
    """The trainer's own forward of the toy model with its adapter."""

    def score(samples):
        table = toy_table(chunks, layout).astype(np.float32)
        rows = [np.r_[np.float32(0), table[s.token_ids[:-1], s.token_ids[1:]]] for s in samples]
        return [np.where(sample.response_mask, row, 0) for sample, row in zip(samples, rows, strict=True)]

    return score


def change_adapter(chunks) -> None:
    with torch.no_grad():
        for parameter in chunks[0].adapter.parameters():
            parameter.add_(0.05)


def engine_of(chunks, layout, directory, servers=(), **settings):
    options = {"score": toy_score(chunks, layout), "lora": LORA, "lora_sync": "adapter"} | settings
    return make_engine(chunks, layout, directory, servers, **options)


def test_every_version_is_an_adapter_of_its_own_and_older_ones_are_unloaded(adapted, layout, loading, tmp_path, capsys):
    engine = engine_of(adapted, layout, tmp_path, loading)
    tag = engine._server_group._tag
    assert [list(server.adapters) for server in loading] == [[f"{tag}-0"]] * 2
    loading[0].adapters["another run-4"] = ("", 0.0)
    first = engine.generate(make_requests())
    change_adapter(adapted)
    engine.update_weights(adapted, 5)
    second = engine.generate(make_requests())
    table = toy_table(adapted, layout)
    for sample in second:
        ids = sample.token_ids[sample.prompt_length - 1 :]
        np.testing.assert_allclose(
            sample.rollout_log_probs[sample.prompt_length :], table[ids[:-1], ids[1:]], atol=1e-5
        )
    assert any(a.rollout_log_probs.tolist() != b.rollout_log_probs.tolist() for a, b in zip(first, second, strict=True))
    assert list(loading[0].adapters) == ["another run-4", f"{tag}-5"] and list(loading[1].adapters) == [f"{tag}-5"]
    (directory,) = (tmp_path / "adapters").iterdir()
    stored, expected = PeftAdapter(directory, SPEC), gather_adapters(adapted, SPEC, layout, LORA)
    assert all(torch.equal(stored.read(name, tuple(value.shape)), value) for name, value in expected.items())
    posts = [path for server in loading for path, _ in server.log]
    assert not any(path.startswith("/update_weights") for path in posts)
    generated = [body for path, body in loading[0].log if path == "/generate" and "rid" in body]
    assert generated[-1]["lora_path"] == f"{tag}-5" and not [body for body in generated if "lora_path" not in body]
    sent = f"{sum(value.nbytes for value in expected.values()) / 1e9:.4f} GB"
    assert f"by adapter from 1 rank(s): {sent}" in capsys.readouterr().out
    engine.close()
    assert not (tmp_path / "adapters").exists()


def test_an_update_that_failed_on_one_server_is_repeated_there(adapted, layout, loading, tmp_path):
    engine = engine_of(adapted, layout, tmp_path, loading)
    change_adapter(adapted)
    loading[1].control_faults["/update_weight_version"] = "500"  # after the adapter was loaded
    engine.update_weights(adapted, 1)
    assert [bool(server.problem) for server in engine._server_group.pool.servers] == [False, True]
    del loading[1].control_faults["/update_weight_version"]
    engine._server_group.recover()
    assert not engine._server_group.pool.problems
    assert list(loading[0].adapters) == list(loading[1].adapters) == [f"{engine._server_group._tag}-1"]


def test_started_servers_have_the_base_weights_and_room_for_the_adapter(adapted, layout, interpreter, tmp_path):
    change_adapter(adapted)
    engine = engine_of(adapted, layout, tmp_path, python=str(interpreter))
    engine.generate(make_requests())
    log = (tmp_path / "server-0.log").read_text()
    for argument in (
        "--enable-lora",
        "--max-lora-rank', '3",
        "--lora-target-modules', 'q_proj', 'v_proj",
        "torch_native",
    ):
        assert argument in log
    (start,) = (tmp_path / "weights").iterdir()
    stored = HfCheckpoint(start)
    buckets = export_buckets(adapted, SPEC, layout, merge_adapter=False)
    assert all(torch.equal(stored.read(name), value) for bucket in buckets for name, value in bucket)
    engine.close()


@pytest.mark.parametrize("info", [{}, CAN_LOAD | {"max_lora_rank": 2}, CAN_LOAD | {"lora_target_modules": ["q_proj"]}])
def test_servers_that_cannot_load_the_adapter_are_refused(adapted, layout, loading, tmp_path, info):
    loading[1].info = {"tp_size": 1, "pp_size": 1} | info
    with pytest.raises(
        UserError, match="loads no LoRA adapters of rank 3 of q_proj, v_proj: start it with --enable-lora"
    ):
        engine_of(adapted, layout, tmp_path, loading)


def test_servers_with_other_base_weights_are_refused(adapted, layout, loading, tmp_path):
    for server in loading:
        server.embedding = server.embedding + np.random.default_rng(0).normal(0, 0.1, server.embedding.shape)
    with pytest.raises(UserError, match="its log-probabilities differ from the trainer's by"):
        engine_of(adapted, layout, tmp_path, loading, max_restarts=0)


def test_servers_that_release_their_memory_get_merged_weights():
    with pytest.raises(ValueError, match="lose the base weights"):
        SglangConfig(lora_sync="adapter", enable_memory_saver=True)


def test_merged_weights_are_the_default(adapted, layout, servers, tmp_path):
    engine = make_engine(adapted, layout, tmp_path, servers, lora=LORA)
    assert not isinstance(engine._server_group._backend._sync, AdapterSync)
    assert not servers[0].adapters and "/update_weights_from_disk" in [path for path, _ in servers[0].log]
    assert len(servers[0].embedding) == VOCAB_SIZE
