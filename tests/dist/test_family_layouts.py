"""Scores of every family at TP2, PP2, EP2 and CP2, packed and padded, equal transformers'; exports are bit-exact."""

from __future__ import annotations

import json

import pytest
from selection import selected

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from family_worker import samples

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model import ModelConfig

pytestmark = pytest.mark.dist

MODELS = ("tiny-qwen2", "tiny-mistral", "tiny-gemma3", "tiny-llama", "tiny-moe")
QUICK = ("tiny-qwen2/tp2", "tiny-mistral/cp2", "tiny-gemma3/tp2")
CASES = [
    pytest.param(model, layout, marks=() if f"{model}/{layout}" in QUICK else pytest.mark.slow)
    for model in MODELS
    for layout in ("tp2", "pp2", "cp2", *(("ep2",) if model == "tiny-moe" else ()))
]


def expected_scores(model) -> list[list[float]]:
    """Log-probabilities of transformers from the third token on; zeros before."""
    rows = []
    for sample in samples(model.config.vocab_size):
        tokens = torch.from_numpy(sample.token_ids)
        with torch.no_grad():
            log_probs = torch.log_softmax(model(tokens[None]).logits[0, :-1], dim=-1)
        rows.append([0.0, 0.0, *log_probs.gather(1, tokens[1:, None])[1:, 0].tolist()])
    return rows


@pytest.fixture(scope="module")
def scores(request, tmp_path_factory, run_ranks) -> tuple[dict, dict]:
    """Results of the ranks by model and layout, and transformers' scores by model."""
    root = tmp_path_factory.mktemp("families")
    wanted = [f"{model}/{layout}" for model, layout in selected(request, "model", "layout")]
    expected = {}
    for name in sorted({case.partition("/")[0] for case in wanted}):
        config = transformers.AutoConfig.for_model(
            **hf_config_from_spec(ModelConfig(preset=name, vocab_size=83).resolve(), "float32")
        )
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise)
        expected[name] = expected_scores(model)
        model.save_pretrained(root / name)
    run_ranks("family_worker.py", 2, root, root / "results.json", *sorted(wanted))
    return json.loads((root / "results.json").read_text()), expected


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_scores_equal_transformers(scores, model, layout):
    results, expected = scores
    for row, other in zip(results[f"{model}/{layout}"]["scores"], expected[model], strict=True):
        assert row == pytest.approx(other, rel=0, abs=1e-4)
        assert min(other) < -1
    assert results[f"{model}/{layout}"]["exported"]
