"""Lengths of micro-batches: blocks of FP8 recipes on every shard, and one length with overlapped communication."""

import numpy as np
import pytest

from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.config.precision import Fp8Config
from megatron_s2d.data.packing import plan_micro_batches
from megatron_s2d.errors import UserError
from megatron_s2d.records import Sample
from megatron_s2d.train.alignment import check_lengths, length_multiple

TP4 = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)


def sample(name: str, length: int) -> Sample:
    return Sample(
        id=name,
        prompt_id=name,
        group_id=name,
        domain="math",
        seed=0,
        token_ids=np.zeros(length, np.int64),
        response_mask=np.arange(length) > 0,
        temperature=1.0,
        finish_reason="stop",
    )


def test_each_shard_fills_the_blocks_of_the_recipe():
    assert length_multiple(ParallelConfig(), None, None) == 1
    assert length_multiple(TP4, None, None) == 4
    assert length_multiple(TP4, Fp8Config(recipe="blockwise"), None) == 4 * 128


@pytest.mark.parametrize(
    ("parallel", "fp8", "limit", "length"),
    [
        (TP4, None, 1002, 1000),
        (TP4, Fp8Config(), 1002, 960),
        (TP4.model_copy(update={"context_parallel_size": 2}), None, 1002, 1000),
        (TP4, Fp8Config(), 10, 64),  # at least one block on each shard
    ],
)
def test_overlapped_micro_batches_have_one_length(parallel, fp8, limit, length):
    assert length_multiple(parallel, fp8, limit) == length
    cp_size = parallel.context_parallel_size
    samples = [sample(str(index), size) for index, size in enumerate((3, 40, 17, 59, 1, 30))]
    packing = {"max_tokens": length, "pad_to_multiple": length, "packed": True, "cp_size": cp_size}
    plans = plan_micro_batches(samples, range(len(samples)), {None: 3}, **packing)
    assert {plan.shape for plan in plans} == {(1, length * cp_size)}


def test_a_sample_longer_than_every_micro_batch_is_refused():
    check_lengths([sample("a", 64)], 64)
    with pytest.raises(UserError, match=r"sample b has 65 tokens.* every micro-batch has 64: raise micro_batch"):
        check_lengths([sample("a", 64), sample("b", 65)], 64)
