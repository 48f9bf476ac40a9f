"""Checkpoints at every layout: logits equal transformers', live export is bit-exact, re-sharding changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from megatron_s2d.config.hf_config import hf_config_from_spec  # noqa: E402
from megatron_s2d.config.model import ModelConfig  # noqa: E402
from megatron_s2d.conversion.convert import check_conversion, export_checkpoint, import_checkpoint  # noqa: E402
from megatron_s2d.models.hf_checkpoint import HfCheckpoint  # noqa: E402

pytestmark = pytest.mark.dist

# Vocabularies that no tensor-parallel size divides; heads of unusual width; tied and untied; two groups at TP 4.
MODELS = {
    "qwen3": ("tiny-teacher", {"vocab_size": 101, "num_query_groups": 2, "head_dim": 40}),
    "llama": ("tiny-llama", {"vocab_size": 83}),
    "moe": ("tiny-moe", {"vocab_size": 67}),
}
DENSE = ("tp1", "tp2", "pp2", "tp2pp2", "tp4")
CASES = [(name, layout) for name in MODELS for layout in DENSE] + [("moe", "ep2"), ("moe", "ep2tp2pp2")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("conversion")
    for name, (preset, fields) in MODELS.items():
        directory = root / name
        (directory / "hf").mkdir(parents=True)
        spec = ModelConfig(preset=preset, **fields).resolve()
        config = transformers.AutoConfig.for_model(**hf_config_from_spec(spec, "float32"))
        torch.manual_seed(11)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.12 * noise)
            tokens = torch.randint(0, spec.vocab_size, (2, 100))
            torch.save(model(tokens).logits, directory / "logits.pt")
        torch.save(tokens, directory / "tokens.pt")
        model.save_pretrained(directory / "hf")
        expert = {"expert_model_parallel_size": 2} if spec.num_experts else {}
        import_checkpoint(
            directory / "hf",
            directory / "megatron",
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            **expert,
        )
    worker = Path(__file__).with_name("conversion_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    finished = subprocess.run(
        [*command, str(worker), str(root)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return root


@pytest.fixture(scope="module")
def results(root) -> dict:
    return json.loads((root / "results.json").read_text())


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_equal_transformers(results, name, layout):
    assert results[name]["live"][layout] < 1e-4
    assert results[name]["converted"][layout] < 1e-4


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_live_export_is_bit_exact(results, name, layout):
    assert results[name]["exported"][layout]


@pytest.mark.parametrize("name", MODELS)
def test_resharding_keeps_every_bit(root, results, name):
    """TP2 x PP2 -> TP1 -> TP4; and both checkpoints, the first with optimizer state, give the same export."""
    assert results[name]["resharded"]["equal"]
    assert results[name]["resharded"]["moved"] > 1e-3
    for saved in ("a", "b"):
        export_checkpoint(root / name / saved, root / name / f"hf_{saved}", assets=root / name / "hf")
        check_conversion(root / name / f"hf_{saved}", root / name / "a")
    first, original = HfCheckpoint(root / name / "hf_a"), HfCheckpoint(root / name / "hf")
    assert first.tensors.keys() == original.tensors.keys()
    transformers.AutoModelForCausalLM.from_pretrained(root / name / "hf_a", local_files_only=True)
