"""Batches of a teacher cache: resume after the complete ones, merge them in order."""

import numpy as np
import pytest
import torch

from megatron_s2d.data.cache import CachedDistribution, CacheHeader, CacheWriter, TeacherCache
from megatron_s2d.errors import UserError
from megatron_s2d.stages.teacher_cache import batch_path, count_batches, merge_batches

HEADER = CacheHeader(
    representation="sampled_token",
    teacher_digest="t",
    tokenizer_fingerprint="f",
    template_fingerprint="f",
    temperature=1.0,
    vocab_size=30,
)


def write_batch(partial, number, samples):
    with CacheWriter(batch_path(partial, number), HEADER) as writer:
        for sample in samples:
            log_probs = torch.full((sample.response_length,), -float(number))
            writer.add(sample, CachedDistribution(log_probs=log_probs))


def test_complete_batches_are_counted_up_to_the_first_missing_one(fakes, tmp_path):
    assert count_batches(tmp_path) == 0
    for number in (1, 2, 4):
        write_batch(tmp_path, number, [fakes.sample(str(number), 2)])
    batch_path(tmp_path, 3).mkdir()  # killed while it was written
    assert count_batches(tmp_path) == 2


def test_batches_are_merged_in_order_and_deleted(fakes, tmp_path):
    partial, target = tmp_path / "partial", tmp_path / "cache"
    write_batch(partial, 1, [fakes.sample("a", 2), fakes.sample("b", 3)])
    write_batch(partial, 2, [])  # the verifier accepted nothing
    write_batch(partial, 3, [fakes.sample("c", 1)])
    merge_batches(partial, 3, target, HEADER)
    cache = TeacherCache.open(target, expect=HEADER)
    assert [sample.id for sample in cache.samples] == ["a", "b", "c"]
    assert np.array_equal(cache.distribution("b").log_probs, [-1, -1, -1]) and cache.distribution("c").log_probs == -3
    assert not partial.exists()
    merge_batches(partial, 3, target, HEADER)  # killed after the cache was complete


def test_nothing_accepted_is_an_error(tmp_path):
    write_batch(tmp_path / "partial", 1, [])
    with pytest.raises(UserError, match="accepts no response"):
        merge_batches(tmp_path / "partial", 1, tmp_path / "cache", HEADER)
