"""Micro-batches: every sample exactly once, equal counts on all data-parallel ranks, one shift to labels."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_s2d.data.grouping import group_into_micro_batches
from megatron_s2d.data.packing import count_micro_batches, pack, plan_micro_batches
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.context_parallel import cp_positions
from megatron_s2d.records import RemoteSample, Sample


def sample(prompt: list[int], response: list[int], **fields) -> Sample:
    length = len(prompt) + len(response)
    return Sample(
        id=fields.pop("id", "s"),
        prompt_id="p",
        group_id="g",
        domain="d",
        seed=0,
        token_ids=np.array(prompt + response),
        response_mask=np.arange(length) >= len(prompt),
        temperature=fields.pop("temperature", 1.0),
        finish_reason="stop",
        **fields,
    )


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    dp_size=st.integers(1, 5),
    max_tokens=st.integers(1, 100),
    alignment=st.sampled_from([1, 2, 4]),
    packed=st.booleans(),
)
def test_every_sample_is_assigned_once_with_equal_counts(lengths, dp_size, max_tokens, alignment, packed):
    samples = [sample([1] * length, []) for length in lengths]
    packing = {"max_tokens": max_tokens, "pad_to_multiple": alignment, "packed": packed}
    plans = plans_by_rank(samples, dp_size, **packing)
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(index for plan in plans for batch in plan for index in batch.indices) == list(range(len(lengths)))
    for batch in (batch for plan in plans for batch in plan):
        rows, columns = batch.shape
        assert len(batch.indices) <= 1 or rows * columns <= max_tokens


def plans_by_rank(samples, dp_size, **packing):
    """The plans of data-parallel ranks that hold the samples in turn."""
    held = [list(range(rank, len(samples), dp_size)) for rank in range(dp_size)]
    count = max(count_micro_batches(samples, indices, **packing)[None] for indices in held)
    return [plan_micro_batches(samples, indices, {None: count}, **packing) for indices in held]


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), max_tokens=st.integers(30, 100))
def test_packed_micro_batches_are_more_than_half_full(lengths, max_tokens):
    batches = group_into_micro_batches(lengths, max_tokens=max_tokens, packed=True)
    sizes = sorted(sum(lengths[index] for index in batch) for batch in batches)
    assert len(sizes) == 1 or sizes[0] + sizes[1] > max_tokens  # two that fit together would be one


def test_labels_mask_and_columns_are_shifted_once():
    log_probs = np.array([0, 0, -1, -2], dtype=np.float32)
    (batch,) = pack(
        [
            sample([5, 6], [7, 8], old_log_probs=log_probs, temperature=0.5),
            sample([9], [4], old_log_probs=log_probs[:2]),
        ],
        loss_weights={"policy_weight": np.array([0.25, 0.5])},
        max_tokens=100,
    )
    sequence, rows = batch.shape
    assert (sequence, rows) == (4, 2)

    def grid(values):
        return values.view(sequence, rows).t().tolist()

    assert batch.token_ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert grid(batch.labels) == [[6, 7, 8, 0], [4, 0, 0, 0]]
    assert grid(batch.response_mask) == [[False, True, True, False], [True, False, False, False]]
    assert grid(batch.columns.old_log_probs) == [[0, -1, -2, 0], [0, 0, 0, 0]]
    assert grid(batch.columns.policy_weight) == [[0, 0.25, 0.25, 0], [0.5, 0, 0, 0]]
    assert grid(batch.temperature) == [[0.5] * 4, [1.0] * 4]
    assert batch.num_tokens == 6


def test_unpack_returns_values_by_sample():
    samples = [sample([1, 2], [3, 4, 5]), sample([1], [2])]
    (batch,) = pack(samples, loss_weights={}, max_tokens=100)
    for index, values in zip(batch.indices, batch.unpack(batch.labels), strict=True):
        assert values.tolist() == [0, *samples[index].token_ids[1:].tolist()]


def test_greedy_samples_are_scored_at_temperature_one():
    (batch,) = pack([sample([1], [2], temperature=0.0)], loss_weights={}, max_tokens=10)
    assert batch.temperature == 1.0


def test_rank_without_samples_gets_an_empty_micro_batch_with_the_same_columns():
    other = RemoteSample.of(sample([1], [2], advantages=np.zeros(2, np.float32)), dp_rank=1)
    (empty,) = pack([other], loss_weights={"policy_weight": np.ones(1)}, max_tokens=10)
    assert not empty.indices and empty.num_tokens == 0 and not empty.response_mask.any()
    assert isinstance(empty.columns.advantages, torch.Tensor) and not empty.columns.policy_weight.any()


def test_missing_columns_raise_if_the_sample_has_a_weight():
    complete = sample([1], [2], advantages=np.ones(2, np.float32))
    without = dataclasses.replace(complete, id="other", advantages=None)
    with pytest.raises(UserError, match="sample other has no advantages"):
        pack([complete, without], loss_weights={"policy_weight": np.ones(2)}, max_tokens=10)
    weights = {"policy_weight": np.array([1.0, 0.0]), "supervised_weight": np.array([0.0, 1.0])}
    (batch,) = pack([complete, without], loss_weights=weights, max_tokens=10)
    assert float(batch.columns.advantages.sum()) == 1.0


def test_packed_sequences_predict_nothing_across_their_boundaries():
    log_probs = np.array([9, 0, -1, -2], dtype=np.float32)  # the first would be at the end of the sequence before
    samples = [
        sample([9], [4], old_log_probs=log_probs[:2], temperature=0.5),
        sample([5, 6], [7, 8], old_log_probs=log_probs),
    ]
    (batch,) = pack(
        samples, loss_weights={"policy_weight": np.array([0.25, 0.5])}, max_tokens=100, pad_to_multiple=4, packed=True
    )
    assert batch.indices == (1, 0) and batch.plan.lengths == (4, 2) and batch.shape == (8, 1)
    assert (
        batch.cu_seqlens.tolist() == [0, 4, 6, 8]
        and batch.cu_seqlens.dtype == torch.int32
        and batch.plan.max_seqlen == 4
    )
    assert batch.token_ids.tolist() == [[5, 6, 7, 8, 9, 4, 0, 0]]
    assert batch.padding_mask.tolist() == [[False] * 6 + [True] * 2]
    assert batch.labels.tolist() == [6, 7, 8, 0, 4, 0, 0, 0]
    assert batch.response_mask.tolist() == [False, True, True, False, True, False, False, False]
    assert batch.response_positions.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert batch.columns.old_log_probs.tolist() == [0, -1, -2, 0, 0, 0, 0, 0]
    assert batch.columns.policy_weight.tolist() == [0, 0.5, 0.5, 0, 0.25, 0, 0, 0]
    assert batch.temperature.tolist() == [1.0] * 4 + [0.5] * 2 + [1.0] * 2
    assert batch.num_tokens == 6
    for index, values in zip(batch.indices, batch.unpack(batch.labels), strict=True):
        assert values.tolist() == [0, *samples[index].token_ids[1:].tolist()]


def test_packed_micro_batch_without_samples_is_one_sequence_of_padding():
    other = RemoteSample.of(sample([1], [2]), dp_rank=1)
    (empty,) = pack([other], loss_weights={}, max_tokens=10, pad_to_multiple=4, packed=True)
    assert empty.cu_seqlens.tolist() == [0, 4] and empty.plan.max_seqlen == 4 and empty.num_tokens == 0
    assert empty.padding_mask.all() and empty.unpack(empty.labels) == []


def test_padded_and_packed_layouts_give_the_same_columns():
    """Labels, masks and weights depend on the sample and not on the layout."""
    rng = np.random.default_rng(0)
    samples = [
        sample(list(rng.integers(1, 9, rng.integers(1, 5))), list(rng.integers(1, 9, rng.integers(1, 6))))
        for _ in range(7)
    ]
    weights = {"policy_weight": [rng.random(len(item.token_ids)) for item in samples]}
    layouts = []
    for packed in (False, True):
        batches = pack(samples, loss_weights=weights, max_tokens=20, packed=packed)
        rows = {}
        for batch in batches:
            for name in ("labels", "response_mask", "response_positions"):
                for index, value in zip(batch.indices, batch.unpack(getattr(batch, name)), strict=True):
                    rows[index, name] = value.tolist()
            for index, value in zip(batch.indices, batch.unpack(batch.columns.policy_weight), strict=True):
                rows[index, "policy_weight"] = value.tolist()
        layouts.append(rows)
    assert layouts[0] == layouts[1] and len(layouts[0]) == 28


def test_context_rank_has_a_piece_from_each_end_of_every_sequence():
    """The example in Megatron's documentation, and its other rank."""
    assert cp_positions([0, 4, 8], 2).tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert cp_positions([0, 12], 3).tolist() == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="cannot be split over 2 context-parallel ranks"):
        cp_positions([0, 6], 2)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("pad_to_multiple", [1, 4])
def test_context_ranks_together_match_one_rank(size, pad_to_multiple):
    samples = [sample([5, 6], [7, 8, 9]), sample([9], [4])]
    weights = {"policy_weight": np.array([0.5, 0.25])}
    (full,) = pack(samples, loss_weights=weights, max_tokens=100, packed=True)
    parts = [
        pack(samples, loss_weights=weights, max_tokens=100, pad_to_multiple=pad_to_multiple, packed=True, cp_rank=rank,
             cp_size=size)[0]
        for rank in range(size)
    ]  # fmt: skip
    assert all(part.shape[0] % pad_to_multiple == 0 and part.num_positions == size * part.shape[0] for part in parts)
    assert sum(part.num_tokens for part in parts) == full.num_tokens == 7
    for name in ("labels", "response_mask", "response_positions"):
        gathered = parts[0].gather_from_cp([getattr(part, name) for part in parts])
        for actual, expected in zip(parts[0].unpack(gathered), full.unpack(getattr(full, name)), strict=True):
            assert torch.equal(actual, expected)
        for part in parts:
            assert torch.equal(part.slice_for_cp(gathered), getattr(part, name))
    with pytest.raises(UserError, match="set micro_batch.sequence_packing to true"):
        pack(samples, loss_weights=weights, max_tokens=100, cp_size=size)
