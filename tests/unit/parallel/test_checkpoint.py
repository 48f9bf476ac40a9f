"""Checkpoints: whole or not at all, refused when foreign or damaged, and training goes on as if nothing had happened."""

import os
import subprocess

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.training import OptimizerConfig
from megatron_s2d.errors import UserError
from megatron_s2d.objectives.distill import sft_objective
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Sample
from megatron_s2d.train.policy import MegatronModel


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


def trainee(layout, preset="tiny-student", **changes) -> MegatronModel:
    spec = ModelConfig(preset=preset, vocab_size=27, **changes).resolve()
    policy = MegatronModel(spec, layout, precision="float32", max_tokens=64, seed=1)
    policy.prepare_training(OptimizerConfig(lr=1e-2, lr_schedule="cosine", warmup_steps=2), 6)
    return policy


def step(policy: MegatronModel, number: int) -> tuple[float, float]:
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
    batches = policy.pack(samples, {"supervised_weight": np.full(4, 1 / 24)})
    metrics = policy.forward_backward(batches, sft_objective(), num_tokens=36)
    return metrics["loss"], policy.optim_step()


def test_training_goes_on_bit_for_bit(layout, tmp_path):
    unbroken = trainee(layout)
    expected = [step(unbroken, number) for number in range(6)]
    first = trainee(layout)
    assert [step(first, number) for number in range(3)] == expected[:3]
    first.save(tmp_path / "c", {"step": 3, "updates": 3}, with_optimizer=True)
    second = trainee(layout)
    assert second.load(tmp_path / "c", with_optimizer=True) == {"step": 3, "updates": 3}
    assert [step(second, number) for number in range(3, 6)] == expected[3:]
    for mine, theirs in zip(second.chunks[0].parameters(), unbroken.chunks[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_in_the_background_holds_the_state_of_its_start(layout, tmp_path):
    unbroken = trainee(layout)
    expected = [step(unbroken, number) for number in range(6)]
    first = trainee(layout)
    assert [step(first, number) for number in range(3)] == expected[:3]
    saving = first.start_saving(tmp_path / "c", {"step": 3, "updates": 3}, with_optimizer=True, async_save=True)
    assert [step(first, number) for number in range(3, 6)] == expected[3:]
    assert not (tmp_path / "c").exists()
    saving.finish()
    assert saving.is_written()
    second = trainee(layout)
    assert second.load(tmp_path / "c", with_optimizer=True) == {"step": 3, "updates": 3}
    assert [step(second, number) for number in range(3, 6)] == expected[3:]


@pytest.mark.parametrize("error", [KeyError("gone"), OSError("gone")])
def test_a_writer_that_fails_in_the_background_is_noticed(layout, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    policy = trainee(layout)
    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data_multithread", fail)
    saving = policy.start_saving(tmp_path / "c", {"step": 1, "updates": 1}, with_optimizer=False, async_save=True)
    with pytest.raises(UserError, match="checkpoint not saved .*gone"):
        saving.finish()
    assert not list(tmp_path.iterdir())


def test_weights_alone_load_from_either_kind(layout, tmp_path):
    policy = trainee(layout)
    step(policy, 0)
    for name, with_optimizer in (("whole", True), ("weights", False)):
        policy.save(tmp_path / name, {"step": 1, "updates": 1}, with_optimizer=with_optimizer)
        other = MegatronModel(policy.spec, layout, precision="float32", max_tokens=64, seed=2)
        other.load(tmp_path / name)
        for mine, theirs in zip(other.chunks[0].parameters(), policy.chunks[0].parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_a_checkpoint_of_another_model_is_refused(layout, tmp_path):
    trainee(layout).save(tmp_path / "c", {"step": 0, "updates": 0}, with_optimizer=False)
    with pytest.raises(UserError, match="checkpoint of another model: ffn_hidden_size is 128 there and 64"):
        trainee(layout, ffn_hidden_size=64).load(tmp_path / "c")


def test_missing_and_damaged_checkpoints_are_refused(layout, tmp_path):
    policy = trainee(layout)
    with pytest.raises(UserError, match="not a checkpoint"):
        policy.load(tmp_path / "nothing")
    policy.save(tmp_path / "c", {"step": 0, "updates": 0}, with_optimizer=False)
    shard = next((tmp_path / "c").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="not a usable checkpoint"):
        policy.load(tmp_path / "c")


def test_an_existing_checkpoint_is_not_overwritten(layout, tmp_path):
    policy = trainee(layout)
    policy.save(tmp_path / "c", {"step": 0, "updates": 0}, with_optimizer=False)
    with pytest.raises(UserError, match="not saved .*earlier checkpoints are intact"):
        policy.save(tmp_path / "c", {"step": 1, "updates": 1}, with_optimizer=False)
    assert policy.load(tmp_path / "c") == {"step": 0, "updates": 0}


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "none", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here (not root?)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_leaves_the_last_checkpoint(layout, small_disk, async_save):
    policy = trainee(layout)
    policy.save(small_disk / "first", {"step": 1, "updates": 1}, with_optimizer=False)
    step(policy, 0)
    with pytest.raises(UserError, match="no space left on the disk.*earlier checkpoints are intact"):
        position = {"step": 2, "updates": 2}
        policy.start_saving(small_disk / "second", position, with_optimizer=True, async_save=async_save).finish()
    assert os.listdir(small_disk) == ["first"]
    assert policy.load(small_disk / "first") == {"step": 1, "updates": 1}
