"""Batches of a teacher cache: resume after the complete ones, merge them in order."""

import types

import pytest
import torch

from megatron_s2d.data.cache import CachedDistribution, CacheHeader, TeacherCache, verify_cache
from megatron_s2d.data.cache_writer import join_parts
from megatron_s2d.data.row_digests import row_digests
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.layout import initialize_distributed
from megatron_s2d.stages import teacher_cache
from megatron_s2d.stages.teacher_cache import batch_path, count_batches, merge_batches, part_path

HEADER = CacheHeader(
    representation="sampled_token",
    teacher_digest="t",
    tokenizer_fingerprint="f",
    template_fingerprint="f",
    temperature=1.0,
    vocab_size=30,
)


@pytest.fixture(autouse=True)
def one_rank():
    initialize_distributed()


def write_batch(partial, number, samples, dp_size=1):
    """Write a batch as ``dp_size`` data-parallel ranks do, each of which scored every other sample."""
    for rank in range(dp_size):
        distributions = {}
        for index in range(rank, len(samples), dp_size):
            digests = torch.from_numpy(row_digests(samples[index]))
            log_probs = torch.full((samples[index].response_length,), -float(number))
            distributions[index] = samples[index], CachedDistribution(digests, log_probs=log_probs)
        ranks = types.SimpleNamespace(dp_rank=rank, dp_size=dp_size, is_dp_leader=True)
        teacher_cache.write_batch(batch_path(partial, number), len(samples), distributions, HEADER, ranks)


def merge(partial, count, target, dp_size=1):
    for rank in reversed(range(dp_size)):  # rank 0 joins the parts that are there
        ranks = types.SimpleNamespace(dp_rank=rank, dp_size=dp_size, is_dp_leader=True)
        merge_batches(partial, count, target, HEADER, ranks)


def test_complete_batches_are_counted_up_to_the_first_missing_one(fakes, tmp_path):
    assert count_batches(tmp_path) == 0
    for number in (1, 2, 4):
        write_batch(tmp_path, number, [fakes.sample(str(number), 2)])
    batch_path(tmp_path, 3).mkdir()  # killed while it was written
    assert count_batches(tmp_path) == 2


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "samples.jsonl", "index.bin", "ids.bin", "header.json"])
def test_batches_from_a_damaged_one_on_are_generated_again(fakes, tmp_path, capsys, name):
    for number in (1, 2, 3):
        write_batch(tmp_path, number, [fakes.sample(str(number), 2)])
    path = part_path(batch_path(tmp_path, 2), 0) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert count_batches(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["batch_00001"]
    (line,) = capsys.readouterr().out.splitlines()
    assert name in line and line.endswith("this batch and those after it are generated again")


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_batches_are_merged_in_order_whoever_wrote_them_and_deleted(fakes, tmp_path, dp_size):
    partial, target = tmp_path / "partial", tmp_path / "cache"
    names = list("abcdefghij")
    write_batch(partial, 1, [fakes.sample(name, 2) for name in names[:5]], dp_size)
    write_batch(partial, 2, [], dp_size)  # the verifier accepted nothing
    write_batch(partial, 3, [fakes.sample(name, 1) for name in names[5:9]], dp_size)
    write_batch(partial, 4, [fakes.sample(name, 3) for name in names[9:]], 1)  # resumed on another layout
    merge(partial, 4, target)
    cache = TeacherCache.open(target, expect=HEADER)
    assert [sample.id for sample in cache.samples] == names and cache.longest_response == 3
    assert cache.distribution("b").log_probs.tolist() == [-1, -1] and cache.distribution("g").log_probs == -3
    assert not partial.exists()
    merge(partial, 4, target)  # killed after the cache was complete


def test_each_rank_copies_its_share(fakes, tmp_path, monkeypatch):
    """Ranks of one process, so that rank 0 comes last."""
    partial, target = tmp_path / "partial", tmp_path / "cache"
    names = list("abcdefg")
    write_batch(partial, 1, [fakes.sample(name, 2) for name in names[:3]], 2)
    write_batch(partial, 2, [fakes.sample(name, 2) for name in names[3:]], 2)
    monkeypatch.setattr(teacher_cache, "rename", lambda source, target: None)
    monkeypatch.setattr(teacher_cache.shutil, "rmtree", lambda path, ignore_errors=False: None)
    monkeypatch.setattr(teacher_cache, "join_parts", lambda *_: None)
    for rank in (0, 1, 2):
        ranks = types.SimpleNamespace(dp_rank=rank, dp_size=3, is_dp_leader=True)
        if rank:
            monkeypatch.setattr(teacher_cache, "broadcast_from_rank0", lambda action: [3, 4])
        merge_batches(partial, 2, target, HEADER, ranks)
    join_parts(tmp_path / "cache.partial", [f"part_{rank:05d}" for rank in range(3)], HEADER)
    cache = TeacherCache.open(tmp_path / "cache.partial", expect=HEADER)
    assert [[cache.part(n).sample(row).id for row in cache.part(n).index.rows] for n in range(3)] == [
        ["a", "b"], ["c", "d"], ["e", "f", "g"],
    ]  # fmt: skip
    assert [sample.id for sample in cache.samples] == names and verify_cache(tmp_path / "cache.partial")["samples"] == 7
    assert cache.distribution("e").log_probs.tolist() == [-2, -2]


def test_nothing_accepted_is_an_error(tmp_path):
    write_batch(tmp_path / "partial", 1, [])
    with pytest.raises(UserError, match="accepts no response"):
        merge(tmp_path / "partial", 1, tmp_path / "cache")
