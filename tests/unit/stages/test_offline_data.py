"""The order and the loss weights of samples that exist already: SFT and cached responses."""

import pytest

from megatron_s2d.stages.sft import OfflineSource, longest_response, shuffled


def test_every_epoch_has_another_order_of_all_samples(fakes):
    samples = [fakes.sample(str(index), 2) for index in range(20)]
    read = shuffled(samples, seed=5)
    epochs = [[sample.id for sample in read(start, 20)] for start in (0, 20, 40)]
    assert all(sorted(epoch) == sorted(sample.id for sample in samples) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_do_not_depend_on_how_they_are_read(fakes):
    read = shuffled([fakes.sample(str(index), 2) for index in range(7)], seed=5)
    at_once = [sample.id for sample in read(3, 15)]
    assert at_once == [sample.id for start in range(3, 18, 5) for sample in read(start, 5)]
    assert at_once != [sample.id for sample in shuffled(read(0, 7), seed=6)(3, 15)]


def test_steps_read_consecutive_batches_with_normalised_weights(fakes):
    samples = [fakes.sample(str(index), 1 + index) for index in range(6)]
    source = OfflineSource(lambda start, count: samples[start : start + count], 2, "token_mean", 6, "supervised_weight")
    (batch,) = source.step(2).mini_batches
    assert [sample.id for sample in batch.samples] == ["2", "3"]
    assert batch.loss_weights["supervised_weight"] == pytest.approx([1 / 7, 1 / 7])


def test_sum_norm_divides_by_the_same_length_at_every_step(fakes):
    samples = [fakes.sample(str(index), 1 + index) for index in range(6)]
    source = OfflineSource(
        lambda start, count: samples[start : start + count], 2, "seq_mean_token_sum_norm", 10, "supervised_weight"
    )
    for step in (1, 2, 3):
        (batch,) = source.step(step).mini_batches
        assert batch.loss_weights["supervised_weight"] == pytest.approx([1 / 20, 1 / 20])


def test_the_default_length_is_the_longest_of_the_data(fakes):
    assert longest_response([fakes.sample(str(length), length) for length in (3, 9, 4)]) == 9
