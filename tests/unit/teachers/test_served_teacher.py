"""The likeliest tokens of served teachers stand where the student is trained on them, whichever rank that is."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from megatron_s2d.config.base import UserError
from megatron_s2d.data.packing import MiniBatch, pack
from megatron_s2d.kl.logits import vocab_parallel_topk
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.records import Sample
from megatron_s2d.rollout.served.scoring import TopTokens, _log_tail
from megatron_s2d.teachers.frozen import ServedTeachers
from megatron_s2d.teachers.served import ServedTopK

VOCAB_SIZE, K = 11, 4
STUDENT = types.SimpleNamespace(layout=types.SimpleNamespace(is_pipeline_last_stage=True))


def sample(number: int, prompt: int, response: int, domain: str) -> Sample:
    rng = np.random.default_rng(number)
    return Sample(
        id=f"s{number}", prompt_id="p", group_id="p@0.0", domain=domain, seed=0,
        token_ids=rng.integers(0, VOCAB_SIZE, prompt + response),
        response_mask=np.arange(prompt + response) >= prompt, temperature=1.0, finish_reason="stop",
    )  # fmt: skip


class Server:
    """Answers with a table of log-probabilities by the token before."""

    def __init__(self, seed: int):
        logits = np.random.default_rng(seed).normal(0, 3, (VOCAB_SIZE, VOCAB_SIZE))
        self.table = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
        self.asked: list[str] = []

    def top_tokens(self, samples, k, layout):
        assert layout is STUDENT.layout
        self.asked += [sample.id for sample in samples]
        found = []
        for one in samples:
            rows = self.table[one.token_ids[:-1]]
            ids = np.argsort(-rows, axis=1)[:, :k]
            first = np.zeros((1, k))
            ids = np.concatenate([first, ids]).astype(np.int64)
            log_probs = np.concatenate([first, -np.sort(-rows, axis=1)[:, :k]]).astype(np.float32)
            found.append(TopTokens(ids, log_probs, _log_tail(log_probs, VOCAB_SIZE)))
        return found


def test_rows_are_those_of_the_teacher_of_the_sample():
    samples = [sample(0, 2, 3, "math"), sample(1, 4, 1, "code"), sample(2, 1, 5, "math"), sample(3, 3, 2, "code")]
    servers = {"math": Server(1), "code": Server(2)}
    update = MiniBatch(samples, {})
    for size in (1, 2):  # data ranks
        asked = []
        for rank in range(size):
            batches = pack(samples, loss_weights={}, max_tokens=14, dp_rank=rank, dp_size=size)
            teacher = ServedTopK(STUDENT, ServedTeachers(servers), K, "bucket")
            for batch, source in zip(batches, teacher.distributions(update, batches), strict=True):
                assert source.ids.shape == (batch.labels.numel(), K) and source.support == "teacher"
                assert (source.ids.sort(1).values.diff(dim=1) > 0).all()  # distinct everywhere
                rows = zip(*(batch.unpack(part) for part in (source.ids, source.log_probs, source.log_tail_mass)),
                           strict=True)  # fmt: skip
                for index, (ids, log_probs, tail) in zip(batch.indices, rows, strict=True):
                    one = samples[index]
                    places = np.flatnonzero(one.response_mask)
                    logits = torch.from_numpy(servers[one.domain].table[one.token_ids[places - 1]])
                    expected = vocab_parallel_topk(logits, K, VocabShard(0, VOCAB_SIZE, VOCAB_SIZE), 1.0)
                    assert torch.equal(ids[places], expected[0])
                    assert torch.allclose(log_probs[places], expected[1].float(), atol=1e-6)
                    assert torch.allclose(tail[places], expected[2].float(), atol=1e-4)
            asked += servers["math"].asked + servers["code"].asked
            servers["math"].asked.clear(), servers["code"].asked.clear()
        assert sorted(asked) == ["s0", "s1", "s2", "s3"]  # each rank asks for its own


def test_a_domain_without_a_teacher_is_named():
    samples = [dataclasses.replace(sample(0, 2, 3, "law"))]
    batches = pack(samples, loss_weights={}, max_tokens=14)
    teacher = ServedTopK(STUDENT, ServedTeachers({"math": Server(1)}), K, "bucket")
    with pytest.raises(UserError, match="no teacher for the domain 'law'"):
        teacher.distributions(MiniBatch(samples, {}), batches)


def test_a_tail_below_rounding_is_small_and_not_nothing():
    certain = np.array([[0.0, -20.0, -21.0], [-1e-9, -3.0, -4.0]], dtype=np.float32)
    tail = _log_tail(certain, 1000)
    assert np.isfinite(tail).all()
    assert tail[0] <= np.log(997) - 21.0 + 1e-4 and tail[1] == pytest.approx(np.log(1e-6), abs=1e-4)
    assert np.isneginf(_log_tail(certain, 3)).all()
