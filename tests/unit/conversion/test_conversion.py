"""Round trips, refusals and interruptions of checkpoint conversion, on small random checkpoints."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import pickle

import pytest
import torch

from megatron_s2d.config.hf_config import hf_config_from_spec, spec_from_directory
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.conversion import cli, convert
from megatron_s2d.conversion.files import HashedFile
from megatron_s2d.conversion.global_tensors import boxes, pieces
from megatron_s2d.conversion.hf_writer import HfWriter, PlannedTensor
from megatron_s2d.conversion.megatron_format import MegatronReader
from megatron_s2d.errors import UserError
from megatron_s2d.models.families import hf_tensor_shapes
from megatron_s2d.models.hf_checkpoint import HfCheckpoint

MODELS = {
    "qwen3": ("tiny-teacher", {"vocab_size": 101, "num_query_groups": 2, "head_dim": 40, "num_layers": 4}),
    "llama": ("tiny-llama", {"vocab_size": 83}),
    "moe": ("tiny-moe", {"vocab_size": 67}),
}
LAYOUTS = {"tp1pp1": (1, 1), "tp2pp2": (2, 2), "tp4pp1": (4, 1)}


def make_hf(directory, name="qwen3", dtype=torch.bfloat16, max_shard_bytes=10**9, change=None, **more):
    """Write a random checkpoint of random bytes, so infinities, NaNs and subnormal numbers occur.

    ``change`` edits the tensors before they are written, ``more`` replaces fields of the model.
    """
    preset, fields = MODELS[name][0], {**MODELS[name][1], **more}
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
    changes = {"_name_or_path": "original", "eos_token_id": [3, 5]}
    document = hf_config_from_spec(spec, str(dtype).removeprefix("torch.")) | changes
    (directory / "config.json").write_text(json.dumps(document))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "generation_config.json").write_text('{"top_k": 17}')
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
    sizes = dict(zip(("tensor_model_parallel_size", "pipeline_model_parallel_size"), LAYOUTS[layout], strict=True))
    if name == "moe":
        sizes["expert_model_parallel_size"] = 4
    convert.hf_to_megatron(source, tmp_path / "megatron", **sizes)
    assert convert.inspect_checkpoint(tmp_path / "megatron")["layout"] == sizes
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=80_000)
    same_bytes(source, tmp_path / "back")
    assert spec_from_directory(tmp_path / "back") == spec_from_directory(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["_name_or_path"] == "original"
    for file in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    assert not (tmp_path / "back" / "training_args.bin").exists()
    assert convert.check_conversion(source, tmp_path / "megatron").num_tensors == len(HfCheckpoint(source).tensors)


def test_safetensors_library_reads_the_converted_checkpoint(tmp_path):
    """Shards respect the size limit unless they hold a single tensor, and the index matches the library's."""
    safetensors = pytest.importorskip("safetensors.torch")
    convert.hf_to_megatron(make_hf(tmp_path / "hf"), tmp_path / "megatron")
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=20_000)
    checkpoint = HfCheckpoint(tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.num_bytes
    loaded, num_large = {}, 0
    for shard in checkpoint.shards:
        tensors = safetensors.load_file(shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
        num_large += size > 20_000
        assert {index["weight_map"][name] for name in tensors} == {shard.name}
        loaded.update(tensors)
    assert 0 < num_large < len(checkpoint.shards)
    assert loaded.keys() == checkpoint.tensors.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor.view(torch.uint8), checkpoint.read(name).view(torch.uint8))


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_chunks_equal_those_of_megatron(name, tmp_path):
    """The table of global tensors against ``sharded_state_dict`` of a live model."""
    from megatron_s2d.models.build import build_model
    from megatron_s2d.parallel import layout as layouts
    from megatron_s2d.parallel.checkpoint import load_checkpoint, start_saving

    preset, fields = MODELS[name]
    spec = ModelConfig(preset=preset, **fields).resolve()
    layouts.initialize_distributed()
    layout = layouts.build_layout(ParallelConfig())
    chunks = build_model(spec, layout, seed=4)
    start_saving(
        tmp_path / "trained", chunks, layout, model_spec=spec.to_dict(), trainer_state={"step": 7, "updates": 7}
    ).finish()
    entries = MegatronReader(tmp_path / "trained").entries
    expected: dict[str, set] = {}
    for piece in pieces(spec):
        for offset, size in boxes(piece, 1):
            ones = (1,) * len(piece.leading)
            expected.setdefault(piece.key, set()).add(((*piece.leading, *offset), (*ones, *size)))
        assert tuple(entries[piece.key].size) == piece.global_shape
    stored = {
        key: {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks} for key, entry in entries.items()
    }
    assert stored == expected

    done = convert.megatron_to_hf(tmp_path / "trained", tmp_path / "hf")
    assert "--assets" in done.notes[0]
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {"_from_model_config": True}
    convert.check_conversion(tmp_path / "hf", tmp_path / "trained")
    convert.hf_to_megatron(tmp_path / "hf", tmp_path / "again", tensor_model_parallel_size=2)
    others = build_model(spec, layout, seed=5)
    load_checkpoint(tmp_path / "again", others, layout, model_spec=spec.to_dict())
    for (key, parameter), other in zip(chunks[0].named_parameters(), others[0].parameters(), strict=True):
        assert torch.equal(parameter, other), key


def test_transformers_loads_a_converted_run_with_its_tokenizer(tmp_path):
    """A run's checkpoint has no Hugging Face files, its tokenizer directory no ``config.json``: both are made."""
    transformers = pytest.importorskip("transformers")
    from megatron_s2d.data.tokenizer import load_tokenizer
    from megatron_s2d.models.build import build_model
    from megatron_s2d.parallel import layout as layouts
    from megatron_s2d.parallel.checkpoint import start_saving

    tokenizer = load_tokenizer("task:modular_arithmetic", tmp_path)
    spec = ModelConfig(preset="tiny-student").resolve(len(tokenizer))
    layouts.initialize_distributed()
    layout = layouts.build_layout(ParallelConfig())
    chunks = build_model(spec, layout, seed=4)
    position = {"step": 7, "updates": 7}
    start_saving(tmp_path / "trained", chunks, layout, model_spec=spec.to_dict(), trainer_state=position).finish()
    done = convert.megatron_to_hf(tmp_path / "trained", tmp_path / "hf", assets=tmp_path / "modular_arithmetic")
    assert not done.notes
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.chat_template == tokenizer.chat_template
    tokens = torch.randint(0, spec.vocab_size, (2, 9))
    with layout.active(), torch.no_grad():
        logits = chunks[0].eval()(tokens, torch.arange(9).expand(2, 9), None)[..., : spec.vocab_size]
        torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-4)


def test_stored_copy_of_a_tied_output_layer(tmp_path):
    """As Qwen3 0.6B and 1.7B are published. It has to equal the embedding, and is not stored again."""

    def twice(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def twice_but_one_bit(tensors):
        twice(tensors)
        tensors["lm_head.weight"].view(torch.int16)[-1, -1] ^= 1

    source = make_hf(tmp_path / "hf", change=twice, tie_word_embeddings=True, max_shard_bytes=60_000)
    other = make_hf(tmp_path / "other", change=twice_but_one_bit, tie_word_embeddings=True)
    convert.hf_to_megatron(source, tmp_path / "megatron")
    convert.check_conversion(source, tmp_path / "megatron")
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    same_bytes(source, tmp_path / "back")
    assert "lm_head" not in (tmp_path / "back" / "model.safetensors").read_bytes()[:20_000].decode(errors="replace")
    assert_error(tmp_path, "lm_head.weight differs", lambda: convert.hf_to_megatron(other, tmp_path / "m"))


def test_tensor_parallel_size_with_more_vocabulary_padding(tmp_path):
    """At 3 tensor ranks 101 rows become 120, at one 104; both load at one, and both give the same export."""
    from megatron_s2d.models.build import build_model
    from megatron_s2d.models.weights import import_weights
    from megatron_s2d.parallel import layout as layouts
    from megatron_s2d.parallel.checkpoint import load_checkpoint

    fields = {"num_attention_heads": 6, "num_query_groups": 3, "ffn_hidden_size": 252}
    source = make_hf(tmp_path / "hf", dtype=torch.float32, change=small, **fields)
    convert.hf_to_megatron(source, tmp_path / "megatron", tensor_model_parallel_size=3)
    reader = MegatronReader(tmp_path / "megatron")
    assert tuple(reader.entries["model.output_layer.weight"].size) == (120, 96)
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    same_bytes(source, tmp_path / "back")
    layouts.initialize_distributed()
    layout = layouts.build_layout(ParallelConfig())
    loaded, live = (build_model(reader.spec, layout, seed=seed) for seed in (1, 2))
    load_checkpoint(tmp_path / "megatron", loaded, layout, model_spec=reader.spec.to_dict())
    import_weights(live, reader.spec, layout, HfCheckpoint(source))
    for (key, parameter), other in zip(loaded[0].named_parameters(), live[0].parameters(), strict=True):
        assert torch.equal(parameter, other), key


def small(tensors):  # values that a model can compute with
    generator = torch.Generator().manual_seed(2)
    for tensor in tensors.values():
        tensor.normal_(1.0 if tensor.dim() == 1 else 0.0, 0.1, generator=generator)


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
    assert_error(tmp_path, words, lambda: convert.hf_to_megatron(source, tmp_path / "megatron"))


def assert_error(tmp_path, words, action) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        action()
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_truncated_shard(tmp_path):
    source = make_hf(tmp_path / "hf", max_shard_bytes=60_000)
    shard = HfCheckpoint(source).shards[2]
    content = shard.read_bytes()
    for length in (len(content) - 1, 200, 5):
        shard.write_bytes(content[:length])
        assert_error(tmp_path, str(shard), lambda: convert.hf_to_megatron(source, tmp_path / "megatron"))
    shard.write_bytes(content + b"\0")
    assert_error(tmp_path, str(shard), lambda: convert.hf_to_megatron(source, tmp_path / "megatron"))
    shard.unlink()
    assert_error(tmp_path, shard.name, lambda: convert.hf_to_megatron(source, tmp_path / "megatron"))


def flip(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_corrupted_shard_with_a_recorded_digest(tmp_path):
    source = make_hf(tmp_path / "hf")
    flip(source / "model.safetensors", 50_000)
    assert_error(tmp_path, "SHA-256", lambda: convert.hf_to_megatron(source, tmp_path / "megatron"))
    # The note that the hub's client leaves beside a download serves as well.
    digest = (source / "weights.sha256").read_text().split()[0]
    (source / "weights.sha256").unlink()
    note = source / ".cache/huggingface/download/model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")
    assert_error(tmp_path, "SHA-256", lambda: convert.hf_to_megatron(source, tmp_path / "megatron"))


def test_index_that_disagrees(tmp_path):
    source = make_hf(tmp_path / "hf", max_shard_bytes=60_000)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = {**index["weight_map"], "model.norm.weight": index["weight_map"]["model.embed_tokens.weight"]}
    path.write_text(json.dumps({**index, "weight_map": moved}))
    assert_error(tmp_path, "model.norm.weight", lambda: HfCheckpoint(source))
    path.write_text(json.dumps({**index, "weight_map": {**moved, "model.norm.weight": "../secret.safetensors"}}))
    assert_error(tmp_path, "outside the directory", lambda: HfCheckpoint(source))


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata"])
def test_corrupted_megatron_checkpoint(tmp_path, victim):
    convert.hf_to_megatron(make_hf(tmp_path / "hf"), tmp_path / "megatron")
    flip(tmp_path / "megatron" / victim, 2000)
    assert_error(tmp_path, victim, lambda: convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back"))
    (tmp_path / "megatron" / victim).unlink()
    assert_error(tmp_path, victim, lambda: convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back"))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tie_word_embeddings", True, "parameter model.output_layer.weight does not belong to the model"),
        ("ffn_hidden_size", 999, "mlp.linear_fc1.weight is (4, 512, 96), the model needs (4, 1998, 96)"),
        ("family", "llama", "k_layernorm.weight does not belong"),
        ("num_layers", 5, "model.decoder.layers.self_attention.linear_qkv.layer_norm_weight is (4, 96)"),
    ],
)
def test_every_parameter_of_a_megatron_checkpoint_is_accounted_for(tmp_path, field, value, words):
    convert.hf_to_megatron(make_hf(tmp_path / "hf"), tmp_path / "megatron")
    path = tmp_path / "megatron" / "model_spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert_error(tmp_path, words, lambda: convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back"))


def test_parameter_missing_from_a_megatron_checkpoint(tmp_path):
    source = make_hf(tmp_path / "hf", tie_word_embeddings=True)
    convert.hf_to_megatron(source, tmp_path / "megatron")
    path = tmp_path / "megatron" / "model_spec.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    words = "parameter model.output_layer.weight is missing"
    assert_error(tmp_path, words, lambda: convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back"))


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_hostile_metadata_is_not_executed(tmp_path, capsys):
    convert.hf_to_megatron(make_hf(tmp_path / "hf"), tmp_path / "megatron")
    content = pickle.dumps(Hostile())
    (tmp_path / "megatron" / ".metadata").write_bytes(content)
    manifest = tmp_path / "megatron" / "integrity.json"
    document = json.loads(manifest.read_text())
    document["files"][".metadata"] = hashlib.sha256(content).hexdigest()
    manifest.write_text(json.dumps(document))
    assert_error(tmp_path, "builtins.print", lambda: MegatronReader(tmp_path / "megatron"))
    assert "executed" not in capsys.readouterr().out


def test_existing_target_and_foreign_directories(tmp_path):
    source = make_hf(tmp_path / "hf")
    (tmp_path / "taken").mkdir()
    assert_error(tmp_path, "already exists", lambda: convert.hf_to_megatron(source, tmp_path / "taken"))
    assert_error(tmp_path, "no config.json", lambda: convert.hf_to_megatron(tmp_path / "taken", tmp_path / "m"))
    assert_error(tmp_path, "not a Megatron checkpoint", lambda: convert.megatron_to_hf(source, tmp_path / "m"))
    convert.hf_to_megatron(source, tmp_path / "stage" / "checkpoints" / "step_00000003")
    words = f"did you mean {tmp_path / 'stage' / 'checkpoints' / 'step_00000003'}?"
    assert_error(tmp_path, words, lambda: convert.megatron_to_hf(tmp_path / "stage", tmp_path / "m"))
    assert_error(
        tmp_path,
        "num_attention_heads 4 cannot be divided by tensor_model_parallel_size 3",
        lambda: convert.hf_to_megatron(source, tmp_path / "m", tensor_model_parallel_size=3),
    )


@pytest.mark.parametrize("direction", ["hf_to_megatron", "megatron_to_hf"])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, direction):
    source = make_hf(tmp_path / "hf")
    if direction == "megatron_to_hf":
        convert.hf_to_megatron(source, tmp_path / "megatron")
    seen = []
    write = HashedFile.write

    def fill_up(file, content):
        seen.append(1)
        if len(seen) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(HashedFile, "write", fill_up)
    convert_once = getattr(convert, direction)
    origin = source if direction == "hf_to_megatron" else tmp_path / "megatron"
    assert_error(tmp_path, "no space left", lambda: convert_once(origin, tmp_path / "converted"))
    assert seen


def test_check_names_what_differs(tmp_path):
    source = make_hf(tmp_path / "hf", dtype=torch.float32)
    convert.hf_to_megatron(source, tmp_path / "megatron")

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

    def swapped(tensors):
        small(tensors)
        first, second = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    good = make_hf(tmp_path / "good", dtype=torch.float32, change=small)
    bad = make_hf(tmp_path / "bad", dtype=torch.float32, change=swapped)
    convert.hf_to_megatron(good, tmp_path / "megatron", tensor_model_parallel_size=2)
    comparison = compare_logits(good, tmp_path / "megatron")
    assert comparison.max_difference < 1e-4 and comparison.standard_deviation > 0.3
    with pytest.raises(UserError, match="logits differ"):
        compare_logits(bad, tmp_path / "megatron")


def test_commands(tmp_path, capsys):
    source = make_hf(tmp_path / "hf", "moe")
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(dest="command"))

    def s2d(*arguments):
        cli.run(parser.parse_args(["convert", *map(str, arguments)]))
        return capsys.readouterr().out

    s2d("hf-to-megatron", source, tmp_path / "m", "--expert-model-parallel-size", "2", "--no-progress")
    s2d("megatron-to-hf", tmp_path / "m", tmp_path / "back", "--max-shard-size", "100KB", "--no-progress")
    description = json.loads(s2d("inspect", tmp_path / "m", "--json"))
    assert description["layout"]["expert_model_parallel_size"] == 2 and description["dtypes"] == ["bfloat16"]
    assert description["num_parameters"] == spec_from_directory(source).num_parameters
    assert description["digest"] == json.loads(s2d("inspect", tmp_path / "m", "--json"))["digest"]
    assert "format: huggingface" in s2d("inspect", tmp_path / "back", "--no-progress")
    answer = json.loads(s2d("inspect", "--config", tmp_path / "back" / "config.json", "--json"))
    assert answer["supported"] and answer["num_parameters"] == description["num_parameters"]
    assert (
        answer["layouts"]["expert_model_parallel_size"] == [1, 2, 4] and answer["parts"]["experts"] == "4, 2 per token"
    )
    printed = s2d("check", tmp_path / "back", tmp_path / "m", "--skip-logits", "--no-progress")
    assert "equal bit by bit" in printed and "not compared" in printed
    assert (cli.parse_size("5GB"), cli.parse_size("2KiB"), cli.parse_size("7")) == (5 * 10**9, 2048, 7)
    with pytest.raises(argparse.ArgumentTypeError):
        cli.parse_size("5 apples")
