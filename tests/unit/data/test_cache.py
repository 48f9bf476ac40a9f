"""The teacher cache: exact round trips in any order; damaged, mismatching and unfinished caches raise errors."""

from __future__ import annotations

import dataclasses
import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_s2d.artifacts.files import file_digest, json_digest
from megatron_s2d.data.cache import (
    CachedDistribution,
    CacheHeader,
    TeacherCache,
    cache_info,
    content_digest,
    verify_cache,
)
from megatron_s2d.data.cache_index import INDEX_NAME, CacheIndex, sealed
from megatron_s2d.data.cache_writer import CacheWriter, join_parts
from megatron_s2d.data.row_digests import prefix_digests, row_digests
from megatron_s2d.errors import UserError
from megatron_s2d.records import RemoteSample, Sample

VOCAB, K, WIDTH = 50, 4, 6


def header(representation: str, **changes) -> CacheHeader:
    fields = {
        "representation": representation, "teacher_digest": "t" * 8, "tokenizer_fingerprint": "k" * 8,
        "template_fingerprint": "c" * 8, "temperature": 1.0, "vocab_size": VOCAB,
        "k": K if representation == "top_k" else None,
        "hidden_size": WIDTH if representation == "hidden_states" else None,
    }  # fmt: skip
    return CacheHeader(**(fields | changes))


def sample(number: int, response: int, prompt: int = 3) -> Sample:
    rng = np.random.default_rng(number)
    mask = np.zeros(prompt + response, dtype=bool)
    mask[prompt:] = True
    return Sample(
        id=f"p{number}#0@0", prompt_id=f"p{number}", group_id=f"p{number}@0.0", domain="math",
        seed=number, temperature=1.0,
        token_ids=rng.integers(0, VOCAB, prompt + response), response_mask=mask, finish_reason="stop",
        rollout_log_probs=rng.standard_normal(prompt + response).astype(np.float32),
    )  # fmt: skip


def distribution(kind: str, rows: int, seed: int) -> CachedDistribution:
    """Of the response tokens of ``sample(seed, rows)``."""
    digests = torch.from_numpy(row_digests(sample(seed, rows)))
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.log_softmax(torch.randn(rows, VOCAB, generator=generator), -1)
    if kind == "sampled_token":
        return CachedDistribution(digests, log_probs=log_probs[:, 0].clone())
    if kind == "full_vocab":
        return CachedDistribution(digests, log_probs=log_probs)
    if kind == "hidden_states":
        return CachedDistribution(digests, hidden=torch.randn(rows, WIDTH, generator=generator).bfloat16())
    top, ids = log_probs.topk(K)
    return CachedDistribution(digests, log_probs=top, ids=ids.int(), log_tail_mass=torch.log1p(-top.exp().sum(-1)))


LENGTHS = [5, 1, 9, 0, 3, 7]


def write(directory, kind="top_k", shard_bytes=200, **changes):
    with CacheWriter(directory, header(kind, **changes), shard_bytes=shard_bytes) as writer:
        for number, length in enumerate(LENGTHS):
            writer.add(sample(number, length), distribution(kind, length, number))


@pytest.mark.parametrize("kind", ["sampled_token", "top_k", "hidden_states", "full_vocab"])
def test_round_trip_in_any_order(tmp_path, kind):
    write(tmp_path / "cache", kind)
    cache = TeacherCache.open(tmp_path / "cache", expect=header(kind))
    assert [s.id for s in cache.samples] == [f"p{n}#0@0" for n in range(len(LENGTHS))]
    order = list(range(len(LENGTHS))) * 2
    random.Random(0).shuffle(order)
    for number in order:
        stored, original = cache.samples[number], sample(number, LENGTHS[number])
        assert np.array_equal(stored.token_ids, original.token_ids)
        assert np.array_equal(stored.rollout_log_probs, original.rollout_log_probs)
        tensors = cache.distribution(stored.id).tensors()
        expected = distribution(kind, LENGTHS[number], number).tensors()
        assert tensors.keys() == expected.keys()
        for name, value in expected.items():
            assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value)
    info = verify_cache(tmp_path / "cache")
    assert info["samples"] == 6 and info["tokens"] == sum(LENGTHS) and info == cache_info(tmp_path / "cache")
    if kind != "sampled_token":
        assert info["shards"] > 1


def test_captured_mass_is_the_mean_over_tokens(tmp_path):
    write(tmp_path / "cache")
    parts = [distribution("top_k", rows, n).log_probs.double().exp().sum(-1) for n, rows in enumerate(LENGTHS)]
    assert cache_info(tmp_path / "cache")["captured_mass"] == pytest.approx(float(torch.cat(parts).mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_digest": "other"}, "teacher_digest is 'tttttttt', this run expects 'other'"),
        ({"tokenizer_fingerprint": "other"}, "tokenizer_fingerprint"),
        ({"template_fingerprint": "other"}, "template_fingerprint"),
        ({"temperature": 0.7}, "temperature is 1.0, this run expects 0.7"),
        ({"vocab_size": VOCAB + 1}, "vocab_size"),
        ({"k": K + 1}, "k is 4, this run expects 5"),
    ],
)
def test_mismatching_header_raises(tmp_path, changes, message):
    write(tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        TeacherCache.open(tmp_path / "cache", expect=header("top_k", **changes))


def test_sample_with_other_tokens_raises(tmp_path):
    write(tmp_path / "cache")
    cache = TeacherCache.open(tmp_path / "cache")
    changed = cache.samples[0].token_ids.copy()
    changed[-1] += 1
    with pytest.raises(UserError, match="differs from the cached tokens"):
        cache.distribution(dataclasses.replace(cache.samples[0], token_ids=changed))
    with pytest.raises(UserError, match="no sample 'nobody'"):
        cache.distribution("nobody")


def flip_bit(path, index):
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def read_all(directory):
    cache = TeacherCache.open(directory)
    for record in cache.samples:
        cache.distribution(record)


@pytest.mark.parametrize("name", ["header.json", "samples.jsonl", "index.bin"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_one_flipped_bit_beside_the_shards_is_detected_when_it_is_read(tmp_path, name, share):
    write(tmp_path / "cache")
    path = tmp_path / "cache" / name
    flip_bit(path, int(share * path.stat().st_size))
    for read in (read_all, verify_cache):
        with pytest.raises(UserError, match=name):
            read(tmp_path / "cache")


def test_one_flipped_bit_in_the_ids_is_an_unknown_sample(tmp_path):
    write(tmp_path / "cache")
    flip_bit(tmp_path / "cache" / "ids.bin", 20)
    for read, message in ((read_all, "no sample"), (verify_cache, "ids.bin: content does not match")):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "cache")


def test_records_of_samples_that_others_read_are_those_of_the_samples(tmp_path):
    write(tmp_path / "cache")
    stored = TeacherCache.open(tmp_path / "cache").stored(temperature=0.5)
    indices = [4, 0, 2]
    assert stored.lengths(indices).tolist() == [3 + LENGTHS[index] for index in indices]
    remote, own, other = stored.read(indices, [1, 0, 2], dp_rank=0)
    assert own.id == "p0#0@0" and own.temperature == 0.5
    for record, index, rank in ((remote, 4, 1), (other, 2, 2)):
        full = dataclasses.replace(sample(index, LENGTHS[index]), temperature=0.5)
        assert record == RemoteSample.of(full, rank)


def test_parts_are_one_cache(tmp_path):
    for number, part in enumerate(([0, 1], [2, 3, 4], [5])):
        with CacheWriter(tmp_path / f"part_{number}", header("top_k")) as writer:
            for index in part:
                writer.add(sample(index, LENGTHS[index]), distribution("top_k", LENGTHS[index], index))
    join_parts(tmp_path, ["part_0", "part_1", "part_2"], header("top_k"))
    write(tmp_path / "cache", shard_bytes=1 << 20)
    cache = TeacherCache.open(tmp_path, expect=header("top_k"))
    assert [record.id for record in cache.samples] == [f"p{n}#0@0" for n in range(6)]
    assert cache.longest_response == 9
    for record in reversed(list(cache.samples)):
        assert cache.distribution(record).ids.shape == (record.response_length, K)
    joined, single = cache_info(tmp_path), verify_cache(tmp_path / "cache")
    assert verify_cache(tmp_path) == joined and joined["shards"] == 3
    assert joined["captured_mass"] == pytest.approx(single["captured_mass"], rel=1e-12)
    assert {name: joined[name] for name in ("samples", "tokens")} == {"samples": 6, "tokens": 25}
    flip_bit(tmp_path / "part_1" / "shard-00000.safetensors", -2)
    with pytest.raises(UserError, match="part_1/shard-00000.safetensors: content does not match"):
        verify_cache(tmp_path)
    (tmp_path / "part_0").rename(tmp_path / "away")
    (tmp_path / "part_2").rename(tmp_path / "part_0")
    with pytest.raises(UserError, match="part_0/header.json: not the part that was written"):
        cache_info(tmp_path) and TeacherCache.open(tmp_path).samples[0]


def test_one_flipped_bit_in_a_shard_is_detected_on_read(tmp_path):
    write(tmp_path / "cache", shard_bytes=1 << 20)
    path = tmp_path / "cache" / "shard-00000.safetensors"
    flip_bit(path, path.stat().st_size - 2)
    cache = TeacherCache.open(tmp_path / "cache")
    damaged = 0
    for record in cache.samples:
        try:
            cache.distribution(record)
        except UserError as error:
            assert "shard-00000.safetensors" in str(error) and "damaged" in str(error)
            damaged += 1
    assert damaged == 1
    with pytest.raises(UserError, match="shard-00000.safetensors: content does not match"):
        verify_cache(tmp_path / "cache")


def test_damaged_truncated_and_missing_shards_raise(tmp_path):
    write(tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 8 + content[8:])
    with pytest.raises(UserError, match="cannot be read"):
        TeacherCache.open(tmp_path / "cache").distribution("p0#0@0")
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="truncated"):
        TeacherCache.open(tmp_path / "cache")
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        cache_info(tmp_path / "cache") and TeacherCache.open(tmp_path / "cache")


def test_swapped_shards_of_equal_size_are_detected_on_read(tmp_path):
    with CacheWriter(tmp_path / "cache", header("top_k"), shard_bytes=1) as writer:
        for number in range(3):
            writer.add(sample(number, 5), distribution("top_k", 5, number))
    first, second = (tmp_path / "cache" / f"shard-{number:05d}.safetensors" for number in range(2))
    assert first.stat().st_size == second.stat().st_size
    first.rename(tmp_path / "first")
    second.rename(first)
    (tmp_path / "first").rename(second)
    cache = TeacherCache.open(tmp_path / "cache")
    for number in range(2):
        with pytest.raises(UserError, match=f"shard-0000{number}.safetensors: rows of sample p{number}#0@0 are dam"):
            cache.distribution(f"p{number}#0@0")
    assert cache.distribution("p2#0@0").ids.shape == (5, K)


def test_shard_that_is_truncated_while_it_is_used_is_an_error(tmp_path):
    """The file is mapped into memory: reading beyond its end would end the process with SIGBUS."""
    with CacheWriter(tmp_path / "cache", header("hidden_states")) as writer:
        for number in range(40):
            writer.add(sample(number, 200), distribution("hidden_states", 200, number))
    cache = TeacherCache.open(tmp_path / "cache")
    cache.distribution("p0#0@0")
    os.truncate(tmp_path / "cache" / "shard-00000.safetensors", 5000)
    with pytest.raises(UserError, match="shard-00000.safetensors: missing or truncated"):
        cache.distribution("p39#0@0")


def test_other_versions_and_other_directories_raise(tmp_path):
    write(tmp_path / "cache")
    path = tmp_path / "cache" / "header.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"version": 1}))
    with pytest.raises(UserError, match="cache version 1, this version reads 5"):
        TeacherCache.open(tmp_path / "cache")
    path.write_text(json.dumps({"format": "something"}))
    with pytest.raises(UserError, match="not the header of a teacher cache"):
        TeacherCache.open(tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a finished teacher cache"):
        cache_info(tmp_path / "empty")
    with pytest.raises(UserError, match="no such teacher cache"):
        cache_info(tmp_path / "absent")


def test_directory_appears_only_when_finished(tmp_path):
    target = tmp_path / "cache"
    writer = CacheWriter(target, header("sampled_token"))
    writer.add(sample(0, 5), distribution("sampled_token", 5, 0))
    assert not target.exists()
    del writer  # as if the process had been killed: the next writer starts over
    with pytest.raises(RuntimeError, match="teacher failed"), CacheWriter(target, header("sampled_token")) as writer:
        writer.add(sample(0, 5), distribution("sampled_token", 5, 0))
        raise RuntimeError("teacher failed")
    assert list(tmp_path.iterdir()) == []
    write(target, "sampled_token")
    with pytest.raises(UserError, match="already exists"):
        CacheWriter(target, header("sampled_token"))
    assert verify_cache(target)["samples"] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: dataclasses.replace(d, ids=None), "a top_k cache needs"),
        (lambda d: dataclasses.replace(d, ids=d.ids[:4], log_probs=d.log_probs[:4]), "a top_k cache needs"),
        (lambda d: dataclasses.replace(d, token_digests=d.token_digests.roll(1)), "5 of 5 rows of sample p0#0@0"),
        (lambda d: dataclasses.replace(d, ids=d.ids.long()), "ids cannot be stored as torch.int64"),
        (lambda d: dataclasses.replace(d, ids=torch.zeros_like(d.ids)), "contain a token twice"),
        (lambda d: dataclasses.replace(d, ids=d.ids + VOCAB), "outside the vocabulary"),
        (lambda d: dataclasses.replace(d, log_tail_mass=d.log_tail_mass * torch.nan), "contain NaN"),
    ],
)
def test_invalid_distributions_raise(tmp_path, change, message):
    with pytest.raises(UserError, match=message), CacheWriter(tmp_path / "cache", header("top_k")) as writer:
        writer.add(sample(0, 5), change(distribution("top_k", 5, 0)))
    assert not (tmp_path / "cache").exists()


def test_digests_are_of_all_tokens_up_to_each():
    digests = prefix_digests(np.array([5, 7, 7, 7, 0, 0]))
    assert digests.dtype == np.int32 and len(set(digests.tolist())) == 6  # repeated tokens have digests of their own
    assert np.array_equal(digests[:3], prefix_digests(np.array([5, 7, 7])))
    assert not np.isin(prefix_digests(np.array([7, 5, 7, 7, 0, 0]))[1:], digests).any()  # the order counts
    # Fixed: caches on disk hold them.
    assert digests.tolist() == [-1993907151, -1269143221, -1931643834, -792806429, 872000055, 1384961440]


@pytest.mark.parametrize("kind", ["sampled_token", "top_k", "hidden_states", "full_vocab"])
def test_rows_shifted_by_one_are_refused_when_they_are_read(tmp_path, kind):
    """An index that is off by one row, with digests that fit it: nothing else could tell."""
    directory = tmp_path / "cache"
    write(directory, kind, shard_bytes=1 << 20)
    shard = load_file(directory / "shard-00000.safetensors")
    index = CacheIndex(directory, len(LENGTHS)).rows.copy()
    for row in index[1:]:
        row["start"] -= 1
        rows = {name: values[row["start"] : row["start"] + row["rows"]] for name, values in shard.items()}
        row["content"] = np.void(bytes.fromhex(content_digest(rows)))
        sealed(row)
    (directory / INDEX_NAME).write_bytes(index.tobytes())
    document = json.loads((directory / "header.json").read_text())
    document["body"]["files"][INDEX_NAME]["sha256"] = file_digest(directory / INDEX_NAME)
    document["body_digest"] = json_digest(document["body"])
    (directory / "header.json").write_text(json.dumps(document))
    cache = TeacherCache.open(directory)
    cache.distribution(cache.samples[0])
    for index in (2, 4, 5):
        with pytest.raises(UserError, match=f"shard-00000.safetensors: {LENGTHS[index]} of {LENGTHS[index]} rows of"):
            cache.distribution(cache.samples[index])
    with pytest.raises(UserError, match="belong to other tokens"):
        verify_cache(directory)


def test_repeated_id_raises(tmp_path):
    repeated = pytest.raises(UserError, match="is already in the cache")
    with repeated, CacheWriter(tmp_path / "c", header("full_vocab")) as writer:
        writer.add(sample(0, 5), distribution("full_vocab", 5, 0))
        writer.add(sample(0, 5), distribution("full_vocab", 5, 0))


def test_inconsistent_headers_raise():
    for fields in (
        {"representation": "top_k", "k": None},
        {"representation": "sampled_token", "k": 3},
        {"representation": "hidden_states", "hidden_size": None},
    ):
        with pytest.raises(ValueError, match="belongs to representation"):
            header(**fields)
    with pytest.raises(ValueError, match="exceeds the vocabulary"):
        header("top_k", k=VOCAB + 1)
