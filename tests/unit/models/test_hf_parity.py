"""Logits of the Megatron model against transformers on the same random weights, float32 within 1e-4.

tests/dist compares layouts with each other; here one rank runs every family and every corner case of a
configuration: head_dim unequal to hidden_size / heads, tied and untied, odd vocabularies, rope scaling, padding.
"""

from __future__ import annotations

import dataclasses
import json
from itertools import chain

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from megatron_s2d.config.hf_config import hf_config_from_spec, spec_from_hf_config
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.model_spec import LinearScaling, ModelSpec, YarnScaling
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.presets import PRESETS
from megatron_s2d.models.build import build_model
from megatron_s2d.models.families import hf_tensor_shapes
from megatron_s2d.models.hf_checkpoint import HfCheckpoint
from megatron_s2d.models.rope import attention_factor, rope_frequencies
from megatron_s2d.models.weights import export_buckets, import_weights
from megatron_s2d.parallel import layout as layouts

SMALL = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2}
FULL_THEN_SLIDING = ("full_attention", "sliding_attention")
VARIANTS = {
    "qwen3_untied": ("tiny-teacher", {**SMALL, "head_dim": 24, "vocab_size": 131}),
    "qwen3_tied": ("tiny-teacher", {**SMALL, "head_dim": 8, "vocab_size": 97, "tie_word_embeddings": True}),
    "llama_tied": ("tiny-llama", {**SMALL, "vocab_size": 131}),
    "llama_untied_no_gqa": ("tiny-llama", {"num_query_groups": 4, "tie_word_embeddings": False, "vocab_size": 40}),
    "llama_head_dim": ("tiny-llama", {"head_dim": 40, "vocab_size": 33}),
    "moe": ("tiny-moe", {"vocab_size": 77, "num_experts": 6, "num_experts_per_tok": 3}),
    "moe_raw_probs": ("tiny-moe", {"vocab_size": 77, "norm_topk_prob": False}),
    "qwen2": ("tiny-qwen2", {"vocab_size": 131, "num_layers": 3}),
    "qwen2_window": ("tiny-qwen2", {"vocab_size": 83, "sliding_window": 20, "layer_types": FULL_THEN_SLIDING}),
    "gemma3": ("tiny-gemma3", {"vocab_size": 61, "num_layers": 3}),
    "gpt_oss": ("tiny-gpt-oss", {"vocab_size": 61, "num_layers": 3}),
    "seed_oss": ("tiny-teacher", {"family": "seed_oss", "num_query_groups": 2, "head_dim": 40, "vocab_size": 45}),
    "mistral_window": ("tiny-mistral", {"vocab_size": 61}),
    "mistral_linear": ("tiny-mistral", {"vocab_size": 33, "sliding_window": None, "rope_scaling": LinearScaling(3.0)}),
    "qwen3_yarn": ("tiny-teacher", {"vocab_size": 40, "rope_scaling": YarnScaling(4.0, 32, 32.0, 1.0, 1.3)}),
}


@pytest.fixture(scope="module")
def layout():
    torch.set_num_threads(1)
    layouts.initialize_distributed()
    return layouts.build_layout(ParallelConfig())


def spec_of(name: str) -> ModelSpec:
    """The model of a variant; not all of its fields are settings of a user."""
    preset, fields = VARIANTS[name]
    settings = {key: value for key, value in fields.items() if key in ModelConfig.model_fields}
    settings.pop("rope_scaling", None)
    spec = ModelConfig(preset=preset, **settings).resolve()
    return dataclasses.replace(spec, **{key: value for key, value in fields.items() if key not in settings})


def make_pair(name: str, directory, layout, dtype=torch.float32):
    """transformers' model with random weights saved to ``directory``, and the Megatron model that read them."""
    spec = spec_of(name)
    (directory / "config.json").write_text(json.dumps(hf_config_from_spec(spec, "float32")))
    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(5)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in reference.parameters():
            # Norms that are all ones and weights of one scale would hide a mix-up.
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise)
    reference.save_pretrained(directory)
    checkpoint = HfCheckpoint(directory)
    assert checkpoint.spec == spec
    chunks = build_model(spec, layout, params_dtype=dtype)
    import_weights(chunks, spec, layout, checkpoint)
    chunks[0].eval()
    return spec, reference, chunks


def megatron_logits(chunks, spec, layout, tokens, attention_mask=None):
    with layout.active(), torch.no_grad():
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        return chunks[0](tokens, positions, attention_mask)[..., : spec.vocab_size]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name, tmp_path, layout):
    spec, reference, chunks = make_pair(name, tmp_path, layout)
    tokens = torch.randint(0, spec.vocab_size, (2, 150))
    with torch.no_grad():
        expected = reference(tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(megatron_logits(chunks, spec, layout, tokens), expected, rtol=0, atol=1e-4)
    exported = dict(chain.from_iterable(export_buckets(chunks, spec, layout, bucket_bytes=100_000)))
    source = HfCheckpoint(tmp_path)
    assert list(exported) and exported.keys() == source.tensors.keys()
    for key, tensor in exported.items():
        assert torch.equal(tensor, source.read(key)), key


@pytest.mark.parametrize("name", ["qwen3_untied", "llama_tied", "moe", "qwen2", "mistral_window"])
def test_left_padding_is_invisible(name, tmp_path, layout):
    spec, reference, chunks = make_pair(name, tmp_path, layout)
    tokens = torch.randint(0, spec.vocab_size, (2, 20))
    pads = torch.tensor([0, 7])
    visible = torch.arange(20) >= pads[:, None]
    with torch.no_grad():
        expected = reference(tokens[1:, 7:]).logits[0]
        padded = reference(tokens, attention_mask=visible.long()).logits
    attention_mask = ~(visible[:, None, None, :] & torch.ones(20, 20, dtype=torch.bool).tril())
    logits = megatron_logits(chunks, spec, layout, tokens, attention_mask)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[1, 7:], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[visible], padded[visible], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_untied", "llama_tied", "moe"])
def test_long_positions(name, tmp_path, layout):
    spec, reference, chunks = make_pair(name, tmp_path, layout)
    tokens = torch.randint(0, spec.vocab_size, (1, 3000))
    with torch.no_grad():
        expected = reference(tokens).logits
    torch.testing.assert_close(megatron_logits(chunks, spec, layout, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_tied", "llama_untied_no_gqa", "moe", "gemma3"])
def test_bfloat16_error_is_that_of_its_rounding(name, tmp_path, layout):
    """In bfloat16 both models differ from the float32 logits; ours by at most 1.5 times as much as transformers'."""
    spec, reference, chunks = make_pair(name, tmp_path, layout, torch.bfloat16)
    tokens = torch.randint(0, spec.vocab_size, (4, 40))
    logits = megatron_logits(chunks, spec, layout, tokens).float()
    with torch.no_grad():
        bfloat16_logits = reference(tokens).logits.float()
        float32_logits = reference.float()(tokens).logits
    error, reference_error = (logits - float32_logits).abs(), (bfloat16_logits - float32_logits).abs()
    assert error.mean() < 1.5 * reference_error.mean()
    assert (logits - bfloat16_logits).abs().mean() < 0.02 * float32_logits.std()


@pytest.mark.parametrize("preset", ["llama-3.1-8b", "llama-3.2-1b", "qwen3-8b"])
def test_rope_frequencies_equal_transformers(preset):
    spec = ModelConfig(preset=preset).resolve()
    document = hf_config_from_spec(spec, "bfloat16")
    config = transformers.AutoConfig.for_model(**document)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    expected = LlamaRotaryEmbedding(config=config).inv_freq
    torch.testing.assert_close(rope_frequencies(spec), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "section",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        {"type": "yarn", "factor": 40, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.7},
        {"type": "linear", "factor": 8.0},
    ],
)
def test_rope_scalings_equal_transformers(section):
    document = hf_config_from_spec(ModelConfig(preset="qwen3-8b").resolve(), "bfloat16") | {"rope_scaling": section}
    spec = spec_from_hf_config(document, "config.json")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    theirs = Qwen3RotaryEmbedding(config=transformers.AutoConfig.for_model(**document))
    torch.testing.assert_close(rope_frequencies(spec), theirs.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor(spec) == pytest.approx(theirs.attention_scaling)
    assert spec_from_hf_config(hf_config_from_spec(spec, "bfloat16"), "config.json") == spec


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_tensors_of_transformers(preset):
    spec = ModelConfig(preset=preset).resolve(None if "vocab_size" in PRESETS[preset] else 27)
    few_layers = dataclasses.replace(spec, num_layers=2, num_experts=min(spec.num_experts, 8))
    config = transformers.AutoConfig.for_model(**hf_config_from_spec(few_layers, "bfloat16"))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == few_layers.num_parameters
    assert sum(torch.Size(shape).numel() for _, shape in hf_tensor_shapes(few_layers)) == count
    assert spec_from_hf_config(config.to_dict(), "config.json") == few_layers
