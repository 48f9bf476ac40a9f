"""Checkpoints: atomic saves, bit-identical resume, and errors for damaged ones and those of another model."""

import json
import os
import subprocess
import threading
import types

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import CheckpointConfig, OptimizerConfig
from megatron_s2d.errors import UserError
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.parallel import checkpoint
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.parallel.manifest import DamagedCheckpoint
from megatron_s2d.records import Sample
from megatron_s2d.train import checkpoints
from megatron_s2d.train.checkpoints import CheckpointManager
from megatron_s2d.train.megatron_model import MegatronModel


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


def trainable_model(layout, preset="tiny-student", **changes) -> MegatronModel:
    spec = ModelConfig(preset=preset, vocab_size=27, **changes).resolve()
    model = MegatronModel(spec, layout, precision="float32", max_tokens=64, seed=1)
    model.prepare_training(OptimizerConfig(lr=1e-2, lr_schedule="cosine", warmup_steps=2), 6)
    return model


def step(model: MegatronModel, number: int) -> tuple[float, float]:
    rng = np.random.default_rng(number)
    samples = [
        Sample(
            id=str(i),
            prompt_id="p",
            group_id="a",
            domain="d",
            seed=0,
            token_ids=rng.integers(0, 27, 9),
            response_mask=np.arange(9) >= 3,
            temperature=1.0,
            finish_reason="data",
        )
        for i in range(4)
    ]
    batches = model.pack(samples, {"supervised_weight": np.full(4, 1 / 24)})
    metrics = model.forward_backward(batches, sft_objective(), num_tokens=36)
    return metrics["loss"].value(), model.optim_step()


def test_resume_is_bit_identical(layout, tmp_path):
    uninterrupted = trainable_model(layout)
    expected = [step(uninterrupted, number) for number in range(6)]
    first = trainable_model(layout)
    assert [step(first, number) for number in range(3)] == expected[:3]
    first.save(tmp_path / "c", {"step": 3, "updates": 3}, with_optimizer=True)
    second = trainable_model(layout)
    assert second.load(tmp_path / "c", with_optimizer=True) == {"step": 3, "updates": 3}
    assert [step(second, number) for number in range(3, 6)] == expected[3:]
    for parameter, expected_parameter in zip(
        second.chunks[0].parameters(), uninterrupted.chunks[0].parameters(), strict=True
    ):
        assert torch.equal(parameter, expected_parameter)


def test_a_save_does_not_copy_the_optimizer_state(layout):
    model = trainable_model(layout)
    step(model, 0)
    saved = checkpoint._sharded_state(model.chunks, model.trainable, loading=False)["optimizer"]["param_state"]
    inner = model.trainable.optimizer.chained_optimizers[0].optimizer
    in_use = {value.data_ptr() for values in inner.state.values() for value in values.values() if value.dim()}
    moments = [tensor.data for tensors in saved.values() for kind, tensor in tensors.items() if kind != "param"]
    assert len(moments) == len(in_use) and {tensor.data_ptr() for tensor in moments} == in_use
    # The writer copies a tensor that is part of a larger one.
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in moments)


def test_async_save_writes_the_state_of_its_start(layout, tmp_path):
    uninterrupted = trainable_model(layout)
    expected = [step(uninterrupted, number) for number in range(6)]
    first = trainable_model(layout)
    assert [step(first, number) for number in range(3)] == expected[:3]
    saving = first.start_saving(tmp_path / "c", {"step": 3, "updates": 3}, with_optimizer=True, async_save=True)
    assert [step(first, number) for number in range(3, 6)] == expected[3:]
    assert not (tmp_path / "c").exists()
    saving.finish()
    assert saving.is_written()
    second = trainable_model(layout)
    assert second.load(tmp_path / "c", with_optimizer=True) == {"step": 3, "updates": 3}
    assert [step(second, number) for number in range(3, 6)] == expected[3:]


@pytest.mark.parametrize("error", [KeyError("gone"), OSError("gone")])
def test_failed_async_save_raises_at_finish(layout, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    model = trainable_model(layout)
    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data_multithread", fail)
    saving = model.start_saving(tmp_path / "c", {"step": 1, "updates": 1}, with_optimizer=False, async_save=True)
    with pytest.raises(UserError, match="checkpoint not saved .*gone"):
        saving.finish()
    assert not list(tmp_path.iterdir())


def test_weights_load_with_and_without_saved_optimizer(layout, tmp_path):
    model = trainable_model(layout)
    step(model, 0)
    for name, with_optimizer in (("with_optimizer", True), ("weights", False)):
        model.save(tmp_path / name, {"step": 1, "updates": 1}, with_optimizer=with_optimizer)
        other = MegatronModel(model.spec, layout, precision="float32", max_tokens=64, seed=2)
        other.load(tmp_path / name)
        for parameter, expected_parameter in zip(
            other.chunks[0].parameters(), model.chunks[0].parameters(), strict=True
        ):
            assert torch.equal(parameter, expected_parameter)


def test_checkpoint_of_another_model_is_refused(layout, tmp_path):
    trainable_model(layout).save(tmp_path / "c", {"step": 0, "updates": 0}, with_optimizer=False)
    with pytest.raises(UserError, match="checkpoint of another model: ffn_hidden_size is 128 there and 64"):
        trainable_model(layout, ffn_hidden_size=64).load(tmp_path / "c")


def test_missing_and_damaged_checkpoints_are_refused(layout, tmp_path):
    model = trainable_model(layout)
    with pytest.raises(UserError, match="not a checkpoint"):
        model.load(tmp_path / "nothing")
    model.save(tmp_path / "c", {"step": 0, "updates": 0}, with_optimizer=False)
    shard = next((tmp_path / "c").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="not a usable checkpoint"):
        model.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["model_spec.json", "trainer_state.json", "integrity.json", "metadata.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", "{}", "[" * 100_000, "\x00"])
def test_edited_documents_are_one_line(layout, tmp_path, name, content):
    model = trainable_model(layout)
    model.save(tmp_path / "c", {"step": 0, "updates": 0}, with_optimizer=False)
    (tmp_path / "c" / name).write_text(content)
    with pytest.raises(UserError) as caught:
        model.load(tmp_path / "c")
    assert "\n" not in str(caught.value)


def test_manifest_covers_every_file(layout, tmp_path):
    model = trainable_model(layout)
    model.save(tmp_path / "c", {"step": 0, "updates": 0}, with_optimizer=False)
    manifest = tmp_path / "c" / "integrity.json"
    document = json.loads(manifest.read_text())
    assert set(document["files"]) == {path.name for path in (tmp_path / "c").iterdir()} - {"integrity.json"}
    (tmp_path / "c" / "trainer_state.json").write_text(json.dumps({"step": 7, "updates": 7}))
    with pytest.raises(DamagedCheckpoint, match=r"trainer_state\.json: hash mismatch|not a usable checkpoint"):
        model.load(tmp_path / "c")
    manifest.write_text(json.dumps(document | {"files": {".metadata": document["files"][".metadata"]}}))
    with pytest.raises(DamagedCheckpoint, match="does not list"):
        model.load(tmp_path / "c")


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(layout, tmp_path, capsys):
    model, stage = trainable_model(layout), StageDirectory(tmp_path)
    for number in range(2):
        step(model, number)
        state = {"step": number + 1, "updates": number + 1}
        model.save(stage.checkpoint_path(number + 1), state, with_optimizer=True)
    shard = next(stage.checkpoint_path(2).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    resumed = trainable_model(layout)
    checkpoints = CheckpointManager(resumed, stage, CheckpointConfig())
    assert checkpoints.resume() == {"step": 1, "updates": 1}
    assert step(resumed, 1) == step(reload(layout, stage.checkpoint_path(1)), 1)
    assert "resuming from step_00000001 instead" in capsys.readouterr().out
    assert [path.name for path in stage.checkpoints()] == ["step_00000001"]
    (stage.checkpoint_path(1) / ".metadata").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata is missing"):
        checkpoints.resume()


def reload(layout, path):
    model = trainable_model(layout)
    model.load(path, with_optimizer=True)
    return model


def test_checkpoint_that_another_node_renamed_is_waited_for(layout, tmp_path, monkeypatch):
    """An NFS client sees it late: rank 0 has it, this rank does not yet."""
    model = trainable_model(layout)
    step(model, 0)
    model.save(tmp_path / "c", {"step": 1, "updates": 1}, with_optimizer=True)
    (tmp_path / "c").rename(tmp_path / "elsewhere")
    pauses = []

    def appear(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            (tmp_path / "elsewhere").rename(tmp_path / "c")

    monkeypatch.setattr(checkpoint.time, "sleep", appear)
    with pytest.raises(DamagedCheckpoint, match="not a checkpoint"):  # rank 0 does not see it: no wait
        model.load(tmp_path / "c")
    assert not pauses
    monkeypatch.setattr(checkpoint, "broadcast_from_rank0", lambda action: True)
    assert model.load(tmp_path / "c", with_optimizer=True)["step"] == 1 and len(pauses) == 2


def test_rank_0_decides_what_is_on_disk(layout, tmp_path, monkeypatch):
    """Ranks on other nodes may see older directories; if each decided for itself, they would wait for each other."""
    model, stage = trainable_model(layout), StageDirectory(tmp_path)
    step(model, 0)
    manager = CheckpointManager(model, stage, CheckpointConfig())
    manager.save({"step": 1, "updates": 0})
    seen_by_rank_0 = [path.name for path in stage.checkpoints()]
    monkeypatch.setattr(StageDirectory, "checkpoints", lambda self: [])
    monkeypatch.setattr(checkpoints, "broadcast_from_rank0", lambda action: list(seen_by_rank_0))
    assert manager.resume()["step"] == 1
    saved = []
    monkeypatch.setattr(model, "start_saving", lambda *args, **options: saved.append(args))
    manager.save({"step": 5, "updates": 5})  # rank 0 has it already
    assert not saved


def test_damage_that_one_rank_sees_is_that_of_all(layout, tmp_path, monkeypatch):
    model = trainable_model(layout)
    model.save(tmp_path / "c", {"step": 1, "updates": 1}, with_optimizer=False)
    answers = iter([None, "c: shard is damaged, says rank 1"])
    monkeypatch.setattr(checkpoint, "first_error", lambda error: next(answers))
    with pytest.raises(DamagedCheckpoint, match="says rank 1"):
        model.load(tmp_path / "c")


def test_every_file_is_read_for_its_digest_by_one_rank(layout, tmp_path, monkeypatch):
    trainable_model(layout).save(tmp_path / "c", {"step": 1, "updates": 1}, with_optimizer=False)
    read, digest = [], checkpoint.file_digest
    monkeypatch.setattr(checkpoint, "file_digest", lambda path: read.append(path.name) or digest(path))
    for rank in range(3):
        ranks = types.SimpleNamespace(get_rank=lambda rank=rank: rank, get_world_size=lambda: 3)
        monkeypatch.setattr(checkpoint, "dist", ranks)
        checkpoint._check_own_share(tmp_path / "c")
    files = {path.name for path in (tmp_path / "c").iterdir()} - {"integrity.json"}
    assert sorted(read) == sorted(files) and len(files) >= 5


def test_ranks_compute_the_digests_of_what_they_write(layout, tmp_path, monkeypatch):
    """Rank 0 reads no shard while the others wait, neither its own nor those of another rank, which sends digests."""
    read, digest, other = [], checkpoint.file_digest, {"__1_0.distcp": "of rank 1"}

    def recorded(path):
        read.append((path.name, threading.current_thread().name))
        return digest(path)

    def gathered(own):
        (tmp_path / "c.partial" / "__1_0.distcp").write_text("written by rank 1")
        return [own, other]

    monkeypatch.setattr(checkpoint, "file_digest", recorded)
    monkeypatch.setattr(checkpoint, "gather_json_on_rank0", gathered)
    model = trainable_model(layout)
    model.start_saving(tmp_path / "c", {"step": 1, "updates": 1}, with_optimizer=False, async_save=True).finish()
    files = json.loads((tmp_path / "c" / "integrity.json").read_text())["files"]
    assert set(files) == {path.name for path in (tmp_path / "c").iterdir()} - {"integrity.json"}
    assert files.items() >= other.items()
    shards = sorted(name for name in files if name.endswith(".distcp") and name not in other)
    assert shards and sorted(name for name, thread in read if thread == "checkpoint") == shards
    assert sorted(name for name, _ in read) == sorted(files.keys() - other.keys())


def test_existing_checkpoint_is_not_overwritten(layout, tmp_path):
    model = trainable_model(layout)
    model.save(tmp_path / "c", {"step": 0, "updates": 0}, with_optimizer=False)
    with pytest.raises(UserError, match="not saved .*earlier checkpoints are intact"):
        model.save(tmp_path / "c", {"step": 1, "updates": 1}, with_optimizer=False)
    assert model.load(tmp_path / "c") == {"step": 0, "updates": 0}


@pytest.fixture
def small_disk(tmp_path):
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "none", str(mount_point)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here (not root?)")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


@pytest.mark.parametrize("async_save", [False, True])
def test_full_disk_leaves_the_last_checkpoint(layout, small_disk, async_save):
    model = trainable_model(layout)
    model.save(small_disk / "first", {"step": 1, "updates": 1}, with_optimizer=False)
    step(model, 0)
    with pytest.raises(UserError, match="no space left on the disk.*earlier checkpoints are intact"):
        trainer_state = {"step": 2, "updates": 2}
        model.start_saving(small_disk / "second", trainer_state, with_optimizer=True, async_save=async_save).finish()
    assert os.listdir(small_disk) == ["first"]
    assert model.load(small_disk / "first") == {"step": 1, "updates": 1}
