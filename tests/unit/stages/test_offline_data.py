"""The order, the ranks and the loss weights of samples that exist already: SFT and cached responses."""

import types

import numpy as np
import pytest
from toy_models import LAYOUT

from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.sample_exchange import keep_own
from megatron_s2d.data.stored_samples import JoinedSamples, ListedSamples, OfflineSamples
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.stages.sft import OfflineSource, SolutionSamples, shuffled, solution_sample


def consecutive(samples):
    return OfflineSamples(ListedSamples(samples.__getitem__), lambda start, count: range(start, start + count))


def test_every_epoch_has_another_order_of_all_samples():
    order = shuffled(20, seed=5)
    epochs = [order(start, 20) for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_batches_do_not_depend_on_how_they_are_read():
    order = shuffled(7, seed=5)
    at_once = order(3, 15)
    assert at_once == [index for start in range(3, 18, 5) for index in order(start, 5)]
    assert at_once != shuffled(7, seed=6)(3, 15)


def test_steps_read_consecutive_batches_with_normalised_weights(fakes):
    samples = [fakes.sample(str(index), 1 + index) for index in range(6)]
    source = OfflineSource(consecutive(samples), 2, "token_mean", 6, "supervised_weight", LAYOUT)
    (batch,) = source.step(2).mini_batches
    assert [sample.id for sample in batch.samples] == ["2", "3"]
    assert batch.loss_weights["supervised_weight"] == pytest.approx([1 / 7, 1 / 7])


def test_sum_norm_divides_by_the_same_length_at_every_step(fakes):
    samples = [fakes.sample(str(index), 1 + index) for index in range(6)]
    source = OfflineSource(consecutive(samples), 2, "seq_mean_token_sum_norm", 10, "supervised_weight", LAYOUT)
    for step in (1, 2, 3):
        (batch,) = source.step(step).mini_batches
        assert batch.loss_weights["supervised_weight"] == pytest.approx([1 / 20, 1 / 20])


def prompt(index: int, solution: int) -> Prompt:
    tokens = np.arange(2 + index % 3)
    return Prompt(f"p{index}", tokens, "", "math", None, None, np.arange(solution) if solution else None)


def test_ranks_read_their_solutions_and_know_the_others(monkeypatch):
    """As if every rank had read all of them; tokens of the others are not touched."""
    prompts = [prompt(index, 1 + 7 * index % 11) for index in range(8)]
    stored, order = SolutionSamples(PromptTable.of(prompts)), [3, 0, 7, 5, 1]
    read: list[str] = []
    original = PromptTable.__getitem__
    monkeypatch.setattr(PromptTable, "__getitem__", lambda self, index: read.append(index) or original(self, index))
    for rank in range(3):
        layout = types.SimpleNamespace(dp_rank=rank, dp_size=3)
        samples = OfflineSamples(stored, lambda start, count: order[start : start + count]).read(0, 5, layout)
        expected = keep_own([solution_sample(prompts[index]) for index in order], layout)
        own = [isinstance(sample, type(solution_sample(prompts[0]))) for sample in expected]
        for sample, other, is_own in zip(samples, expected, own, strict=True):
            if is_own:
                assert sample.id == other.id and np.array_equal(sample.token_ids, other.token_ids)
            else:
                assert sample == other
    assert sorted(read) == sorted(order)  # each by one rank


def test_prompt_without_a_solution_is_an_error():
    stored = SolutionSamples(PromptTable.of([prompt(0, 3), prompt(1, 0)]))
    with pytest.raises(UserError, match="p1 has no reference solution"):
        stored.lengths([0, 1])


def test_joined_stores_are_read_one_after_the_other(fakes):
    lists = [[fakes.sample(f"{name}{n}", 1 + n) for n in range(size)] for name, size in (("a", 3), ("b", 1), ("c", 2))]
    joined = JoinedSamples([ListedSamples(samples.__getitem__) for samples in lists], [3, 1, 2])
    flat = [sample for samples in lists for sample in samples]
    assert [joined.read([index], [0], 0)[0].id for index in range(6)] == [sample.id for sample in flat]
    assert joined.lengths(range(6)).tolist() == [sample.length for sample in flat]
