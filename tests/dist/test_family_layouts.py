"""Scores of every family at TP2, PP2, EP2 and CP2, packed and padded, equal transformers'; exports are bit-exact.

With LoRA adapters, too: their scores, files, training and checkpoints are the same at every layout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from selection import selected

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "models"))

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from family_worker import LORA, samples
from lora_reference import merged_in_float64, random_adapter

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.lora import LoraConfig
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.models.peft_files import write_adapter

pytestmark = pytest.mark.dist

ADAPTED = {
    "lora:tiny-teacher": ("tp2", "pp2", "cp2"),
    "lora:tiny-moe": ("ep2", "tp2"),
    "lora:tiny-gemma3": ("tp2",),
}
SLOW_ADAPTED = ("lora:tiny-teacher/cp2", "lora:tiny-moe/tp2")
MODELS = ("tiny-qwen2", "tiny-mistral", "tiny-gemma3", "tiny-llama", "tiny-moe", "tiny-gpt-oss", "seed-oss")
WITHOUT_PRESET = {"seed-oss": {"preset": "tiny-teacher", "family": "seed_oss", "num_query_groups": 2, "head_dim": 40}}
QUICK = ("tiny-qwen2/tp2", "tiny-mistral/cp2", "tiny-gemma3/tp2", "tiny-gpt-oss/tp2")
CASES = [
    pytest.param(model, layout, marks=() if f"{model}/{layout}" in QUICK else pytest.mark.slow)
    for model in MODELS
    for layout in ("tp2", "pp2", "cp2", *(("ep2",) if model in ("tiny-moe", "tiny-gpt-oss") else ()))
]


def spec_of(name: str) -> ModelSpec:
    return ModelConfig(**WITHOUT_PRESET.get(name, {"preset": name}), vocab_size=83).resolve()


def expected_scores(model) -> tuple[list[list[float]], float]:
    """Log-probabilities of transformers from the third token on, zeros before; and the largest logit's size."""
    rows, largest = [], 0.0
    for sample in samples(model.config.vocab_size):
        tokens = torch.from_numpy(sample.token_ids)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1]
        largest = max(largest, float(logits.abs().max()))
        log_probs = torch.log_softmax(logits, dim=-1).gather(1, tokens[1:, None])
        rows.append([0.0, 0.0, *log_probs[1:, 0].tolist()])
    return rows, largest


def _error(rows, others) -> float:
    return max(abs(a - b) for row, other in zip(rows, others, strict=True) for a, b in zip(row, other, strict=True))


@pytest.fixture(scope="module")
def scores(request, tmp_path_factory, run_ranks) -> tuple[dict, dict]:
    """Results of the ranks by model and layout, and transformers' scores by model."""
    root = tmp_path_factory.mktemp("families")
    wanted = [f"{model}/{layout}" for model, layout in selected(request, "model", "layout")]
    wanted += sorted({f"{case.partition('/')[0]}/dp2" for case in wanted if case.startswith("lora:")})
    expected = {}
    for name in sorted({case.partition("/")[0].removeprefix("lora:") for case in wanted}):
        config = transformers.AutoConfig.for_model(**hf_config_from_spec(spec_of(name), "float32"))
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise)
        expected[name] = expected_scores(model)
        model.save_pretrained(root / name)
        if f"lora:{name}" in ADAPTED:
            lora, spec = LoraConfig(**LORA), spec_of(name)
            tensors = random_adapter(spec, lora)
            write_adapter(root / name / "adapter", lora, tensors, name)
            sums = {key: tensor.double().sum().item() for key, tensor in tensors.items()}
            expected[f"lora:{name}"] = *expected_scores(merged_in_float64(model, tensors, lora)), sums
    run_ranks("family_worker.py", 2, root, root / "results.json", *sorted(wanted))
    return json.loads((root / "results.json").read_text()), expected


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_scores_equal_transformers(scores, model, layout):
    results, expected = scores
    for row, other in zip(results[f"{model}/{layout}"]["scores"], expected[model][0], strict=True):
        assert row == pytest.approx(other, rel=0, abs=1e-4)
        assert min(other) < -1
    assert results[f"{model}/{layout}"]["exported"]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, marks=pytest.mark.slow if f"{model}/{layout}" in SLOW_ADAPTED else ())
        for model, names in ADAPTED.items()
        for layout in names
    ],
)
def test_adapters_are_the_same_at_every_layout(scores, model, layout):
    results, expected = scores
    result, (rows, largest, sums), alone = results[f"{model}/{layout}"], expected[model], results[f"{model}/dp2"]
    base, base_largest = expected[model.removeprefix("lora:")]
    assert max(abs(a - b) for a, b in zip(rows[0], base[0], strict=True)) > 0.1
    # Of the largest logit, as for a layer in float32: a log-probability has the errors of the logits that it sums.
    print(f"{model}/{layout}: {_error(result['scores'], rows) / largest:.1e} of the largest logit, {largest:.1f}")
    assert _error(result["scores"], rows) < 1e-5 * largest
    assert _error(result["base"], base) < 1e-5 * base_largest
    assert result["tensors"] == pytest.approx(sums, rel=1e-12)
    assert result["exported"] == pytest.approx(alone["exported"], rel=1e-6)
    assert result["zero_adapter_is_base"] and result["base_stays"] and result["resumed"]
    assert result["start"] == alone["start"]
    assert result["training"][1][0] < result["training"][0][0]
    for (loss, norm), (other_loss, other_norm) in zip(result["training"], alone["training"], strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-4) and norm == pytest.approx(other_norm, rel=1e-3)
    assert result["trained"] == pytest.approx(alone["trained"], rel=1e-3)
    assert result["merged_difference"] < 1e-4
