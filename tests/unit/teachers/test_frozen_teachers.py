"""Frozen teachers: routing by domain, models that take turns on the device, and the support of top-k distributions."""

import contextlib
import types

import numpy as np
import pytest
import torch

from megatron_s2d.errors import UserError
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.records import Sample
from megatron_s2d.teachers.frozen import TeacherRouter, TopKTeacher, select_support

VOCAB_SIZE = 9


class Model:
    """Scores every token with its own number and records where its weights are."""

    def __init__(self, number: float):
        self.number, self.events = number, []

    def score(self, samples, *, holders):
        return [np.full(len(sample.token_ids), self.number) for sample in samples]

    def offload(self):
        self.events.append("offload")

    @contextlib.contextmanager
    def on_device(self, *, release):
        self.events.append("onload")
        yield
        if release:
            self.offload()


def make_sample(id_: str, domain: str) -> Sample:
    mask = np.array([False, True, True])
    return Sample(id_, "p", "p@0.0", domain, 0, np.arange(3), mask, 1.0, "stop")


SAMPLES = [make_sample("a", "math"), make_sample("b", "code"), make_sample("c", "math")]


def test_every_sample_is_scored_by_the_teacher_of_its_domain():
    models = {"math_teacher": Model(1.0), "code_teacher": Model(2.0)}
    router = TeacherRouter.load({"math": "math_teacher", "code": "code_teacher"}, models.__getitem__)
    assert router.is_routed
    assert [score[0] for score in router.score(SAMPLES, holders=None)] == [1.0, 2.0, 1.0]
    for model in models.values():  # one of them is on the device at a time
        assert model.events == ["offload", "onload", "offload"]


def test_a_single_teacher_stays_on_the_device():
    loaded = []

    def load(stage):
        loaded.append(Model(len(loaded)))
        return loaded[-1]

    one_for_all = TeacherRouter.load("teacher", load)
    assert not one_for_all.is_routed
    assert [score[0] for score in one_for_all.score(SAMPLES, holders=None)] == [0, 0, 0]
    shared = TeacherRouter.load({"math": "teacher", "code": "teacher"}, load)
    assert [score[0] for score in shared.score(SAMPLES, holders=None)] == [1, 1, 1]
    assert len(loaded) == 2 and all("offload" not in model.events for model in loaded)


def test_domain_without_a_teacher_is_named():
    router = TeacherRouter({"math": Model(1.0)})
    with pytest.raises(UserError, match="no teacher for the domain 'code'.*math"):
        router.score(SAMPLES, holders=None)


def top_k_teacher(support: str) -> TopKTeacher:
    student = types.SimpleNamespace(
        shard=VocabShard(0, VOCAB_SIZE, VOCAB_SIZE), layout=types.SimpleNamespace(is_output_rank=True)
    )
    return TopKTeacher(student, None, 2, support, "bucket")


@pytest.mark.parametrize(("support", "expected"), [("teacher", [8, 7]), ("student", [8, 0]), ("union", [8, 0, 7, 6])])
def test_support_holds_the_selected_tokens_once(support, expected):
    """The teacher prefers tokens 8, 7, 6, ...; the student's top-k tokens are 8 and 0."""
    logits = torch.arange(VOCAB_SIZE, dtype=torch.float32).unsqueeze(0)
    shard = VocabShard.unsharded(VOCAB_SIZE)
    ids, log_probs, tail = select_support(logits, torch.tensor([[8, 0]]), support, 2, shard, 1.0)
    assert ids.tolist() == [expected]
    full = torch.log_softmax(logits, dim=1)
    assert torch.allclose(log_probs, full[:, expected], atol=1e-6)
    assert torch.allclose(tail.exp(), 1 - full[:, expected].exp().sum(dim=1), atol=1e-6)


def test_overlap_counts_the_student_tokens_in_the_top_k_of_the_teacher():
    logits = torch.arange(VOCAB_SIZE, dtype=torch.float32).repeat(3, 1)
    teacher = top_k_teacher("student")
    teacher._count_overlap(logits, torch.tensor([[8, 0], [7, 8], [1, 2]]), 1.0)
    assert int(teacher._num_shared) == 3 and teacher._num_selected == 6
