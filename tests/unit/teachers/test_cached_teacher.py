"""Rows of a teacher cache line up with the positions that predict the student's response tokens."""

import types

import numpy as np
import pytest
import torch

from megatron_s2d.data.cache import CachedDistribution, CacheHeader
from megatron_s2d.data.packing import MiniBatch, pack
from megatron_s2d.data.row_digests import row_digests
from megatron_s2d.errors import UserError
from megatron_s2d.kl.shards import VocabShard
from megatron_s2d.records import Sample
from megatron_s2d.teachers import cached
from megatron_s2d.teachers.cached import CachedTeacher

VOCAB_SIZE, K = 13, 3
LENGTHS = ((2, 3), (1, 5), (4, 1))  # prompt, response


class Cache:
    """A cache in memory: the distribution at response token t of a sample is a function of both."""

    directory = "cache"

    def __init__(self, representation: str, temperature: float = 1.0):
        top_k, hidden = representation == "top_k", representation == "hidden_states"
        self.header = CacheHeader(
            representation=representation,
            teacher_digest="t",
            tokenizer_fingerprint="f",
            template_fingerprint="f",
            temperature=temperature,
            vocab_size=VOCAB_SIZE,
            k=K if top_k else None,
            hidden_size=4 if hidden else None,
        )

    def log_probs(self, sample: Sample) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(sample.id))
        logits = torch.randn(sample.response_length, VOCAB_SIZE, generator=generator)
        return torch.log_softmax(logits / self.header.temperature, dim=1)

    def distribution(self, sample: Sample) -> CachedDistribution:
        log_probs = self.log_probs(sample)
        digests = torch.from_numpy(row_digests(sample))
        if self.header.representation == "full_vocab":
            return CachedDistribution(digests, log_probs=log_probs)
        top = log_probs.topk(K, dim=1)
        tail = torch.log1p(-top.values.exp().sum(dim=1))
        return CachedDistribution(digests, log_probs=top.values, ids=top.indices.int(), log_tail_mass=tail)


@pytest.fixture
def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            id=str(index),
            prompt_id="p",
            group_id="p@0.0",
            domain="d",
            seed=0,
            token_ids=rng.integers(0, VOCAB_SIZE, prompt + response),
            response_mask=np.arange(prompt + response) >= prompt,
            temperature=1.0,
            finish_reason="stop",
        )
        for index, (prompt, response) in enumerate(LENGTHS)
    ]


@pytest.fixture
def student():
    layout = types.SimpleNamespace(is_pipeline_last_stage=True)
    return types.SimpleNamespace(layout=layout, shard=VocabShard(0, VOCAB_SIZE, VOCAB_SIZE))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("representation", ["full_vocab", "top_k"])
def test_distribution_of_token_t_is_at_the_position_that_predicts_it(samples, student, representation, packed):
    cache = Cache(representation)
    teacher = CachedTeacher(cache, None, student, tail="bucket", temperature=1.0)
    batches = pack(samples, loss_weights={}, max_tokens=14, packed=packed)
    sources = teacher.distributions(MiniBatch(samples, {}), batches)
    num_rows = 0
    for batch, source in zip(batches, sources, strict=True):
        values = source.shard_logits if representation == "full_vocab" else source.log_probs
        for index, rows in zip(batch.indices, batch.unpack(values), strict=True):
            response = torch.from_numpy(samples[index].response_mask)
            assert torch.equal(rows[response], cache.distribution(samples[index]).log_probs)
            num_rows += int(response.sum())
    assert num_rows == sum(response for _, response in LENGTHS)


def test_top_k_ids_are_distinct_at_every_position(samples, student):
    teacher = CachedTeacher(Cache("top_k"), None, student, tail="bucket", temperature=1.0)
    (batch,) = pack(samples, loss_weights={}, max_tokens=100, packed=True)
    (source,) = teacher.distributions(MiniBatch(samples, {}), [batch])
    assert (source.ids.long().sort(dim=1).values.diff(dim=1) > 0).all()


def test_full_vocab_log_probs_become_logits_of_their_temperature(samples, student):
    cache = Cache("full_vocab", temperature=0.5)
    teacher = CachedTeacher(cache, None, student, tail="bucket", temperature=2.0)
    (batch,) = pack(samples, loss_weights={}, max_tokens=100, packed=True)
    (source,) = teacher.distributions(MiniBatch(samples, {}), [batch])
    rows = source.shard_logits[batch.response_mask] / source.temperature
    expected = torch.cat([cache.log_probs(samples[index]) * 0.5 / 2.0 for index in batch.indices])
    assert torch.allclose(torch.log_softmax(rows, dim=1), torch.log_softmax(expected, dim=1), atol=1e-6)


class OffByOneCache(Cache):
    """Gives each sample the rows of the one before it, with their digests, as a wrong lookup would."""

    def __init__(self, samples):
        super().__init__("full_vocab")
        self.samples = samples

    def distribution(self, sample: Sample) -> CachedDistribution:
        return super().distribution(self.samples[self.samples.index(sample) - 1])


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_another_sample_are_refused(samples, student, packed):
    """Together they are as many rows, so that only digests can tell."""
    teacher = CachedTeacher(OffByOneCache(samples), None, student, tail="bucket", temperature=1.0)
    (batch,) = pack(samples, loss_weights={}, max_tokens=100, packed=packed)
    with pytest.raises(UserError, match="cache: rows of other tokens were read for sample 1 and 2 more; rebuild"):
        teacher.distributions(MiniBatch(samples, {}), [batch])


def test_rows_at_the_position_of_their_own_token_are_refused(samples, student, monkeypatch):
    """A row belongs to the position before its token, which predicts it."""
    predicting = cached.predicting_positions
    monkeypatch.setattr(cached, "predicting_positions", lambda *args: predicting(*args) + 1)
    teacher = CachedTeacher(Cache("full_vocab"), None, student, tail="bucket", temperature=1.0)
    batch, *_ = pack(samples, loss_weights={}, max_tokens=14)
    with pytest.raises(UserError, match="rows of other tokens"):
        teacher.distributions(MiniBatch(samples, {}), [batch])


def test_caches_that_do_not_fit_are_refused(student):
    with pytest.raises(UserError, match="sampled_token holds no distributions"):
        CachedTeacher(Cache("sampled_token"), None, student, tail="bucket", temperature=1.0)
    with pytest.raises(UserError, match="temperature 1.0 cannot be used at 0.7"):
        CachedTeacher(Cache("top_k"), None, student, tail="bucket", temperature=0.7)
