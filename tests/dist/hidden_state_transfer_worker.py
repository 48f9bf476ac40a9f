"""Teachers of other layouts on four ranks: which rank keeps which hidden states, and the losses; writes JSON.

Started by test_hidden_state_transfer.py through torchrun; arguments are the output file and pairs STUDENT:TEACHER of
layouts as in training_worker.py. The reference implementation gathers the states of all samples on every rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from training_worker import parse_layout, policy, samples, train, union, weights

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from memory import peak_bytes

from megatron_s2d.arithmetic import ceil_div
from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.data.sample_exchange import keep_own, move_samples, ranks_in_layout
from megatron_s2d.kl.shards import redistribute_output_layer
from megatron_s2d.kl.teachers import HiddenStates, LazyHiddenStates
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.parallel import p2p
from megatron_s2d.parallel.layout import build_layout, initialize_distributed, shutdown_distributed
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter, TopKTeacher

SCENARIOS = ("full", "few_samples", "by_domain", "geometric", "topk")
OBJECT_COLLECTIVES = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


class GatheredTeachers:
    """Reference for ``TeacherRouter``: all states on every rank, the output layer resharded every time."""

    def __init__(self, teachers: TeacherRouter, lazy: bool):
        self.teachers, self.lazy = teachers, lazy

    def distributions(self, student, mini_batch, micro_batches):
        states, weights = {}, {}
        samples = mini_batch.samples
        for domain in sorted({sample.domain for sample in samples}) if self.teachers.is_routed else [None]:
            indices = [i for i, sample in enumerate(samples) if domain in (None, sample.domain)]
            with self.teachers.model_for(domain) as model:
                states |= all_states(model, samples, indices, student.layout)
                is_last = model.layout.is_pipeline_last_stage
                local_rows = (model.output_weight.detach(), model.shard) if is_last else (None, None)
                weights[domain] = redistribute_output_layer(*local_rows, student.shard, dist.group.WORLD)
        return [self.source(student, batch, states, weights) for batch in micro_batches]

    def source(self, student, batch, states, weights):
        if not student.layout.is_pipeline_last_stage:
            return None
        weight = weights[batch.domain if self.teachers.is_routed else None]
        length, num_rows = batch.shape
        hidden = torch.zeros(length, num_rows, weight.shape[1])
        for row, index in enumerate(batch.indices):
            hidden[: len(states[index]) - 1, row] = states[index][1:]
        hidden = hidden.flatten(0, 1)
        if self.lazy:
            return LazyHiddenStates(lambda: hidden[batch.response_mask], lambda: weight, batch.temperature)
        return HiddenStates(hidden, weight, batch.temperature)


def all_states(model, samples, indices, holders) -> dict[int, torch.Tensor]:
    """Return the hidden states of ``samples[indices]``, held by the layout ``holders``, by index, on every rank."""
    selected = [samples[i] for i in indices]
    ranks = ranks_in_layout(selected, holders, model.layout)
    batches = model.pack(move_samples(selected, holders, model.layout, ranks)[0], {})
    states = {}
    for batch, hidden in zip(batches, model.hidden_states(batches), strict=True):
        if model.layout.is_pipeline_last_stage:
            rows = batch.unpack(model.gather_sequence_parallel(hidden))
            if model.layout.is_dp_leader:
                states |= {indices[i]: value for i, value in zip(batch.indices, rows, strict=True)}
    return union(states)


def models(scenario: str, student_layout, teacher_layout):
    """(samples, student, teachers, references)."""
    batch = samples(2 if scenario == "few_samples" else 13)
    batch = [dataclasses.replace(s, temperature=(1.0, 0.7)[i % 3 == 0]) for i, s in enumerate(batch)]
    student = policy("tiny-student", student_layout, 5)
    # Other micro-batches than the student's, so that rows of one come from several; of one layout they are the same.
    max_tokens = 40 if teacher_layout is student_layout else 23
    teachers = {None: policy("tiny-teacher", teacher_layout, 4, max_tokens)}
    if scenario == "by_domain":
        batch = [dataclasses.replace(s, domain=("test", "other")[i % 2]) for i, s in enumerate(batch)]
        student.packs_by_domain = True
        teachers = {"test": teachers[None], "other": policy("tiny-teacher", student_layout, 6)}
    references = {None: policy("tiny-teacher", student_layout, 7)} if scenario == "geometric" else {}
    for model in [*teachers.values(), *references.values()]:
        model.freeze()
    return batch, student, TeacherRouter(teachers), TeacherRouter(references) if references else None


def losses(scenario: str, layouts, *, gathered: bool) -> list[dict[str, float]]:
    """Losses and gradient norms of two updates. gathered: with the reference implementation."""
    batch, student, teachers, references = models(scenario, *layouts)
    if gathered:
        teachers = GatheredTeachers(teachers, lazy=scenario == "topk")
        references = references and GatheredTeachers(references, lazy=False)
    tail = "bucket" if scenario == "topk" else None
    source = FullTeacher(student, teachers, references, 1.5 if references else 1.0)
    if tail:
        source = TopKTeacher(student, teachers, 5, "union", tail)
    columns = {"divergence_weight": weights(batch, "token_mean")}
    objective = divergence_objective("forward_kl" if tail else "reverse_kl", tail=tail)
    return train(student, batch, objective, columns, source, pickles=gathered)


@contextlib.contextmanager
def count_traffic():
    """Count the bytes received by p2p_exchange, and the calls of collectives that send objects or output layers."""
    counts = Counter()
    send, exchange = dist.batch_isend_irecv, p2p.p2p_exchange

    def counted_send(operations):
        counts["received"] += sum(
            op.tensor.nbytes for op in operations if op.op is dist.irecv and op.tensor.is_floating_point()
        )  # without the samples themselves
        return send(operations)

    def counted_exchange(*args, **kwargs):  # pipelines send point to point too
        with mock.patch.object(dist, "batch_isend_irecv", counted_send):
            exchange(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(p2p, "p2p_exchange", counted_exchange))
        for name in OBJECT_COLLECTIVES:
            calls = stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name)))
            stack.callback(lambda name=name, calls=calls: counts.update({name: calls.call_count}))
        broadcasts = stack.enter_context(mock.patch.object(dist, "broadcast", wraps=dist.broadcast))
        yield counts
        counts["broadcast"] = sum(call.args[0].is_floating_point() for call in broadcasts.call_args_list)


def transport(scenario: str, layouts) -> list[dict]:
    """Return for every rank, in the second of two updates, what it receives and keeps, and whether the values agree."""
    batch, student, teachers, _ = models(scenario, *layouts)
    mini_batch = MiniBatch(keep_own(batch, student.layout), {})
    micro_batches = student.pack(mini_batch.samples, {})
    teachers.distributions(student, mini_batch, micro_batches)
    with count_traffic() as counts:
        sources = teachers.distributions(student, mini_batch, micro_batches)
    expected = GatheredTeachers(teachers, lazy=True).distributions(student, mini_batch, micro_batches)
    teacher = next(iter(teachers.models.values()))
    row_bytes = teacher.spec.hidden_size * 4
    stored, expected_stored, all_rows, same = 0, 0, 0, True
    for micro_batch, source, reference in zip(micro_batches, sources, expected, strict=True):
        if source is None:
            continue
        rank = student.layout.tp_rank
        size = ceil_div(micro_batch.labels.numel(), student.layout.tp_size)
        expected_stored += int(micro_batch.response_mask[rank * size : (rank + 1) * size].sum()) * row_bytes
        all_rows += int(micro_batch.response_mask.sum()) * row_bytes
        stored += source.hidden.__self__.block.untyped_storage().nbytes()
        # The reference packs the samples of a domain by themselves, into other micro-batches: equal up to rounding.
        atol = 1e-5 if scenario == "by_domain" else 0.0
        same &= torch.allclose(source.hidden(), reference.hidden(), rtol=0, atol=atol)
        same &= torch.equal(source.weight_shard(), reference.weight_shard())
    report = {
        "received": counts["received"],
        "stored": stored,
        "expected_stored": expected_stored,
        "all_rows": all_rows,
        "same": same,
        "objects": sum(counts[name] for name in OBJECT_COLLECTIVES),
        "broadcasts": counts["broadcast"],
        "mini_batch": sum(sample.response_length for sample in batch) * row_bytes,
        "student": [student.layout.dp_rank, student.layout.is_pipeline_last_stage],
        "computes": teacher.layout.is_pipeline_last_stage,
    }
    return all_ranks(report)


def bucketed() -> list[dict]:
    """4 MiB from every rank to the next but one and to itself, a quarter of a MiB at a time, into uneven blocks."""
    rank, world_size, num_rows = dist.get_rank(), dist.get_world_size(), 8192
    values = [
        torch.full((num_rows, 64), float(i)) + torch.arange(num_rows).unsqueeze(1) / num_rows for i in range(world_size)
    ]
    target, source = (rank + 2) % world_size, (rank - 2) % world_size
    sent = {target: values[rank], rank: values[rank]}
    received = {peer: [torch.zeros(n, 64) for n in (1, 0, 5000, num_rows - 5001)] for peer in (source, rank)}
    peak = peak_bytes(lambda: p2p.p2p_exchange(sent, received, partners=2, bucket_bytes=1 << 18))
    same = all(torch.equal(torch.cat(blocks), values[peer]) for peer, blocks in received.items())
    return all_ranks({"same": same, "peak": peak})


def all_ranks(report: dict) -> list[dict]:
    """Return the reports of all ranks."""
    reports: list = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports


def main() -> None:
    torch.set_num_threads(1)
    output, *names = sys.argv[1:]
    initialize_distributed()
    layouts = {part: build_layout(parse_layout(part)) for name in names for part in re.split(":", name)}
    results: dict = {"bucketed": bucketed()}
    for name in names:
        pair = tuple(layouts[part] for part in name.split(":"))
        for scenario in SCENARIOS:
            results[f"{name}/{scenario}"] = {
                "losses": losses(scenario, pair, gathered=False),
                "gathered": losses(scenario, pair, gathered=True),
                "transport": transport(scenario, pair),
            }
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    shutdown_distributed()


if __name__ == "__main__":
    main()
