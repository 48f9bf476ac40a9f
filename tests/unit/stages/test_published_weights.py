"""Weights under a model's ``path``: Hugging Face or Megatron, and a stage that refers to them without a copy."""

import json

import pytest
import torch

from megatron_s2d.artifacts.files import tree_digest
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.base import parse
from megatron_s2d.config.hf_config import hf_config_from_spec
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.conversion.convert import hf_to_megatron
from megatron_s2d.conversion.hf_writer import HfWriter, PlannedTensor
from megatron_s2d.data.tokenizer import stop_token_ids
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import hf_tensor_shapes
from megatron_s2d.models.published import check_files
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.stages.context import StageContext
from megatron_s2d.stages.weights import run_load_checkpoint


@pytest.fixture
def hf(tmp_path):
    """A random model as a Hugging Face directory, without tokenizer."""
    spec = ModelConfig(preset="tiny-llama", vocab_size=32, num_layers=2).resolve()
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in hf_tensor_shapes(spec)}
    directory = tmp_path / "hf"
    directory.mkdir()
    writer = HfWriter(directory, [PlannedTensor(k, v.dtype, tuple(v.shape)) for k, v in tensors.items()], 10**9)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    (directory / "config.json").write_text(json.dumps(hf_config_from_spec(spec, "float32")))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    return directory


def context_of(path, folder, stage="base") -> StageContext:
    document = {
        "name": "toy", "tokenizer": "task:modular_arithmetic", "precision": "float32",
        "models": {"published": {"path": str(path)}},
        "data": {"eval": {"type": "task", "split": "eval", "num_prompts": 4}},
        "stages": {stage: {"type": "load_checkpoint", "role": stage, "model": "published"}},
        "arms": {"arm": stage}, "evaluation": {"prompts": "eval"},
    }  # fmt: skip
    initialize_distributed()
    directory = StageDirectory(folder / stage)
    directory.path.mkdir(exist_ok=True)
    return StageContext.create(
        parse(WorkflowConfig, document, "toy"), stage, directory=directory, inputs={stage: directory},
        layout=build_layout(ParallelConfig()), tokenizer_cache=folder / "tokenizer",
    )  # fmt: skip


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_loaded_checkpoint_is_a_reference_without_a_copy(hf, tmp_path):
    context = context_of(hf, tmp_path)
    run_load_checkpoint(context)
    model_path = context.directory.model_path
    assert sum(path.stat().st_size for path in model_path.rglob("*") if path.is_file()) < 50_000
    assert (model_path / "hf" / "tokenizer.json").exists() and (model_path / "hf" / "generation_config.json").exists()
    loaded = weights(context.models.frozen("base"))
    assert all(map(torch.equal, loaded, weights(context.models.fresh("published"))))
    digest = tree_digest(model_path)
    run_load_checkpoint(context)  # as after a kill
    assert tree_digest(model_path) == digest

    (shard,) = hf.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors has changed since .*base/model was written"):
        context.models.frozen("base")


def test_a_megatron_checkpoint_is_a_path_too(hf, tmp_path):
    hf_to_megatron(hf, tmp_path / "megatron")
    check_files(tmp_path / "megatron")
    context = context_of(tmp_path / "megatron", tmp_path)
    expected = weights(context_of(hf, tmp_path, "other").models.fresh("published"))
    assert all(map(torch.equal, weights(context.models.fresh("published")), expected))
    run_load_checkpoint(context)
    assert all(map(torch.equal, weights(context.models.frozen("base")), expected))
    tokenizer = context.inputs.tokenizer
    ends = {tokenizer.eos_token_id, 1, 7}
    assert set(stop_token_ids(tokenizer, tmp_path / "megatron")) == ends == set(stop_token_ids(tokenizer, hf))
    (tmp_path / "megatron" / "integrity.json").unlink()
    with pytest.raises(UserError, match="not a complete Megatron checkpoint"):
        check_files(tmp_path / "megatron")
