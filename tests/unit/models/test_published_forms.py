"""Checkpoints in forms other than one safetensors file: pickled tensors, FP8 in blocks, the hub's cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from test_field_checkpoints import make

from megatron_s2d.config.hf_config import hf_config_from_spec, spec_from_directory
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.conversion.convert import check_conversion, hf_to_megatron, megatron_to_hf
from megatron_s2d.errors import UserError
from megatron_s2d.models.hf_checkpoint import HfCheckpoint

BLOCK = (16, 32)


def pickled(directory, **options):
    """The same checkpoint with its weights in a ``.bin`` file."""
    tensors = load_file(make(directory) / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin", **options)
    return tensors


def test_pickled_tensors_are_read_slice_by_slice(tmp_path):
    tensors = pickled(tmp_path / "hf")
    checkpoint = HfCheckpoint(tmp_path / "hf")
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert torch.equal(checkpoint.read(name, tensor.dim() - 1, 2, 5), tensor.narrow(tensor.dim() - 1, 2, 3))
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    check_conversion(tmp_path / "hf", tmp_path / "megatron")


def test_pickled_shards_have_an_index(tmp_path):
    tensors = pickled(tmp_path / "hf")
    names = sorted(tensors)
    parts = {"a.bin": names[:4], "b.bin": names[4:]}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, tmp_path / "hf" / file)
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    path = tmp_path / "hf" / "pytorch_model.bin.index.json"
    path.write_text(json.dumps(index))
    assert torch.equal(HfCheckpoint(tmp_path / "hf").read(names[5]), tensors[names[5]])
    index["weight_map"][names[0]] = "model.safetensors"
    save_file({}, tmp_path / "hf" / "c.safetensors")
    path.write_text(json.dumps(index).replace("model.safetensors", "c.safetensors"))
    with pytest.raises(UserError, match=r"names c\.safetensors, which is not a \.bin file"):
        HfCheckpoint(tmp_path / "hf")


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_does_not_run(tmp_path):
    pickled(tmp_path / "hf")
    torch.save({"model.norm.weight": Harmful(tmp_path / "harm")}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read as tensors alone") as caught:
        HfCheckpoint(tmp_path / "hf")
    assert "\n" not in str(caught.value) and not (tmp_path / "harm").exists()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Harmful(tmp_path / "harm")}))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: "):
        HfCheckpoint(tmp_path / "hf")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [{"a": 3}, [torch.ones(2)], {"a": torch.ones(2, dtype=torch.int8)}])
def test_pickles_of_other_things_are_refused(tmp_path, content):
    pickled(tmp_path / "hf")
    torch.save(content, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not a tensor of dtype"):
        HfCheckpoint(tmp_path / "hf")


def test_pickles_of_old_versions_are_refused(tmp_path):
    pickled(tmp_path / "hf", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"written by PyTorch before 1\.6"):
        HfCheckpoint(tmp_path / "hf")


def in_fp8(directory, **config) -> dict[str, torch.Tensor]:
    """Make a checkpoint with its projections in FP8; return their values by transformers' own dequantisation."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    quantization = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "fmt": "e4m3"}
    make(directory, config={"torch_dtype": "bfloat16", "quantization_config": quantization | config})
    tensors, expected = load_file(directory / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if "_proj" not in name:
            tensors[name] = tensor.bfloat16()
            continue
        rows, columns = tensor.shape
        tensors[name] = (30 * tensor).to(torch.float8_e4m3fn)
        scales = (
            torch.rand(rows // BLOCK[0], columns // BLOCK[1]) if rows % BLOCK[0] == columns % BLOCK[1] == 0 else None
        )
        if scales is None:
            del tensors[name]
            tensors[name] = tensor.bfloat16()  # not in blocks, as published checkpoints leave out some modules
            continue
        tensors[f"{name}_scale_inv"] = scales
        expected[name] = Fp8Dequantize(None)._dequantize_one(tensors[name], scales, torch.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    return expected


def test_fp8_blocks_are_dequantised_as_transformers_does(tmp_path):
    expected = in_fp8(tmp_path / "hf")
    assert len(expected) > 4
    checkpoint = HfCheckpoint(tmp_path / "hf")
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert torch.equal(checkpoint.read(name, 0, 3, 14), tensor[3:14])
        assert torch.equal(checkpoint.read(name, 1, 5, 32), tensor[:, 5:32])
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", tensor_model_parallel_size=2)
    check_conversion(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = HfCheckpoint(tmp_path / "back")
    assert all(torch.equal(back.read(name), tensor) for name, tensor in expected.items())
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_a_block_at_the_edge_may_be_smaller(tmp_path):
    from megatron_s2d.models.dequantize import dequantize_blocks

    values, scales = torch.randn(5, 7).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])
    expected = values.float() * scales[torch.tensor([0, 0, 1, 1, 2])][:, torch.tensor([0, 0, 0, 0, 1, 1, 1])]
    assert torch.equal(dequantize_blocks(values, scales, (2, 4), 0, torch.float32), expected)
    assert torch.equal(dequantize_blocks(values[3:], scales, (2, 4), 3, torch.float32), expected[3:])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq"}, "quantization_config with method 'gptq' is not supported"),
        ({"weight_block_size": None}, "weight_block_size None"),
        ({"weight_block_size": [16]}, r"weight_block_size \[16\]"),
        ({"fmt": "e5m2"}, "not of fmt e4m3"),
        ({"scale_fmt": "ue8m0"}, "with scales in float"),
        ({"weight_block_size": [8, 8]}, "_scale_inv is .* need"),
    ],
)
def test_other_quantisations_are_refused_before_anything_is_written(tmp_path, config, words):
    in_fp8(tmp_path / "hf", **config)
    with pytest.raises(UserError, match=words):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_fp8_without_scales_is_refused(tmp_path):
    in_fp8(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    del tensors[name]
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=f"is in FP8, and there is no {name}"):
        HfCheckpoint(tmp_path / "hf")


def test_the_cache_of_the_hub_is_read_through_its_links(tmp_path):
    source = make(tmp_path / "source")
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in source.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (cache / "blobs" / digest).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    checkpoint = HfCheckpoint(snapshot)
    assert checkpoint.verify_digests() == 1
    hf_to_megatron(snapshot, tmp_path / "megatron")
    assert not (tmp_path / "megatron" / "hf" / "config.json").is_symlink()
    with pytest.raises(UserError, match=r"no config\.json\); did you mean .*snapshots/abc"):
        HfCheckpoint(cache)
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="corrupted"):
        HfCheckpoint(snapshot).verify_digests()


def test_a_name_on_the_hub_is_told_how_to_become_a_directory():
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen3-8B --local-dir DIR, and give DIR"):
        spec_from_directory("Qwen/Qwen3-8B")
    with pytest.raises(UserError, match=r"no config\.json\)$"):
        spec_from_directory("/no/such/directory")


def gpt_oss(directory):
    """A checkpoint with fused experts, as transformers saves it, and its values by the names of single experts."""
    spec = dataclasses.replace(ModelConfig(preset="tiny-gpt-oss", vocab_size=61).resolve(), num_layers=2)
    directory.mkdir()
    document = hf_config_from_spec(spec, "bfloat16")
    (directory / "config.json").write_text(json.dumps(document))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory)).bfloat16()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    return spec, tensors


def in_mxfp4(directory, tensors) -> dict[str, torch.Tensor]:
    """Put random MXFP4 in place of the experts' matrices; return their values by transformers' own dequantisation."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator, expected = torch.Generator().manual_seed(1), {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(90, 150, (experts, out, width // 32), dtype=torch.uint8, generator=generator)
        scales[0, 0, 0], scales[0, 1, 0] = 0, 254  # the smallest and the largest exponent
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, directory / "model.safetensors")
    document = json.loads((directory / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(document))
    return expected


def test_mxfp4_is_dequantised_as_transformers_does(tmp_path):
    spec, tensors = gpt_oss(tmp_path / "hf")
    expected = in_mxfp4(tmp_path / "hf", tensors)
    checkpoint = HfCheckpoint(tmp_path / "hf")
    assert checkpoint.spec == spec and len(expected) == 2 * spec.num_layers
    for name, fused in expected.items():
        prefix = name.rpartition(".")[0]
        for expert in range(spec.num_experts):
            if name.endswith("down_proj"):
                parts = {"down_proj": fused[expert].T}
            else:
                parts = {"gate_proj": fused[expert, :, ::2].T, "up_proj": fused[expert, :, 1::2].T}
            for module, values in parts.items():
                read = checkpoint.read(f"{prefix}.{expert}.{module}.weight")
                assert torch.equal(read.view(torch.int16), values.contiguous().view(torch.int16)), (name, module)
                assert torch.equal(checkpoint.read(f"{prefix}.{expert}.{module}.weight", 0, 3, 9), read[3:9])
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", tensor_model_parallel_size=2)
    check_conversion(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == {name.removesuffix("_blocks") for name in tensors if not name.endswith("_scales")}
    assert all(torch.equal(back[name].view(torch.int16), values.view(torch.int16)) for name, values in expected.items())
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    assert torch.equal(loaded.state_dict()["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, n: t.pop(n + "_scales"), "gate_up_proj_scales is missing"),
        (lambda t, n: t.pop("model.layers.1.mlp.experts.down_proj_bias"), "down_proj_bias is missing"),
        (lambda t, n: t.update({n + "_blocks": t[n + "_blocks"][:, :4]}), "gate_up_proj_blocks is .* the model needs"),
        (lambda t, n: t.update({n + "_scales": t[n + "_scales"].float()}), "are not U8"),
        (lambda t, n: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.uint8)}), "lm_head.weight has dtype U8"),
        (lambda t, n: t.update({"model.layers.0.mlp.experts.more": torch.ones(2)}), "does not belong to a gpt_oss"),
    ],
)
def test_damaged_mxfp4_is_refused(tmp_path, change, words):
    _, tensors = gpt_oss(tmp_path / "hf")
    in_mxfp4(tmp_path / "hf", tensors)
    change(tensors, "model.layers.0.mlp.experts.gate_up_proj")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=words):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_mxfp4_of_other_families_is_refused(tmp_path):
    make(tmp_path / "hf", config={"quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(UserError, match="quantization_config with method 'mxfp4' is not supported"):
        HfCheckpoint(tmp_path / "hf")
