"""Model configuration: presets, overrides, Hugging Face config.json, and one-line errors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from megatron_s2d.config.base import parse
from megatron_s2d.config.hf_config import hf_config_from_spec, spec_from_directory, spec_from_hf_config
from megatron_s2d.config.model import ModelConfig, ModelSpec
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.presets import PRESETS
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import check_layout, layers_of_pp_rank, padded_vocab_size

# Parameter counts in the published safetensors indexes.
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.3-70b": 70_553_706_496,
}


@pytest.mark.parametrize(("preset", "count"), PUBLISHED.items())
def test_presets_have_the_published_size(preset, count):
    assert ModelConfig(preset=preset).resolve().num_parameters == count


def test_active_parameters_of_a_mixture():
    assert 3.3e9 < ModelConfig(preset="qwen3-30b-a3b").resolve().num_active_parameters < 3.4e9


def test_published_configuration_of_gpt_oss():
    """As published with the 20B model, whose safetensors have 20,914,757,184 values when they are dequantised."""
    document = {
        "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880, "num_attention_heads": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"}, "rms_norm_eps": 1e-5,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False,
                         "original_max_position_embeddings": 4096, "rope_type": "yarn"},
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "vocab_size": 201088,
    }  # fmt: skip
    spec = spec_from_hf_config(document, "config.json")
    assert spec.num_parameters == 20_914_757_184
    assert [spec.window_of_layer(layer) for layer in range(3)] == [128, None, 128]
    del document["layer_types"]
    assert spec_from_hf_config(document, "config.json") == spec
    with pytest.raises(UserError, match=r"swiglu_limit 5.0 is not supported \(only 7.0\)"):
        spec_from_hf_config(document | {"swiglu_limit": 5.0}, "config.json")


def test_tiny_presets_use_the_vocabulary_of_the_tokenizer():
    spec = ModelConfig(preset="tiny-teacher").resolve(25)
    assert spec.vocab_size == 25 and 0.2e6 < spec.num_parameters < 0.25e6
    with pytest.raises(UserError, match="vocab_size is not given"):
        ModelConfig(preset="tiny-teacher").resolve()
    assert ModelConfig(preset="qwen3-8b").resolve(151669).vocab_size == 151936
    with pytest.raises(UserError, match="tokenizer has 200000 tokens, the model only 151936"):
        ModelConfig(preset="qwen3-8b").resolve(200_000)


def test_fields_override_a_preset():
    spec = ModelConfig(preset="llama-3.1-8b", num_layers=2, rope_scaling={"factor": 32.0}).resolve()
    assert spec.num_layers == 2 and spec.rope_scaling.factor == 32.0 and spec.hidden_size == 4096


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"preset": "qwen3-7b"}, "unknown preset 'qwen3-7b' (did you mean 'qwen3-1.7b'?)"),
        ({"preset": "qwen3-8b", "path": "x"}, "either preset or path"),
        ({"path": "x", "num_layers": 3}, "num_layers is set by the config.json"),
        ({"family": "qwen3", "num_layers": 2}, "set a preset or a path, or these fields too: hidden_size"),
        ({"preset": "qwen3-8b", "num_layer": 2}, "did you mean 'num_layers'?"),
    ],
)
def test_invalid_models_are_one_line_errors(document, words):
    with pytest.raises(UserError) as error:
        parse(ModelConfig, document, "run.yaml")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_query_groups": 3}, "num_attention_heads 4 is not a multiple of num_query_groups 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_experts": 4}, "only qwen3_moe and gpt_oss have experts"),
        ({"family": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok between 1"),
        ({"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_inconsistent_models_are_refused(fields, words):
    with pytest.raises(UserError, match="model: ") as error:
        ModelConfig(preset="tiny-teacher", **fields).resolve(25)
    assert words in str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_specs_round_trip_through_json_and_config_json(preset, tmp_path):
    spec = ModelConfig(preset=preset).resolve(None if "vocab_size" in PRESETS[preset] else 25)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    (tmp_path / "config.json").write_text(json.dumps(hf_config_from_spec(spec, "bfloat16")))
    assert spec_from_directory(tmp_path) == spec
    assert ModelConfig(path=tmp_path).resolve() == spec


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "sliding_window is missing"),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]}, "1 entries for 28"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0, not a positive integer"),
        ({"model_type": "qwen3_next"}, "gated delta net with kernels of flash-linear-attention"),
        ({"model_type": "gemma2"}, "no soft-capped attention scores"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "fast": 1}}, "rope type 'yarn' with ['factor', 'fast']"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": -4.0}}, "factor is -4.0, not positive"),
        ({"num_hidden_layers": "8"}, "num_hidden_layers is '8'"),
        ({"rope_theta": None}, "rope_theta is missing"),
    ],
)
def test_unsupported_config_json_is_refused(change, words):
    document = hf_config_from_spec(ModelConfig(preset="qwen3-0.6b").resolve(), "bfloat16")
    with pytest.raises(UserError) as error:
        spec_from_hf_config({**document, **change}, "there/config.json")
    assert words in str(error.value) and str(error.value).startswith("there/config.json: ")


@pytest.mark.parametrize(
    ("preset", "sizes", "words"),
    [
        ("qwen3-8b", {"tensor_model_parallel_size": 3}, "num_attention_heads 32 cannot be divided by tensor"),
        ("qwen3-8b", {"pipeline_model_parallel_size": 5}, "num_layers 36 cannot be divided by pipeline"),
        ("qwen3-14b", {"tensor_model_parallel_size": 5}, "ffn_hidden_size 17408 cannot be divided by tensor"),
        ("qwen3-8b", {"expert_model_parallel_size": 2, "data_parallel_size": 2}, "the model has no experts"),
        ("qwen3-30b-a3b", {"tensor_model_parallel_size": 2}, "needs sequence_parallel"),
        ("tiny-moe", {"expert_model_parallel_size": 3, "data_parallel_size": 3}, "num_experts 4 cannot be divided"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(preset, sizes, words):
    spec = ModelConfig(preset=preset).resolve(None if "vocab_size" in PRESETS[preset] else 25)
    with pytest.raises(UserError) as error:
        check_layout(spec, ParallelConfig(**sizes))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp_comm_overlap": True, "tensor_model_parallel_size": 2}, "set sequence_parallel to true"),
        ({"moe_token_dispatcher": "flex"}, "set expert_model_parallel_size > 1, or moe_token_dispatcher to alltoall"),
    ],
)
def test_communication_that_the_layout_does_not_have_is_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        ParallelConfig(**sizes)


def test_groups_must_divide_ranks_or_vice_versa():
    fields = {"num_attention_heads": 12, "num_query_groups": 4, "ffn_hidden_size": 384}
    spec = ModelConfig(preset="tiny-teacher", **fields).resolve(25)
    check_layout(spec, ParallelConfig(tensor_model_parallel_size=12))
    with pytest.raises(UserError, match="num_query_groups 4 cannot be divided by tensor_model_parallel_size 6"):
        check_layout(spec, ParallelConfig(tensor_model_parallel_size=6))


def test_layouts_that_divide_are_accepted():
    spec = ModelConfig(preset="qwen3-30b-a3b").resolve()
    check_layout(
        spec,
        ParallelConfig(
            tensor_model_parallel_size=8,  # more ranks than the four key/value groups
            pipeline_model_parallel_size=4,
            expert_model_parallel_size=16,
            data_parallel_size=2,
            sequence_parallel=True,
        ),
    )
    ranks = [layers_of_pp_rank(spec, pp_rank, 4) for pp_rank in range(4)]
    assert [layer for layers in ranks for layer in layers] == list(range(48))


def test_padded_vocabulary():
    for vocab_size in (1, 25, 4095, 4096, 128256, 151936):
        sizes = {padded_vocab_size(vocab_size, tensor) for tensor in (1, 2, 4, 8)}
        assert len(sizes) == 1  # so that a checkpoint has one shape at all of them
        (padded,) = sizes
        assert vocab_size <= padded < vocab_size + 128 and padded % 8 == 0
    assert padded_vocab_size(25, 3) == 48 and padded_vocab_size(151936, 8) == 151936


def test_parameters_of_wider_experts():
    spec = ModelConfig(preset="tiny-moe").resolve(25)
    wider = dataclasses.replace(spec, moe_ffn_hidden_size=spec.moe_ffn_hidden_size + 1)
    assert wider.num_parameters - spec.num_parameters == 3 * spec.hidden_size * spec.num_experts * spec.num_layers


def test_model_configuration_imports_no_torch():
    code = (
        "import sys, megatron_s2d.config.model, megatron_s2d.models.families; "
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recompute_modules": ["mlp"]}, "recompute_modules needs recompute: selective"),
        ({"recompute": "selective", "recompute_modules": []}, "set recompute to none"),
        ({"recompute": "selective", "recompute_num_layers": 2}, "recompute_num_layers needs recompute: full"),
        ({"recompute": "selective", "recompute_modules": ["mla_up_proj"]}, "core_attn"),
        ({"recompute": "selective", "recompute_modules": ["moe"]}, "and the model is dense"),
    ],
)
def test_recompute_settings_that_do_not_fit_are_refused(values, message):
    with pytest.raises((ValueError, UserError), match=message):
        ModelConfig(preset="tiny-llama", **values).resolve(27)


def test_recompute_settings_become_megatrons():
    units = ModelConfig(preset="tiny-llama", recompute="full", recompute_num_layers=2).recomputation
    assert units.megatron_fields() == {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    }
    modules = ModelConfig(preset="tiny-llama", recompute="selective", recompute_modules=["mlp"]).recomputation
    assert modules.megatron_fields() == {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    assert ModelConfig(preset="tiny-llama").recomputation.megatron_fields() == {}


def test_overlap_and_virtual_stages_have_defaults_by_device_and_are_checked():
    shared = ParallelConfig(data_parallel_size=2)
    assert shared.overlaps(on_gpu=True) == (True, True) and shared.overlaps(on_gpu=False) == (False, False)
    assert ParallelConfig().overlaps(on_gpu=True) == (False, False)
    assert ParallelConfig(overlap_grad_reduce=True).overlaps(on_gpu=False) == (True, True)
    assert ParallelConfig(overlap_param_gather=False, data_parallel_size=2).overlaps(on_gpu=True) == (True, False)
    with pytest.raises(ValueError, match="set overlap_grad_reduce to true"):
        ParallelConfig(overlap_grad_reduce=False, overlap_param_gather=True)
    with pytest.raises(ValueError, match="needs pipeline_model_parallel_size > 1"):
        ParallelConfig(virtual_pipeline_model_parallel_size=2)
    parallel = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    spec = ModelConfig(preset="tiny-llama", num_layers=6).resolve(27)
    with pytest.raises(UserError, match="num_layers 6 cannot be divided by pipeline_model_parallel_size x virtual"):
        check_layout(spec, parallel)
    spec = dataclasses.replace(spec, num_layers=8)
    chunks = [layers_of_pp_rank(spec, rank, 2, stage, 2) for stage in range(2) for rank in range(2)]
    assert [list(chunk) for chunk in chunks] == [[0, 1], [2, 3], [4, 5], [6, 7]]
