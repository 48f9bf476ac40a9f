"""Round trips, refusals and interruptions of checkpoint conversion, on small random checkpoints."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import pickle
import shutil

import pytest

torch = pytest.importorskip("torch")

from megatron_s2d.config.base import UserError  # noqa: E402
from megatron_s2d.config.hf_config import hf_config_from_spec, spec_from_directory  # noqa: E402
from megatron_s2d.config.model import ModelConfig  # noqa: E402
from megatron_s2d.config.parallel import ParallelConfig  # noqa: E402
from megatron_s2d.conversion import cli, convert  # noqa: E402
from megatron_s2d.conversion.files import HashedFile  # noqa: E402
from megatron_s2d.conversion.global_tensors import boxes, pieces  # noqa: E402
from megatron_s2d.conversion.hf_writer import HfWriter, PlannedTensor  # noqa: E402
from megatron_s2d.conversion.megatron_format import MegatronReader  # noqa: E402
from megatron_s2d.models.families import hf_tensor_shapes  # noqa: E402
from megatron_s2d.models.hf_checkpoint import HfCheckpoint  # noqa: E402

MODELS = {
    "qwen3": ("tiny-teacher", {"vocab_size": 101, "num_query_groups": 2, "head_dim": 40, "num_layers": 4}),
    "llama": ("tiny-llama", {"vocab_size": 83}),
    "moe": ("tiny-moe", {"vocab_size": 67}),
}
LAYOUTS = {"one": {}, "tp2pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}}


def make_hf(directory, name="qwen3", dtype=torch.bfloat16, max_shard_bytes=10**9, change=None):
    """A random checkpoint; bytes are drawn too, so infinities, NaNs and subnormal numbers occur."""
    preset, fields = MODELS[name]
    spec = ModelConfig(preset=preset, **fields).resolve()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for tensor_name, shape in hf_tensor_shapes(spec):
        count = torch.Size(shape).numel() * dtype.itemsize
        content = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        tensors[tensor_name] = content.view(dtype).view(shape)
    if change is not None:
        change(tensors)
    directory.mkdir(parents=True)
    plan = [PlannedTensor(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    writer = HfWriter(directory, plan, max_shard_bytes)
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    writer.finish()
    document = {**hf_config_from_spec(spec, str(dtype).removeprefix("torch.")), "_name_or_path": "kept"}
    (directory / "config.json").write_text(json.dumps(document))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "training_args.bin").write_bytes(b"not to be copied")
    return directory


def same_bytes(left, right) -> None:
    a, b = HfCheckpoint(left), HfCheckpoint(right)
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert a.tensors[name].dtype == b.tensors[name].dtype
        assert torch.equal(a.read(name).view(torch.uint8), b.read(name).view(torch.uint8)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_exact(tmp_path, name, dtype, layout):
    source = make_hf(tmp_path / "hf", name, dtype, max_shard_bytes=60_000)
    assert len(HfCheckpoint(source).shards) > 1
    sizes = dict(LAYOUTS[layout])
    if name == "moe":
        sizes["expert_model_parallel_size"] = 2
    convert.import_checkpoint(source, tmp_path / "megatron", **sizes)
    assert MegatronReader(tmp_path / "megatron").tensor_chunks() == sizes.get("tensor_model_parallel_size", 1)
    convert.export_checkpoint(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=80_000)
    same_bytes(source, tmp_path / "back")
    assert spec_from_directory(tmp_path / "back") == spec_from_directory(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["_name_or_path"] == "kept"
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert not (tmp_path / "back" / "training_args.bin").exists()
    assert convert.check_conversion(source, tmp_path / "megatron").num_tensors == len(HfCheckpoint(source).tensors)


def test_safetensors_library_reads_the_export(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = make_hf(tmp_path / "hf", max_shard_bytes=60_000)
    checkpoint = HfCheckpoint(source)
    found = {}
    for shard in checkpoint.shards:
        assert shard.stat().st_size < 60_000 + 20_000
        found.update(safetensors.load_file(shard))
    assert found.keys() == checkpoint.tensors.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.uint8), checkpoint.read(name).view(torch.uint8))


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_chunks_are_those_that_megatron_writes(name, tmp_path):
    """The table of global tensors against ``sharded_state_dict`` of a live model."""
    from megatron_s2d.models.build import build_model
    from megatron_s2d.parallel import layout as layouts
    from megatron_s2d.parallel.checkpoint import load_checkpoint, save_checkpoint

    preset, fields = MODELS[name]
    spec = ModelConfig(preset=preset, **fields).resolve()
    layouts.initialize_distributed()
    layout = layouts.build_layout(ParallelConfig())
    chunks = build_model(spec, layout, seed=4)
    save_checkpoint(tmp_path / "trained", chunks, layout, model_spec=spec.to_dict(), position={"step": 7, "updates": 7})
    entries = MegatronReader(tmp_path / "trained").entries
    expected: dict[str, set] = {}
    for piece in pieces(spec):
        for offset, size in boxes(piece, 1):
            ones = (1,) * len(piece.leading)
            expected.setdefault(piece.key, set()).add(((*piece.leading, *offset), (*ones, *size)))
        assert tuple(entries[piece.key].size) == piece.global_shape
    found = {
        key: {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks} for key, entry in entries.items()
    }
    assert found == expected

    convert.export_checkpoint(tmp_path / "trained", tmp_path / "hf")
    convert.check_conversion(tmp_path / "hf", tmp_path / "trained")
    convert.import_checkpoint(tmp_path / "hf", tmp_path / "again", tensor_model_parallel_size=2)
    others = build_model(spec, layout, seed=5)
    load_checkpoint(tmp_path / "again", others, layout, model_spec=spec.to_dict())
    for (key, parameter), other in zip(chunks[0].named_parameters(), others[0].parameters(), strict=True):
        assert torch.equal(parameter, other), key


def renamed(tensors):
    tensors["model.layers.0.mlp.extra.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")


def reshaped(tensors):
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"][:-1]


def extra(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(4, dtype=torch.bfloat16)


def mixed(tensors):
    tensors["model.layers.2.self_attn.k_proj.weight"] = tensors["model.layers.2.self_attn.k_proj.weight"].half()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, "model.layers.0.mlp.up_proj.weight is missing"),
        (reshaped, "model.layers.1.self_attn.k_proj.weight is (79, 96), the model needs (80, 96)"),
        (extra, "model.layers.0.self_attn.q_proj.bias does not belong"),
        (mixed, "k_proj.weight and model.layers.2.self_attn.v_proj.weight are fused, but differ in dtype"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path, change, words):
    source = make_hf(tmp_path / "hf", change=change)
    refused(tmp_path, words, lambda: convert.import_checkpoint(source, tmp_path / "megatron"))


def refused(tmp_path, words, action) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        action()
    assert words in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_truncated_shard(tmp_path):
    source = make_hf(tmp_path / "hf", max_shard_bytes=60_000)
    shard = HfCheckpoint(source).shards[2]
    content = shard.read_bytes()
    for length in (len(content) - 1, 200, 5):
        shard.write_bytes(content[:length])
        refused(tmp_path, str(shard), lambda: convert.import_checkpoint(source, tmp_path / "megatron"))
    shard.write_bytes(content + b"\0")
    refused(tmp_path, str(shard), lambda: convert.import_checkpoint(source, tmp_path / "megatron"))
    shard.unlink()
    refused(tmp_path, shard.name, lambda: convert.import_checkpoint(source, tmp_path / "megatron"))


def flip(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_corrupted_shard_with_a_recorded_digest(tmp_path):
    source = make_hf(tmp_path / "hf")
    flip(source / "model.safetensors", 50_000)
    refused(tmp_path, "SHA-256", lambda: convert.import_checkpoint(source, tmp_path / "megatron"))
    # The note that the hub's client leaves beside a download serves as well.
    digest = (source / "weights.sha256").read_text().split()[0]
    (source / "weights.sha256").unlink()
    note = source / ".cache/huggingface/download/model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")
    refused(tmp_path, "SHA-256", lambda: convert.import_checkpoint(source, tmp_path / "megatron"))


def test_index_that_disagrees(tmp_path):
    source = make_hf(tmp_path / "hf", max_shard_bytes=60_000)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = {**index["weight_map"], "model.norm.weight": index["weight_map"]["model.embed_tokens.weight"]}
    path.write_text(json.dumps({**index, "weight_map": moved}))
    refused(tmp_path, "model.norm.weight", lambda: HfCheckpoint(source))
    path.write_text(json.dumps({**index, "weight_map": {**moved, "model.norm.weight": "../secret.safetensors"}}))
    refused(tmp_path, "outside the directory", lambda: HfCheckpoint(source))


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata"])
def test_corrupted_megatron_checkpoint(tmp_path, victim):
    convert.import_checkpoint(make_hf(tmp_path / "hf"), tmp_path / "megatron")
    flip(tmp_path / "megatron" / victim, 2000)
    refused(tmp_path, victim, lambda: convert.export_checkpoint(tmp_path / "megatron", tmp_path / "back"))
    (tmp_path / "megatron" / victim).unlink()
    refused(tmp_path, victim, lambda: convert.export_checkpoint(tmp_path / "megatron", tmp_path / "back"))


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_hostile_metadata_is_not_executed(tmp_path, capsys):
    convert.import_checkpoint(make_hf(tmp_path / "hf"), tmp_path / "megatron")
    content = pickle.dumps(Hostile())
    (tmp_path / "megatron" / ".metadata").write_bytes(content)
    manifest = tmp_path / "megatron" / "integrity.json"
    document = json.loads(manifest.read_text())
    document["files"][".metadata"] = hashlib.sha256(content).hexdigest()
    manifest.write_text(json.dumps(document))
    refused(tmp_path, "builtins.print", lambda: MegatronReader(tmp_path / "megatron"))
    assert "executed" not in capsys.readouterr().out


def test_existing_target_and_foreign_directories(tmp_path):
    source = make_hf(tmp_path / "hf")
    (tmp_path / "taken").mkdir()
    refused(tmp_path, "already exists", lambda: convert.import_checkpoint(source, tmp_path / "taken"))
    refused(tmp_path, "no config.json", lambda: convert.import_checkpoint(tmp_path / "taken", tmp_path / "m"))
    refused(tmp_path, "not a Megatron checkpoint", lambda: convert.export_checkpoint(source, tmp_path / "m"))
    refused(
        tmp_path,
        "num_attention_heads 4 cannot be divided by tensor_model_parallel_size 3",
        lambda: convert.import_checkpoint(source, tmp_path / "m", tensor_model_parallel_size=3),
    )


@pytest.mark.parametrize("direction", ["import", "export"])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, direction):
    source = make_hf(tmp_path / "hf")
    if direction == "export":
        convert.import_checkpoint(source, tmp_path / "megatron")
    seen = []

    write = HashedFile.write

    def fill_up(file, content):
        seen.append(1)
        if len(seen) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(HashedFile, "write", fill_up)
    if direction == "import":
        refused(tmp_path, "no space left", lambda: convert.import_checkpoint(source, tmp_path / "megatron"))
    else:
        refused(tmp_path, "no space left", lambda: convert.export_checkpoint(tmp_path / "megatron", tmp_path / "back"))
    assert seen


def test_what_a_killed_conversion_leaves_does_not_load(tmp_path, monkeypatch):
    """As after kill -9: no clean-up runs, the unfinished directory stays."""
    source = make_hf(tmp_path / "hf", max_shard_bytes=60_000)
    convert.import_checkpoint(source, tmp_path / "megatron")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        patch.setattr(convert.MegatronWriter, "finish", killed)
        patch.setattr(convert.HfWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            convert.import_checkpoint(source, tmp_path / "m2")
        with pytest.raises(KeyboardInterrupt):
            convert.export_checkpoint(tmp_path / "megatron", tmp_path / "h2", max_shard_bytes=60_000)
    left = [path for path in tmp_path.iterdir() if path.name not in ("hf", "megatron")]
    assert len(left) == 2 and not (tmp_path / "m2").exists() and not (tmp_path / "h2").exists()
    for path in left:
        with pytest.raises(UserError):
            convert.inspect_checkpoint(path)
    convert.import_checkpoint(source, tmp_path / "m2")
    convert.check_conversion(source, tmp_path / "m2")


def killed(*_):
    raise KeyboardInterrupt


def test_check_names_what_differs(tmp_path):
    source = make_hf(tmp_path / "hf", dtype=torch.float32)
    convert.import_checkpoint(source, tmp_path / "megatron")

    def change(tensors):
        tensors["model.layers.3.mlp.down_proj.weight"].view(torch.int32)[5, 7] ^= 1

    other = make_hf(tmp_path / "other", dtype=torch.float32, change=change)
    with pytest.raises(UserError, match="model.layers.3.mlp.down_proj.weight: differs"):
        convert.check_conversion(other, tmp_path / "megatron")
    with pytest.raises(UserError, match="different models: family is llama in"):
        convert.check_conversion(make_hf(tmp_path / "llama", "llama", torch.float32), tmp_path / "megatron")


def test_logits_comparison_sees_a_swapped_tensor(tmp_path):
    pytest.importorskip("transformers")
    from megatron_s2d.conversion.logits import compare_logits

    def small(tensors):
        generator = torch.Generator().manual_seed(2)
        for tensor in tensors.values():
            tensor.normal_(1.0 if tensor.dim() == 1 else 0.0, 0.1, generator=generator)

    def swapped(tensors):
        small(tensors)
        first, second = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    good = make_hf(tmp_path / "good", dtype=torch.float32, change=small)
    bad = make_hf(tmp_path / "bad", dtype=torch.float32, change=swapped)
    convert.import_checkpoint(good, tmp_path / "megatron", tensor_model_parallel_size=2)
    found = compare_logits(good, tmp_path / "megatron")
    assert found.max_difference < 1e-4 and found.standard_deviation > 0.3
    with pytest.raises(UserError, match="logits differ"):
        compare_logits(bad, tmp_path / "megatron")


def test_commands(tmp_path, capsys):
    source = make_hf(tmp_path / "hf", "moe")
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser.add_subparsers(dest="command"))

    def s2d(*arguments):
        cli.run(parser.parse_args(["convert", *map(str, arguments)]))
        return capsys.readouterr().out

    s2d("import", source, tmp_path / "m", "--expert-model-parallel-size", "2", "--no-progress")
    s2d("export", tmp_path / "m", tmp_path / "back", "--max-shard-size", "100KB", "--no-progress")
    found = json.loads(s2d("inspect", tmp_path / "m", "--json"))
    assert found["layout"]["expert_model_parallel_size"] == 2 and found["dtypes"] == ["bfloat16"]
    assert found["num_parameters"] == spec_from_directory(source).num_parameters
    assert found["digest"] == json.loads(s2d("inspect", tmp_path / "m", "--json"))["digest"]
    assert "format: huggingface" in s2d("inspect", tmp_path / "back", "--no-progress")
    printed = s2d("check", tmp_path / "back", tmp_path / "m", "--skip-logits", "--no-progress")
    assert "equal bit by bit" in printed and "not compared" in printed
    assert (cli.parse_size("5GB"), cli.parse_size("2KiB"), cli.parse_size("7")) == (5 * 10**9, 2048, 7)
    with pytest.raises(argparse.ArgumentTypeError):
        cli.parse_size("5 apples")
