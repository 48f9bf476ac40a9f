"""Hugging Face directories as people have them: cases reported from the field, and neighbours of them."""

import codecs
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import hf_tensor_shapes
from megatron_s2d.models.hf_checkpoint import HfCheckpoint

FIELDS = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 96}


def make(directory, preset="tiny-llama", config=None, extra=None):
    """Write a small checkpoint; config: changes of config.json, extra: further tensors."""
    spec = ModelConfig(preset=preset, num_query_groups=2, head_dim=8, **FIELDS).resolve()
    tensors = {name: torch.randn(shape) for name, shape in hf_tensor_shapes(spec)} | (extra or {})
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    document = hf_config_from_spec(spec, "float32") | (config or {})
    (directory / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v != "absent"}))
    return directory


@pytest.mark.parametrize(
    "names",
    [
        [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)],
        ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"],
        ["model.layers.0.self_attn.rotary_emb.cos_cached", "model.layers.0.self_attn.rotary_emb.sin_cached"],
    ],
)
def test_rotary_buffers_of_older_versions_are_left_out(tmp_path, names):
    checkpoint = HfCheckpoint(make(tmp_path / "hf", extra={name: torch.ones(4) for name in names}))
    assert set(checkpoint.tensors) == {name for name, _ in hf_tensor_shapes(checkpoint.spec)}


def test_other_tensors_are_still_refused(tmp_path):
    with pytest.raises(UserError, match=r"rotary_emb\.weight does not belong to a llama model"):
        HfCheckpoint(make(tmp_path / "hf", extra={"model.rotary_emb.weight": torch.ones(4)}))


def test_a_byte_order_mark_before_config_and_index(tmp_path):
    directory = make(tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (directory / "model.safetensors.index.json").write_bytes(codecs.BOM_UTF8 + json.dumps(index).encode())
    (directory / "config.json").write_bytes(codecs.BOM_UTF8 + (directory / "config.json").read_bytes())
    assert set(HfCheckpoint(directory).tensors) == set(tensors)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}},
        {"rope_theta": "absent", "rope_parameters": {"rope_theta": 10000, "type": "default", "rope_type": "default"}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": None,
            }
        },
        {"num_key_value_heads": 2, "head_dim": None},
        {"layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_forms_that_mean_the_same_are_read(tmp_path, config):
    HfCheckpoint(make(tmp_path / "hf", config=config))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0\.5 is not"),
        ({"partial_rotary_factor": 0.25}, r"partial_rotary_factor 0\.25 is not"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by kind of layer"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": "default"}, "rope parameters are 'default', not an object"),
        ({"rope_parameters": ["default"]}, "not an object"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4', not a number"),
        ({"rope_theta": True}, "rope_theta is True, not a number"),
        ({"rope_theta": 0}, "rope_theta is 0.0; rotary embeddings need a base of at least 1"),
        ({"rms_norm_eps": [1e-6]}, "rms_norm_eps is .*not a number"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types with 'linear_attention'"),
        ({"layer_types": "full_attention"}, "layer_types is not a list"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a positive integer"),
        ({"num_attention_heads": 4.0}, r"num_attention_heads is 4\.0, not a positive integer"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"hidden_size": 10**9}, "hidden_size is 1,000,000,000, larger than in any model"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', neither true nor false"),
        ({"model_type": ["llama"]}, "model_type .* is not supported"),
        ({"compression_config": {"format": "int-quantized"}}, "compression_config"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_what_changes_the_model_is_refused_by_name(tmp_path, config, words):
    with pytest.raises(UserError, match=words) as caught:
        HfCheckpoint(make(tmp_path / "hf", config=config))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


DEEP = b"[" * 200_000
DAMAGE = {
    "config.json": [b"", b"[]", b"null", b"{}", DEEP, b"\xff\xfe{", b"version https://git-lfs", b'{"a":' + DEEP],
    "model.safetensors.index.json": [b"", b"[]", b"{}", DEEP, b'{"weight_map": []}', b'{"weight_map": {"a": ["b"]}}'],
    "weights.sha256": [b"\xff\xfe", b"one", b"zz  model.safetensors"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in DAMAGE for content in DAMAGE[name]])
def test_damaged_json_is_one_line(tmp_path, name, content):
    directory = make(tmp_path / "hf")
    (directory / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        HfCheckpoint(directory).verify_digests()
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        DEEP,
        b'{"a": ' + DEEP,
        b"[]",
        b"null",
        b"\xff" * 9,
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"a": []}',
    ],
)
def test_a_damaged_header_is_one_line(tmp_path, header):
    directory = make(tmp_path / "hf")
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged header; fetch the file again"):
        HfCheckpoint(directory)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "32"}, {"hidden_size": 32.5}, {"num_layers": True}, {"rope_scaling": []}, {"family": []}]
)
def test_an_edited_model_description_is_refused(change):
    fields = ModelConfig(preset="tiny-llama", **FIELDS).resolve().to_dict()
    if change == {"rope_scaling": []}:
        change = {"rope_scaling": ["llama3"]}
    with pytest.raises(UserError, match="model: "):
        ModelSpec.from_dict(fields | change)
    assert ModelSpec.from_dict(fields).to_dict() == fields
