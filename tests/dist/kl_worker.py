"""Compute every case at tensor-parallel sizes 1, 2 and 4 on 4 ranks and save the answers; for test_kl_sharded.py.

Shapes: h hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "kl"))
from kl_problems import combined, make_problem
from kl_sharded_cases import CASES, CONTROLS, Case

from megatron_s2d.kl import fused, merge
from megatron_s2d.kl.fused import linear_divergence
from megatron_s2d.kl.logits import (
    vocab_parallel_divergence,
    vocab_parallel_support,
    vocab_parallel_topk,
)
from megatron_s2d.kl.shards import (
    VocabShard,
    redistribute_output_layer,
)
from megatron_s2d.kl.teachers import HiddenStates, TopK


def student_shard(case: Case, group) -> VocabShard:
    """Return a shard of Megatron's layout, or of uneven cuts with empty shards."""
    size = 1 if group is None else dist.get_world_size(group)
    if case.layout == "padded" or size == 1:
        return VocabShard.of_padded(-(-case.vocab // size) + 2, case.vocab, group)
    if case.layout == "empty":
        return VocabShard.of_padded(case.vocab // 2 + 1, case.vocab, group)
    cuts = {2: [0, 5, case.vocab], 4: [0, 1, 30, 30, case.vocab]}[size]
    rank = dist.get_rank(group)
    return VocabShard(cuts[rank], cuts[rank + 1], case.vocab, group)


def rows_of(weight: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Return the shard's rows and two padding rows of huge numbers."""
    padding = torch.full((2, weight.shape[1]), 1e6, dtype=weight.dtype)
    return torch.cat([weight[shard.start : shard.stop], padding])


def gather_weight(local: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Return the rows of all shards in order of their ids, from every rank's [columns + 2, h]."""
    pieces = [None] * shard.size
    if shard.size == 1:
        return local[: shard.columns]
    dist.all_gather_object(pieces, (shard.start, local[: shard.columns]), group=shard.group)
    return torch.cat([rows for _, rows in sorted(pieces, key=lambda piece: (piece[0], len(piece[1])))])


def teacher_of(case: Case, problem, shard: VocabShard, world):
    """Return hidden states and an output layer stored on four ranks with another padding, or a top-k."""
    dtype = case.dtype
    if case.tail is not None:
        unsharded = VocabShard.unsharded(case.vocab)
        ids, log_probs, tail = vocab_parallel_topk(problem.teacher_logits().to(dtype), 5, unsharded)
        return TopK(ids.int(), log_probs, tail, tail=case.tail, support="union")
    stored = VocabShard.of_padded(-(-case.vocab // 4) + 3, case.vocab, world)
    local = rows_of(problem.teacher_weight.to(dtype), stored)
    weight = redistribute_output_layer(local, stored, shard, world)
    hidden = problem.teacher_hidden.to(dtype)
    if case.sequence_parallel:
        hidden = hidden.chunk(shard.size)[shard.rank].clone()
    return HiddenStates(hidden, weight, problem.teacher_temperature, sequence_parallel=case.sequence_parallel)


def solve(case: Case, group, world) -> dict[str, torch.Tensor]:
    """Solve one case at one size; return loss, outputs, full gradients, counts of collectives, equality of ranks."""
    problem = make_problem(rows=8, vocab=case.vocab, width=6, teacher_width=5, padding=0).rounded()
    shard = student_shard(case, group)
    hidden = problem.hidden.to(case.dtype)
    if case.sequence_parallel:
        hidden = hidden.chunk(shard.size)[shard.rank]
    hidden = hidden.clone().requires_grad_()
    weight = rows_of(problem.weight.to(case.dtype), shard).requires_grad_()
    teacher = teacher_of(case, problem, shard, world)
    columns = -(-case.vocab // shard.size)
    with counted() as forward:
        loss, outputs = linear_divergence(
            hidden, weight, shard=shard, outputs=case.outputs, teacher=teacher, beta=case.beta,
            temperature=problem.temperature, target_ids=problem.target, token_loss=problem.token_loss,
            response_mask=problem.mask, sequence_parallel=case.sequence_parallel,
            chunk_bytes=3 * columns * case.dtype.itemsize * (1 if case.tail else 2),
        )  # fmt: skip
    with counted() as backward:
        loss.backward()
    slope = hidden.grad
    if case.sequence_parallel:
        slope = shard.gather(slope).flatten(0, 1)
    answers = vars_of(outputs)
    answers |= {"loss": loss.detach(), "hidden": slope}
    same = all(bool((shard.gather(value) == value).all()) for value in answers.values())
    answers |= {"weight": gather_weight(weight.grad, shard), "same_bits": torch.tensor(same)}
    answers |= {"padding": weight.grad[shard.columns :].abs().sum()}
    return answers | {"collectives": torch.tensor([*forward, *backward])}


def vars_of(outputs) -> dict[str, torch.Tensor]:
    fields = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return {name: value for name, value in fields.items() if value is not None}


@contextlib.contextmanager
def counted():
    """Count (all-gathers, reductions and broadcasts) inside the block."""
    counts = [0, 0]
    indices = {"all_gather_into_tensor": 0, "all_reduce": 1, "reduce_scatter_tensor": 1, "broadcast": 1}
    with contextlib.ExitStack() as stack:
        for name, index in indices.items():
            original = getattr(dist, name)

            def counting(*args, original=original, index=index, **kwargs):
                counts[index] += 1
                return original(*args, **kwargs)

            stack.enter_context(mock.patch.object(dist, name, counting))
        yield counts


def broken(control: str):
    """Return a patch that breaks one step of the protocol."""
    if control == "no gather":
        return mock.patch.object(
            VocabShard, "gather", lambda self, values: values.expand(self.size, *values.shape).contiguous()
        )
    if control == "no scale":
        original = merge.combine_maxima

        def combine(maxima, residuals):
            maximum, winner, shift, scale, count, residual = original(maxima, residuals)
            return maximum, winner, shift, torch.ones_like(scale), count, residual

        return mock.patch.object(merge, "combine_maxima", combine)
    if control == "no hidden reduction":
        return mock.patch.object(fused, "reduce_hidden", lambda partial, *_: partial)
    raise ValueError(control)


def autograd_through_collectives(group, blind: bool) -> dict[str, torch.Tensor]:
    """Return forward KL with autograd through the all-reduce: correct value, wrong gradient."""
    from torch.distributed.nn.functional import all_reduce as differentiable

    problem = make_problem(rows=8, vocab=37, padding=0)
    shard = VocabShard.of_padded(-(-37 // dist.get_world_size(group)), 37, group)
    z = (problem.hidden @ problem.weight.T)[:, shard.start : shard.stop].clone().requires_grad_()
    y = problem.teacher_logits()
    log_q = torch.log_softmax(y, -1)[:, shard.start : shard.stop]

    def total(values):
        if not blind:
            return differentiable(values.clone(), group=group)
        values = values.clone()
        dist.all_reduce(values.detach(), group=group)  # in place on shared storage: autograd sees an identity
        return values

    log_p = z - total(z.exp().sum(1, keepdim=True)).log()
    loss = total((log_q.exp() * (log_q - log_p)).sum(1)).sum()
    loss.backward()
    pieces = [None] * shard.size
    dist.all_gather_object(pieces, z.grad, group=group)
    return {"loss": loss.detach(), "logits": torch.cat(pieces, 1)}


def existing_logits(group) -> dict[str, torch.Tensor]:
    """Return divergences of existing logits with per-token gradients, and top-k across shards."""
    problem = make_problem(rows=8, vocab=37, padding=0)
    shard = VocabShard.of_padded(-(-37 // dist.get_world_size(group)), 37, group)
    local = slice(shard.start, shard.stop)
    z = (problem.hidden @ problem.weight.T)[:, local].clone().requires_grad_()
    y = problem.teacher_logits()[:, local]
    teacher = HiddenStates(problem.teacher_hidden, problem.teacher_weight[local], problem.teacher_temperature)
    outputs = vocab_parallel_divergence(
        z, teacher, shard, ("reverse_kl", "jsd", "log_probs"), beta=0.3, temperature=0.7, target_ids=problem.target
    )
    (combined(outputs, torch.arange(8)) * problem.loss_weights).sum().backward()
    pieces = [None] * shard.size
    dist.all_gather_object(pieces, z.grad, group=group)
    with counted() as counts:
        ids, log_probs, tail = vocab_parallel_topk(y, 12, shard)
    support_log_probs, support_tail = vocab_parallel_support(y, ids, shard)
    return {
        "logits": torch.cat(pieces, 1), "ids": ids, "log_probs": log_probs, "tail": tail,
        "support_log_probs": support_log_probs, "support_tail": support_tail, "collectives": torch.tensor(counts),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    world, rank = dist.group.WORLD, dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {1: None, 2: pairs[rank // 2], 4: world}
    results: dict[str, dict[str, torch.Tensor]] = {}
    for name, case in CASES.items():
        for size in case.sizes:
            results[f"{name}/{size}"] = solve(case, groups[size], world)
    results["repeat/4"] = solve(CASES["all"], world, world)
    for control, name in CONTROLS.items():
        with broken(control):
            results[f"{control}/4"] = solve(CASES[name], world, world)
    for size in (2, 4):
        results[f"blind/{size}"] = autograd_through_collectives(groups[size], blind=True)
        results[f"differentiable/{size}"] = autograd_through_collectives(groups[size], blind=False)
        results[f"existing/{size}"] = existing_logits(groups[size])
    if rank == 0:
        torch.save(results, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
