"""Top tokens of served teachers land at the positions that predict the student's tokens, on whichever rank."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
import torch

from megatron_s2d.data.packing import MiniBatch, pack
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.errors import UserError
from megatron_s2d.kl.logits import vocab_parallel_topk
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import Prompt, RemoteSample, Sample
from megatron_s2d.rollout.served.scoring import TopTokens, _log_tail
from megatron_s2d.teachers.served import ServedTeachers, ServedTopK
from megatron_s2d.teachers.views import PromptViews

VOCAB_SIZE, K = 11, 4
STUDENT = types.SimpleNamespace(layout=types.SimpleNamespace(is_pipeline_last_stage=True))


def make_sample(number: int, prompt: int, response: int, domain: str) -> Sample:
    rng = np.random.default_rng(number)
    return Sample(
        id=f"s{number}",
        prompt_id="p",
        group_id="p@0.0",
        domain=domain,
        seed=0,
        token_ids=rng.integers(0, VOCAB_SIZE, prompt + response),
        response_mask=np.arange(prompt + response) >= prompt,
        temperature=1.0,
        finish_reason="stop",
    )


class Engine:
    """Looks log-probabilities up in a table by the previous token."""

    def __init__(self, seed: int):
        logits = np.random.default_rng(seed).normal(0, 3, (VOCAB_SIZE, VOCAB_SIZE))
        self.table = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
        self.requested: list[str] = []

    def top_tokens(self, samples, k, layout):
        assert layout is STUDENT.layout
        self.requested += [sample.id for sample in samples]
        return [self._top_tokens(sample, k) for sample in samples]

    def score(self, samples, layout):
        return [self.table[0, sample.token_ids] for sample in samples]

    def _top_tokens(self, sample, k):
        rows = self.table[sample.token_ids[:-1]]
        first = np.zeros((1, k))  # nothing predicts the first token
        ids = np.concatenate([first, np.argsort(-rows, axis=1)[:, :k]]).astype(np.int64)
        log_probs = np.concatenate([first, -np.sort(-rows, axis=1)[:, :k]]).astype(np.float32)
        return TopTokens(ids, log_probs, _log_tail(log_probs, VOCAB_SIZE))


@pytest.fixture
def samples() -> list[Sample]:
    sizes = ((2, 3, "math"), (4, 1, "code"), (1, 5, "math"), (3, 2, "code"))
    return [make_sample(number, *size) for number, size in enumerate(sizes)]


@pytest.fixture
def engines() -> dict[str, Engine]:
    return {"math": Engine(1), "code": Engine(2)}


@pytest.mark.parametrize("dp_size", [1, 2])
def test_rows_are_those_of_the_teacher_of_the_domain(samples, engines, dp_size):
    teacher = ServedTopK(STUDENT, ServedTeachers(engines), K, "bucket")
    for dp_rank in range(dp_size):
        held = [
            sample if index % dp_size == dp_rank else RemoteSample.of(sample, index % dp_size)
            for index, sample in enumerate(samples)
        ]
        batches = pack(held, loss_weights={}, max_tokens=14)
        for batch, source in zip(batches, teacher.distributions(MiniBatch(held, {}), batches), strict=True):
            assert source.ids.shape == (batch.labels.numel(), K) and source.support == "teacher"
            assert (source.ids.sort(1).values.diff(dim=1) > 0).all()  # distinct everywhere
            columns = [batch.unpack(values) for values in (source.ids, source.log_probs, source.log_tail_mass)]
            for index, ids, log_probs, tail in zip(batch.indices, *columns, strict=True):
                tokens = np.flatnonzero(samples[index].response_mask)
                table = engines[samples[index].domain].table
                logits = torch.from_numpy(table[samples[index].token_ids[tokens - 1]])
                expected = vocab_parallel_topk(logits, K, VocabShard(0, VOCAB_SIZE, VOCAB_SIZE), 1.0)
                assert torch.equal(ids[tokens], expected[0])
                assert torch.allclose(log_probs[tokens], expected[1].float(), atol=1e-6)
                assert torch.allclose(tail[tokens], expected[2].float(), atol=1e-4)
    requested = engines["math"].requested + engines["code"].requested
    assert sorted(requested) == ["s0", "s1", "s2", "s3"]  # each rank requests its own samples only


def test_scores_come_in_the_order_of_the_samples(samples, engines):
    scores = ServedTeachers(engines).score(samples, holders=STUDENT.layout)
    for sample, score in zip(samples, scores, strict=True):
        assert np.array_equal(score, engines[sample.domain].table[0, sample.token_ids])


def test_servers_are_asked_for_the_response_behind_the_prompt_of_their_view(samples, engines):
    """Math problems have a view of three more tokens, code problems none."""
    samples = [dataclasses.replace(sample, prompt_id=sample.id) for sample in samples]
    prompts = {sample.id: np.array([5, 7, *sample.token_ids[: sample.prompt_length], 9]) for sample in samples}
    table = PromptTable.of([Prompt(id_, ids, "", "math", None, None) for id_, ids in prompts.items()])
    layout = types.SimpleNamespace(is_pipeline_last_stage=True, host_dp=HostGroup())
    student = types.SimpleNamespace(layout=layout)
    for engine in engines.values():
        engine.top_tokens = lambda read, k, layout, engine=engine: [engine._top_tokens(sample, k) for sample in read]
    teachers = ServedTeachers(engines, PromptViews({"math": table}))
    batches = pack(samples, loss_weights={}, max_tokens=14)
    sources = ServedTopK(student, teachers, K, "bucket").distributions(MiniBatch(samples, {}), batches)
    for batch, source in zip(batches, sources, strict=True):
        for index, log_probs in zip(batch.indices, batch.unpack(source.log_probs), strict=True):
            sample = samples[index]
            before = sample.token_ids[np.flatnonzero(sample.response_mask) - 1].copy()
            before[0] = 9 if sample.domain == "math" else before[0]
            expected = -np.sort(-engines[sample.domain].table[before], axis=1)[:, :K]
            np.testing.assert_allclose(log_probs[sample.prompt_length :], expected, atol=1e-6)
    for sample, score in zip(samples, teachers.score(samples, holders=layout), strict=True):
        own = engines[sample.domain].table[0, sample.token_ids]
        np.testing.assert_array_equal(score[sample.response_mask], own[sample.response_mask])


def test_missing_teacher_of_a_domain_is_named(engines):
    samples = [make_sample(0, 2, 3, "law")]
    batches = pack(samples, loss_weights={}, max_tokens=14)
    teacher = ServedTopK(STUDENT, ServedTeachers(engines), K, "bucket")
    with pytest.raises(UserError, match="no teacher for the domain 'law'"):
        teacher.distributions(MiniBatch(samples, {}), batches)


def test_tail_below_rounding_is_small_but_finite():
    top = np.array([[0.0, -20.0, -21.0], [-1e-9, -3.0, -4.0]], dtype=np.float32)
    tail = _log_tail(top, 1000)
    assert np.isfinite(tail).all()
    assert tail[0] <= np.log(997) - 21.0 + 1e-4 and tail[1] == pytest.approx(np.log(1e-6), abs=1e-4)
    assert np.isneginf(_log_tail(top, 3)).all()
