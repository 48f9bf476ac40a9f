"""Samples as bytes: every field and array survives, and the size is that of the arrays."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_s2d.data.balance import SCORING_SHARE, SHARE, TOLERANCE, balanced_ranks
from megatron_s2d.data.sample_bytes import decode_arrays, decode_samples, encode_arrays, encode_samples
from megatron_s2d.records import Sample, WeightVersionSpan


def make_sample(length: int, **fields) -> Sample:
    return Sample(
        id="gsm8k/ä#3@7", prompt_id="gsm8k/ä", group_id="gsm8k/ä@7.0", domain="math", seed=2**63 - 1,
        token_ids=np.arange(length), response_mask=np.arange(length) >= 2, temperature=0.7, finish_reason="stop",
        **fields,
    )  # fmt: skip


def assert_equal(one: Sample, other: Sample) -> None:
    for field in dataclasses.fields(Sample):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f")
        else:
            assert mine == theirs and type(mine) is type(theirs)


def test_samples_survive_bit_for_bit():
    log_probs = np.array([0, -1.5, np.nan, -np.inf, -0.0], dtype=np.float32)
    samples = [
        make_sample(5, rollout_log_probs=log_probs, reward=0.1, weight_versions=(WeightVersionSpan(2, 5, 3),)),
        make_sample(0, verifier_label="no_answer"),
        dataclasses.replace(make_sample(3), token_ids=np.array([1, 2**40, -5])),
    ]
    extra = [{"policy_weight": np.array([0.5, 0.25])}, {}, {"experts": np.zeros((3, 2, 4), np.uint8)}]
    decoded, arrays = decode_samples(encode_samples(samples, extra))
    for sample, other in zip(samples, decoded, strict=True):
        assert_equal(sample, other)
    assert [list(item) for item in arrays] == [["policy_weight"], [], ["experts"]]
    assert np.array_equal(arrays[0]["policy_weight"], [0.5, 0.25]) and arrays[2]["experts"].shape == (3, 2, 4)


def test_arrays_survive_without_samples():
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 4)), np.array([True])]
    for one, other in zip(arrays, decode_arrays(encode_arrays(arrays)), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other)
    assert decode_arrays(encode_arrays([])) == []


def test_a_long_sample_takes_the_bytes_of_its_arrays():
    sample = make_sample(16_384, rollout_log_probs=np.zeros(16_384, np.float32))
    assert 16_384 * (4 + 1 + 4) < len(encode_samples([sample])) < 16_384 * 9 + 1024


@settings(deadline=None, max_examples=80)
@given(
    samples=st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 7)), min_size=1, max_size=60),
    num_ranks=st.integers(1, 8),
)
def test_samples_move_from_crowded_ranks_only_and_towards_balance(samples, num_ranks):
    lengths = [length for length, _ in samples]
    before = [rank % num_ranks for _, rank in samples]
    after = balanced_ranks(lengths, before, num_ranks)
    loads, new_loads = (np.bincount(ranks, weights=lengths, minlength=num_ranks) for ranks in (before, after))
    limit = loads.mean() * (1 + TOLERANCE)
    assert new_loads.max() <= loads.max() and new_loads.sum() == loads.sum()
    for source, target in zip(before, after, strict=True):
        assert source == target or loads[source] > limit >= loads[target]
    if loads.max() <= limit:
        assert after == before


@settings(deadline=None, max_examples=80)
@given(
    samples=st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 7)), min_size=1, max_size=60),
    num_ranks=st.integers(1, 8),
    share=st.sampled_from([0.1, SCORING_SHARE, SHARE]),
)
def test_a_rank_sends_and_receives_a_share_of_its_own_tokens_at_most(samples, num_ranks, share):
    lengths = np.array([length for length, _ in samples])
    before = np.array([rank % num_ranks for _, rank in samples])
    after = np.array(balanced_ranks(lengths.tolist(), before.tolist(), num_ranks, share=share))
    moves = before != after
    loads, sent, received = (
        np.bincount(ranks, weights=lengths[mask], minlength=num_ranks)
        for ranks, mask in ((before, ...), (before[moves], moves), (after[moves], moves))
    )
    assert (sent <= share * loads + 1e-6).all()
    assert (received <= share * np.where(loads == 0, loads.mean(), loads) + 1e-6).all()


def test_the_shares_of_scoring_and_training_are_a_ranks_own_samples():
    assert SCORING_SHARE + SHARE <= 1
    lengths, ranks = [10] * 12, [0] * 10 + [1] * 2  # the second rank takes two of eight
    assert balanced_ranks(lengths, ranks, 2).count(1) == 6
    assert balanced_ranks(lengths, ranks, 2, share=SHARE).count(1) == 3


def test_a_rank_without_samples_gets_some():
    assert balanced_ranks([5, 5, 5, 5], [0, 0, 0, 0], 2, share=SHARE).count(1) == 1
    assert sorted(balanced_ranks([5, 5, 5, 5], [0, 0, 0, 0], 2)) == [0, 0, 1, 1]
    assert balanced_ranks([9, 1], [0, 0], 2) == [0, 1] or balanced_ranks([9, 1], [0, 0], 2) == [1, 0]
    assert balanced_ranks([9], [1], 2) == [1]
