"""Teachers of other layouts on four ranks: where their states go, and what training on them gives; writes JSON.

Started by test_hidden_state_transfer.py through torchrun; arguments are the output file and pairs STUDENT:TEACHER of layouts
as in training_worker.py. Beside the product stands the plain way: every rank is given the states of all samples.
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
from training_worker import parse_layout, policy, samples, train, weights

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from memory import peak_bytes

from megatron_s2d.data.packing import MiniBatch
from megatron_s2d.kl.shards import redistribute_output_layer
from megatron_s2d.kl.teachers import HiddenStates, LazyHiddenStates
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.parallel import p2p
from megatron_s2d.parallel.collectives import gather_dicts
from megatron_s2d.parallel.layout import build_layout, initialize_distributed, shutdown_distributed
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter, TopKTeacher

SCENARIOS = ("full", "few_samples", "by_domain", "geometric", "topk")
OBJECT_COLLECTIVES = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


class Everywhere:
    """``TeacherRouter`` the plain way: all states on every rank, all positions, the output layer cut anew every time."""

    def __init__(self, teachers: TeacherRouter, waiting: bool):
        self.teachers, self.waiting = teachers, waiting

    def distributions(self, student, update, batches):
        states, layers = {}, {}
        for domain in sorted({sample.domain for sample in update.samples}) if self.teachers.is_routed else [None]:
            chosen = [i for i, sample in enumerate(update.samples) if domain in (None, sample.domain)]
            with self.teachers.model_for(domain) as model:
                states |= all_states(model, update, chosen)
                last = model.layout.is_pipeline_last_stage
                held = (model.output_weight.detach(), model.shard) if last else (None, None)
                layers[domain] = redistribute_output_layer(*held, student.shard, dist.group.WORLD)
        return [self.source(student, batch, states, layers) for batch in batches]

    def source(self, student, batch, states, layers):
        if not student.layout.is_pipeline_last_stage:
            return None
        weight = layers[batch.domain if self.teachers.is_routed else None]
        sequence, rows = batch.shape
        hidden = torch.zeros(sequence, rows, weight.shape[1])
        for row, index in enumerate(batch.indices):
            hidden[: len(states[index]) - 1, row] = states[index][1:]
        hidden = hidden.flatten(0, 1)
        if self.waiting:
            return LazyHiddenStates(lambda: hidden[batch.response_mask], lambda: weight, batch.temperature)
        return HiddenStates(hidden, weight, batch.temperature)


def all_states(model, update, chosen) -> dict[int, torch.Tensor]:
    batches = model.pack([update.samples[i] for i in chosen], {})
    found = {}
    for batch, hidden in zip(batches, model.hidden_states(batches), strict=True):
        if model.layout.is_pipeline_last_stage:
            rows = batch.unpack(model.gather_sequence_parallel(hidden))
            found |= (
                {chosen[i]: value for i, value in zip(batch.indices, rows, strict=True)} if model.layout.is_dp_leader else {}
            )
    return gather_dicts(found)


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


def losses(scenario: str, layouts, *, plain: bool) -> list[dict[str, float]]:
    batch, student, teachers, references = models(scenario, *layouts)
    if plain:
        teachers = Everywhere(teachers, waiting=scenario == "topk")
        references = references and Everywhere(references, waiting=False)
    tail = "bucket" if scenario == "topk" else None
    source = FullTeacher(student, teachers, references, 1.5 if references else 1.0)
    if tail:
        source = TopKTeacher(student, teachers, 5, "union", tail)
    columns = {"divergence_weight": weights(batch, "token_mean")}
    objective = divergence_objective("forward_kl" if tail else "reverse_kl", tail=tail)
    return train(student, batch, objective, columns, source)


@contextlib.contextmanager
def counted():
    """Bytes received in the exchange, and calls of collectives that send objects or output layers."""
    found = Counter()
    send, run = dist.batch_isend_irecv, p2p.p2p_exchange

    def batched(operations):
        found["received"] += sum(op.tensor.nbytes for op in operations if op.op is dist.irecv)
        return send(operations)

    def exchanged(*args, **kwargs):  # pipelines send point to point too
        with mock.patch.object(dist, "batch_isend_irecv", batched):
            run(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(p2p, "p2p_exchange", exchanged))
        for name in (*OBJECT_COLLECTIVES, "broadcast"):
            calls = stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name)))
            stack.callback(lambda name=name, calls=calls: found.update({name: calls.call_count}))
        yield found


def transport(scenario: str, layouts) -> list[dict]:
    """Of every rank, in the second of two updates: what arrives, what is kept, and whether it is what it should be."""
    batch, student, teachers, _ = models(scenario, *layouts)
    update = MiniBatch(batch, {})
    batches = student.pack(batch, {})
    teachers.distributions(student, update, batches)
    with counted() as found:
        sources = teachers.distributions(student, update, batches)
    expected = Everywhere(teachers, waiting=True).distributions(student, update, batches)
    width = teachers.models[next(iter(teachers.models))].spec.hidden_size
    kept, due, whole, same = 0, 0, 0, True
    for item, source, other in zip(batches, sources, expected, strict=True):
        if source is None:
            continue
        size, rank = student.layout.tp_size, student.layout.tp_rank
        part = -(-item.labels.numel() // size)
        due += int(item.response_mask[rank * part : (rank + 1) * part].sum()) * width * 4
        whole += int(item.response_mask.sum()) * width * 4
        kept += source.hidden.__self__.part.untyped_storage().nbytes()
        same &= torch.equal(source.hidden(), other.hidden())
        same &= torch.equal(source.weight_shard(), other.weight_shard())
    sums = Counter(received=found["received"], kept=kept, due=due, whole=whole)
    objects = sum(found[name] for name in OBJECT_COLLECTIVES)
    mine = dict(sums) | {"same": same, "objects": objects, "broadcasts": found["broadcast"], "width": width}
    mine |= {
        "update": sum(s.response_length for s in batch) * width * 4,
        "student": [student.layout.dp_rank, student.layout.is_pipeline_last_stage],
        "computes": [teachers.models[next(iter(teachers.models))].layout.is_pipeline_last_stage],
    }
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def bucketed() -> list[dict]:
    """4 MiB from every rank to the next but one and to itself, a quarter of a MiB at a time, into uneven blocks."""
    rank, size, rows = dist.get_rank(), dist.get_world_size(), 8192
    values = [torch.full((rows, 64), float(i)) + torch.arange(rows).unsqueeze(1) / rows for i in range(size)]
    target, source = (rank + 2) % size, (rank - 2) % size
    sent = {target: values[rank], rank: values[rank]}
    kept = {r: [torch.zeros(n, 64) for n in (1, 0, 5000, rows - 5001)] for r in (source, rank)}
    peak = peak_bytes(lambda: p2p.p2p_exchange(sent, kept, partners=2, bucket_bytes=1 << 18))
    same = all(torch.equal(torch.cat(blocks), values[r]) for r, blocks in kept.items())
    everyone = [None] * size
    dist.all_gather_object(everyone, {"same": same, "peak": peak})
    return everyone


def main() -> None:
    torch.set_num_threads(1)
    output, *names = sys.argv[1:]
    initialize_distributed()
    layouts = {part: build_layout(parse_layout(part)) for name in names for part in re.split(":", name)}
    found: dict = {"bucketed": bucketed()}
    for name in names:
        pair = tuple(layouts[part] for part in name.split(":"))
        for scenario in SCENARIOS:
            found[f"{name}/{scenario}"] = {
                "losses": losses(scenario, pair, plain=False),
                "plain": losses(scenario, pair, plain=True),
                "transport": transport(scenario, pair),
            }
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    shutdown_distributed()


if __name__ == "__main__":
    main()
