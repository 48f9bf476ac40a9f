"""Trains tiny students against a served teacher and against the same teacher in the trainer, at the named layouts.

Started by test_teacher_service.py through torchrun. ``save DIRECTORY`` writes the teacher; otherwise the arguments are
the output file, the address of its server, and layouts, each followed by = and what to compare.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import training_worker as worker
import view_scenarios
from open_layout import open_layout

from megatron_s2d.config.teacher_service import TeacherServiceConfig
from megatron_s2d.data.sample_exchange import keep_own
from megatron_s2d.objectives.distill import divergence_objective
from megatron_s2d.parallel.layout import Layout, initialize_distributed, shutdown_distributed
from megatron_s2d.teachers.frozen import FullTeacher, TeacherRouter, TopKTeacher
from megatron_s2d.teachers.service.client import TeacherClient
from megatron_s2d.teachers.service.teachers import ServiceTeachers, ServiceTopK, Wanted

TEACHER = ("tiny-teacher", 4)


def save(directory: str) -> None:
    with open_layout(worker.parse_layout("tp1")) as layout:
        teacher = worker.policy(TEACHER[0], layout, TEACHER[1], max_tokens=29)
        teacher.save(directory, {}, with_optimizer=False)


def connected(url: str, **settings) -> TeacherClient:
    client = TeacherClient(TeacherServiceConfig(url=url, **settings), "test")
    client.connect()
    return client


def with_groups() -> list:
    """Samples of two domains and temperatures, in groups of two or three."""
    return [
        dataclasses.replace(sample, group_id=f"{sample.domain}{sample.group_id}") for sample in view_scenarios.batch()
    ]


def served(layout: Layout, url: str, kind: str, *, overlap: bool = True):
    """Loss and gradient norm of two updates; of ``sampled`` the scores."""
    student = view_scenarios.untrained_student(layout)
    batch = with_groups()
    by_domain = kind == "by_domain"
    wanted = {
        "sampled": Wanted("sampled"), "full": Wanted("hidden"), "by_domain": Wanted("hidden"),
        "top_k_teacher": Wanted("top_k", 3), "top_k_student": Wanted("top_k", 3, "student"),
        "top_k_union": Wanted("top_k", 3, "union"),
    }[kind]  # fmt: skip
    client = connected(url, overlap=overlap)
    clients = {"test": client, "other": client} if by_domain else {None: client}
    views = view_scenarios.views("other" if by_domain else None)
    teachers = ServiceTeachers(clients, student, wanted, views)
    try:
        teachers.read_output_layers()
        own = keep_own(batch, layout)
        if kind == "sampled":
            teachers.begin_step(own)
            return scores_of(teachers.score(own, holders=layout), layout)
        student.packs_by_domain = by_domain
        teachers.begin_step(own)
        if kind.startswith("top_k"):
            return train(student, batch, ServiceTopK(student, teachers, "bucket"), top_k=True)
        return train(student, batch, FullTeacher(student, teachers))
    finally:
        teachers.close()


def in_trainer(layout: Layout, kind: str):
    student, teacher = view_scenarios.models(layout, layout)
    by_domain = kind == "by_domain"
    models = {"test": teacher, "other": teacher} if by_domain else {None: teacher}
    router = TeacherRouter(models, view_scenarios.views("other" if by_domain else None))
    batch = with_groups()
    if kind == "sampled":
        return scores_of(router.score(keep_own(batch, layout), holders=layout), layout)
    student.packs_by_domain = by_domain
    if kind.startswith("top_k"):
        source = TopKTeacher(student, router, 3, kind.removeprefix("top_k_"), "bucket")
        return train(student, batch, source, top_k=True)
    return train(student, batch, FullTeacher(student, router))


def train(student, batch, source, *, top_k: bool = False):
    columns = {"divergence_weight": worker.weights(batch, "token_mean")}
    objective = divergence_objective("forward_kl", tail="bucket") if top_k else divergence_objective("reverse_kl")
    rows = worker.train(student, batch, objective, columns, source)
    return [*rows, {name: metric.value() for name, metric in source.metrics().items()}]


def scores_of(scores, layout: Layout) -> list[list[float]]:
    local = {index: score.tolist() for index, score in enumerate(scores) if score is not None and layout.is_dp_leader}
    gathered = worker.union(local)
    return [gathered[index] for index in range(len(scores))]


KINDS = ("sampled", "full", "by_domain", "top_k_teacher", "top_k_student", "top_k_union")


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    initialize_distributed()
    if arguments[0] == "save":
        save(arguments[1])
    else:
        output, url, *layouts = arguments
        results: dict = {}
        for argument in layouts:
            name, _, kinds = argument.partition("=")
            worker.PACKED = "packed" in name
            with open_layout(worker.parse_layout(name)) as layout:
                for kind in kinds.split(","):
                    results[f"{name}/{kind}"] = {
                        "served": served(layout, url, kind),
                        "serial": served(layout, url, kind, overlap=False),
                        "in_trainer": in_trainer(layout, kind),
                    }
        if dist.get_rank() == 0:
            Path(output).write_text(json.dumps(results), encoding="utf-8")
    shutdown_distributed()


if __name__ == "__main__":
    main(sys.argv[1:])
