"""A real SGLang server that loads LoRA adapters beside the weights that it started with. All tests are slow."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed (extra `sglang`)"),
]

torch = pytest.importorskip("torch")

import httpx
import yaml
from s2d import metrics, s2d
from sglang_model import WORKFLOW, make_engine, make_policy, make_requests, rollout_gap

from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.rollout.sglang.api_key import authorization, read_api_key

LORA = LoraConfig(rank=4, alpha=8)


def change_adapter(policy) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.chunks[0].adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_trainer_and_server_agree_after_every_adapter(policy, tokenizer, tmp_path):
    adapted = make_policy(policy.layout)
    adapted.add_adapter(LORA, seed=1)
    engine = make_engine(adapted, tokenizer, tmp_path, lora=LORA, lora_sync="adapter")
    try:
        before = engine.generate(make_requests())
        assert rollout_gap(policy, before) < 1e-4  # a new adapter changes nothing
        for version in (1, 2):
            change_adapter(adapted)
            engine.update_weights(adapted.chunks, version)
            assert engine.metrics()["weight_sync/max_log_prob_diff"] < 1e-4
            samples = engine.generate(make_requests())
            assert rollout_gap(adapted, samples) < 1e-4 < 0.1 < rollout_gap(policy, samples)
            assert {span.version for sample in samples for span in sample.weight_versions} == {version}
        headers = authorization(read_api_key(tmp_path / "api-key"))
        models = httpx.get(f"{engine.urls[0]}/v1/models", headers=headers).json()["data"]
        assert [model["id"] for model in models if model["parent"]] == [f"{engine._server_group._tag}-2"]
    finally:
        engine.close()


def test_a_run_trains_adapters_on_servers(tmp_path):
    config = yaml.safe_load(WORKFLOW)
    config["rollout"]["sglang"] = {"lora_sync": "adapter"}
    config["stages"]["grpo"] |= {"lora": {"rank": 4}, "optimizer": {"lr": 1.0e-2}, "kl_loss_coef": 0.01}
    del config["stages"]["opd"]
    config["arms"] = {"grpo": "grpo"}
    path = tmp_path / "lora.yaml"
    path.write_text(yaml.safe_dump(config))
    finished = s2d("run", path, "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    rows = metrics(tmp_path / "run", "stages/grpo")
    assert len(rows) == 3 and all(row["mismatch/k3_kl"] < 1e-6 for row in rows)
    assert rows[-1]["weight_sync/max_log_prob_diff"] < 1e-4
    (log,) = (tmp_path / "run" / "stages" / "grpo").rglob("server-0.log")
    text = log.read_text()
    assert text.count("POST /load_lora_adapter") == text.count("POST /unload_lora_adapter") + 1 >= 3
    assert "POST /update_weights_from" not in text
