"""Two vocabulary shards in one process: the shards' parts of values and gradients are put together, nothing is lost.

The ranks are threads with the process group that PyTorch tests its own collectives with; tests/dist has real ranks.
"""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist
from kl_problems import WITH_TEACHER, make_problem
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.kl.teachers import HiddenStates

ROWS, VOCAB = 8, 37


def on_two_ranks(function):
    """Return the results of ``function()`` on two ranks of the default group."""
    results, errors = [None, None], []

    def run(rank, store):
        try:
            dist.init_process_group("threaded", rank=rank, world_size=2, store=store)
            results[rank] = function()
        except BaseException as error:
            errors.append(error)
            ProcessLocalGroup.exception_handle(error)  # wakes the other rank
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    isolate = torch._C._distributed_c10d._set_thread_isolation_mode
    isolate(True)
    world = _install_threaded_pg()
    world.comms = []  # read when a group is destroyed
    store = dist.HashStore()
    try:
        threads = [threading.Thread(target=run, args=(rank, store), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        _uninstall_threaded_pg()
        ProcessLocalGroup.reset()
        isolate(False)
    if errors:
        raise errors[0]
    return results


def solve(problem, shard, sequence_parallel):
    """Return (loss, outputs, gradient of the hidden states, gradient of the shard's rows)."""

    def of_rank(values):
        return values.chunk(shard.size)[shard.rank].clone() if sequence_parallel else values.clone()

    hidden = of_rank(problem.hidden).requires_grad_()
    weight = problem.weight[shard.start : shard.stop].clone().requires_grad_()
    teacher = HiddenStates(
        of_rank(problem.teacher_hidden),
        problem.teacher_weight[shard.start : shard.stop],
        problem.teacher_temperature,
        sequence_parallel=sequence_parallel,
    )
    loss, outputs = linear_divergence(
        hidden,
        weight,
        shard=shard,
        outputs=WITH_TEACHER,
        teacher=teacher,
        temperature=problem.temperature,
        target_ids=problem.target,
        token_loss=problem.token_loss,
        response_mask=problem.mask,
        sequence_parallel=sequence_parallel,
    )
    loss.backward()
    return loss.detach(), vars(outputs), hidden.grad, weight.grad


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_shards_give_the_values_and_gradients_of_one(sequence_parallel):
    problem = make_problem(rows=ROWS, vocab=VOCAB, padding=0)
    loss, outputs, hidden, weight = solve(problem, VocabShard.unsharded(VOCAB), False)

    def sharded():
        return solve(problem, VocabShard.of_padded(20, VOCAB, dist.group.WORLD), sequence_parallel)

    ranks = on_two_ranks(sharded)
    for rank_loss, rank_outputs, _, _ in ranks:
        assert float(rank_loss) == pytest.approx(float(loss), rel=1e-12)
        for name in WITH_TEACHER:
            torch.testing.assert_close(rank_outputs[name], outputs[name], rtol=1e-10, atol=1e-12)
    gradients = [rank[2] for rank in ranks]
    pieces = torch.cat(gradients) if sequence_parallel else gradients[0]
    torch.testing.assert_close(pieces, hidden, rtol=1e-10, atol=1e-12)
    if not sequence_parallel:
        torch.testing.assert_close(gradients[1], hidden, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), weight, rtol=1e-10, atol=1e-12)
