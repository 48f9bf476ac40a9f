"""Checkpoints at every layout: logits equal transformers', live export is bit-exact, re-sharding changes nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from selection import selected

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.conversion.convert import (
    check_conversion,
    hf_to_megatron,
    inspect_checkpoint,
    megatron_to_hf,
)
from megatron_s2d.models.hf_checkpoint import HfCheckpoint

pytestmark = pytest.mark.dist

# Vocabularies that no tensor-parallel size divides; heads of unusual width; tied and untied; two groups at TP 4.
MODELS = {
    "qwen3": ("tiny-teacher", {"vocab_size": 101, "num_query_groups": 2, "head_dim": 40}),
    "qwen3_tied": ("tiny-teacher", {"vocab_size": 99, "head_dim": 16, "tie_word_embeddings": True}),
    "llama_tied": ("tiny-llama", {"vocab_size": 83, "head_dim": 20}),
    "llama": ("tiny-llama", {"vocab_size": 83, "tie_word_embeddings": False}),
    "moe": ("tiny-moe", {"vocab_size": 67}),
    "moe_tied": ("tiny-moe", {"vocab_size": 61, "tie_word_embeddings": True}),
}
DENSE = ("tp1", "tp2", "pp2", "tp2pp2", "tp4")
EXPERT = ("ep2", "ep2tp2pp2")
SLOW = ("qwen3_tied", "llama", "moe_tied")  # each of their properties occurs in another model
# Of other models than qwen3: the layouts that combine the others.
QUICK = {"llama_tied": ("tp1", "tp4"), "moe": ("tp1", "ep2tp2pp2")}
CASES = [
    pytest.param(name, layout, marks=pytest.mark.slow if name in SLOW or layout not in QUICK.get(name, DENSE) else ())
    for name in MODELS
    for layout in (*DENSE, *(EXPERT if "moe" in name else ()))
]


def make_cases(model, vocab_size: int) -> dict:
    """Inputs, and transformers' logits for them: whole sequences, left padding, and positions in the thousands."""
    tokens = torch.randint(0, vocab_size, (2, 100))
    visible = torch.arange(100) >= torch.tensor([[0], [37]])
    long = torch.randint(0, vocab_size, (1, 2000))
    cases = {
        "plain": {"tokens": tokens, "visible": None, "logits": model(tokens).logits},
        "padded": {"tokens": tokens, "visible": visible, "logits": model(tokens, visible.long()).logits},
        "long": {"tokens": long, "visible": None, "logits": model(long).logits},
    }
    cases["plain"]["bfloat16"] = copy.deepcopy(model).bfloat16()(tokens).logits.float()
    return cases


@pytest.fixture(scope="module")
def root(request, tmp_path_factory, run_ranks) -> Path:
    """The checkpoints of the models that the selected tests look at."""
    root = tmp_path_factory.mktemp("conversion")
    wanted = {name for (name,) in selected(request, "name")}
    for name, (preset, fields) in MODELS.items():
        if name not in wanted:
            continue
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
            torch.save(make_cases(model, spec.vocab_size), directory / "cases.pt")
        model.save_pretrained(directory / "hf")
        expert = {"expert_model_parallel_size": 2} if spec.num_experts else {}
        hf_to_megatron(
            directory / "hf",
            directory / "megatron",
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            **expert,
        )
    cases = selected(request, "name", "layout")
    names = {name: [layout for other, layout in sorted(cases) if other == name] for name in wanted}
    run_ranks("conversion_worker.py", 4, root, *(f"{name}={','.join(layouts)}" for name, layouts in names.items()))
    return root


@pytest.fixture(scope="module")
def results(root) -> dict:
    return json.loads((root / "results.json").read_text())


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_equal_transformers(results, name, layout):
    """Of the weights read straight into the model; the converted checkpoint gives the same ones bit by bit."""
    differences = results[name]["live"][layout]
    assert differences.keys() == {"plain", "padded", "long"}
    assert max(differences.values()) < 1e-4, differences
    assert results[name]["converted"][layout]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_bfloat16_logits_within_bfloat16_rounding(root, results, name, layout):
    """Off the float32 logits by at most 1.5 times as much as transformers' bfloat16 is, and 3 % of their deviation off
    transformers', both in the mean (the largest errors are tokens that went to other experts)."""
    plain = torch.load(root / name / "cases.pt", weights_only=True)["plain"]
    theirs = (plain["bfloat16"] - plain["logits"]).abs().mean()
    from_truth, from_theirs = results[name]["bfloat16"][layout]
    assert from_truth < 1.5 * theirs
    assert from_theirs < 0.03 * plain["logits"].std()


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_export_of_a_checkpoint_of_any_layout_is_bit_exact(root, name, layout):
    saved, exported = root / name / "saved" / layout, root / name / f"hf_{layout}"
    megatron_to_hf(saved, exported, max_shard_bytes=50_000)
    check_conversion(root / name / "hf", saved)
    first, original = HfCheckpoint(exported), HfCheckpoint(root / name / "hf")
    assert first.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(first.read(key), original.read(key)) for key in original.tensors)
    layout_fields = inspect_checkpoint(saved)["layout"]
    sizes = {"tensor": 2 if "tp2" in layout else 4 if layout == "tp4" else 1, "pipeline": 2 if "pp2" in layout else 1}
    if "moe" in name:
        sizes["expert"] = 2 if "ep2" in layout else 1
    assert layout_fields == {f"{key}_model_parallel_size": size for key, size in sizes.items()}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_live_export_is_bit_exact(results, name, layout):
    assert results[name]["exported"][layout]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def test_resharding_keeps_every_bit(root, results, name):
    """TP2 x PP2 -> TP1 -> TP4; and both checkpoints, the first with optimizer state, give the same export."""
    assert results[name]["resharded"]["equal"]
    assert results[name]["resharded"]["moved"] > 1e-3
    for saved in ("a", "b"):
        megatron_to_hf(root / name / saved, root / name / f"hf_{saved}", assets=root / name / "hf")
        check_conversion(root / name / f"hf_{saved}", root / name / "a")
    first, original = HfCheckpoint(root / name / "hf_a"), HfCheckpoint(root / name / "hf")
    assert first.tensors.keys() == original.tensors.keys()
    transformers.AutoModelForCausalLM.from_pretrained(root / name / "hf_a", local_files_only=True)
