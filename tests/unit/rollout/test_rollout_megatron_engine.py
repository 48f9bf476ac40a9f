"""Generation by the trained model on one rank: exact against its full forward, and independent of batching."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from megatron_s2d import buffer_sizes
from megatron_s2d.config.base import UserError
from megatron_s2d.config.model import ModelConfig
from megatron_s2d.config.parallel import ParallelConfig
from megatron_s2d.models import kv_cache
from megatron_s2d.models.build import build_model
from megatron_s2d.parallel.layout import build_layout, initialize_distributed
from megatron_s2d.records import Prompt, WeightVersionSpan
from megatron_s2d.rollout.engine import Request, SamplingParams, sample_seed
from megatron_s2d.rollout.megatron import batching
from megatron_s2d.rollout.megatron.engine import MegatronEngine

VOCAB_SIZE = 27  # padded to 32 by the model
EOS = 5


class Letters:
    """A tokenizer of one character per token."""

    @staticmethod
    def decode(token_ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in token_ids)


@pytest.fixture(scope="module")
def layout():
    initialize_distributed()
    return build_layout(ParallelConfig())


def model(layout, preset="tiny-teacher", **options):
    # Wide initial weights, so that distributions are far from uniform.
    spec = dataclasses.replace(ModelConfig(preset=preset).resolve(VOCAB_SIZE), initializer_range=0.25)
    return build_model(spec, layout, seed=3, **options)


@pytest.fixture(scope="module")
def chunks(layout):
    return model(layout)


def engine(chunks, layout, **options) -> MegatronEngine:
    return MegatronEngine(chunks, VOCAB_SIZE, layout, **options)


def make_requests(lengths=(4, 9, 1, 6), groups=3, **params) -> list[Request]:
    generator = np.random.default_rng(0)
    params = SamplingParams(**{"max_new_tokens": 10, "stop_token_ids": (EOS,), **params})
    prompts = [
        Prompt(f"p{n}", generator.integers(0, VOCAB_SIZE, length), "", "math", None, None)
        for n, length in enumerate(lengths)
    ]
    return [
        Request(f"{prompt.id}#{group}@0", prompt, f"{prompt.id}@0.0", sample_seed(1, 0, prompt.id, group), params)
        for prompt in prompts
        for group in range(groups)
    ]


def full_forward(chunks, token_ids: np.ndarray) -> torch.Tensor:
    """Logits [s, v] of one unpadded sequence."""
    with torch.no_grad():
        return chunks[0](torch.from_numpy(token_ids)[None], None, None)[0, :, :VOCAB_SIZE].float()


def response(sample) -> np.ndarray:
    return sample.token_ids[sample.prompt_length :]


def largest_difference(chunks, samples) -> float:
    """Between reported log-probabilities and those of a full forward, over all response tokens."""
    largest = 0.0
    for sample in samples:
        start = sample.prompt_length
        temperature = sample.temperature or 1.0
        log_probs = torch.log_softmax(full_forward(chunks, sample.token_ids) / temperature, dim=-1)
        expected = log_probs[torch.arange(start - 1, len(sample.token_ids) - 1), torch.from_numpy(response(sample))]
        largest = max(largest, float((torch.from_numpy(sample.rollout_log_probs[start:]) - expected).abs().max()))
        assert not sample.rollout_log_probs[:start].any()
    return largest


@pytest.mark.parametrize("preset", ["tiny-teacher", "tiny-llama", "tiny-moe"])
def test_sampled_log_probs_are_those_of_a_full_forward(layout, preset):
    chunks = model(layout, preset)
    samples = engine(chunks, layout).generate(make_requests(lengths=(4, 9, 1, 6, 30), temperature=0.8))
    assert largest_difference(chunks, samples) < 2e-5
    assert len({tuple(response(sample)) for sample in samples}) > 10


def test_greedy_tokens_are_the_argmax_of_a_full_forward(layout, chunks):
    samples = engine(chunks, layout).generate(make_requests(groups=1, temperature=0.0))
    for sample in samples:
        start = sample.prompt_length
        likeliest = full_forward(chunks, sample.token_ids)[start - 1 : -1].argmax(-1)
        assert np.array_equal(likeliest.numpy(), response(sample))
    assert largest_difference(chunks, samples) < 2e-5


def test_bfloat16_log_probs_are_near_those_of_a_full_forward(layout):
    chunks = model(layout, params_dtype=torch.bfloat16)
    # bfloat16 has 8 bits of mantissa and logits are below 8, so single log-probabilities are off by a few 1/64.
    assert largest_difference(chunks, engine(chunks, layout).generate(make_requests())) < 0.15


def test_fp8_is_off_during_generation_only(layout):
    """Megatron asks the configuration before every layer; without Transformer Engine the answer changes nothing."""
    (chunk,) = model(layout)
    seen = []
    chunk.decoder.register_forward_pre_hook(lambda *_: seen.append(chunk.config.fp8))
    chunk.config.fp8 = "hybrid"
    engine([chunk], layout).generate(make_requests())
    assert set(seen) == {None} and chunk.config.fp8 == "hybrid"


def test_batching_and_order_do_not_matter(layout, chunks):
    requests = make_requests(lengths=(4, 9, 1, 6, 4, 2), groups=4)
    reference = engine(chunks, layout).generate(requests)
    for options in ({"max_batch_size": 1}, {"max_batch_size": 5}, {"max_batch_tokens": 60}):
        order = np.random.default_rng(len(options)).permutation(len(requests))
        shuffled = engine(chunks, layout, **options).generate([requests[index] for index in order])
        for position, index in enumerate(order):
            assert shuffled[position].id == requests[index].id
            assert np.array_equal(shuffled[position].token_ids, reference[index].token_ids)


def test_records_are_complete(layout, chunks):
    generator = engine(chunks, layout)
    generator.update_weights(chunks, 17)
    requests = make_requests()
    finished = []
    samples = generator.generate(requests, progress=lambda done, total: finished.append((done, total)))
    assert finished[-1] == (len(requests), len(requests))
    for request, sample in zip(requests, samples, strict=True):
        start, length = len(request.prompt.token_ids), len(sample.token_ids)
        assert (sample.id, sample.prompt_id, sample.group_id) == (request.id, request.prompt.id, request.group_id)
        assert (sample.domain, sample.seed, sample.temperature) == ("math", request.seed, 1.0)
        assert np.array_equal(sample.token_ids[:start], request.prompt.token_ids)
        assert sample.token_ids.dtype == np.int64 and sample.token_ids.max() < VOCAB_SIZE
        assert sample.response_mask.dtype == np.bool_ and sample.response_mask.sum() == length - start
        assert sample.response_mask[start:].all()
        assert sample.rollout_log_probs.dtype == np.float32 and len(sample.rollout_log_probs) == length
        assert sample.weight_versions == (WeightVersionSpan(start, length, 17),)


def test_stop_token_ends_the_response_and_changes_no_token_before(layout, chunks):
    free = engine(chunks, layout).generate(make_requests(groups=8, stop_token_ids=()))
    assert {sample.finish_reason for sample in free} == {"length"}
    assert {sample.response_length for sample in free} == {10}
    for stop_ids in ((EOS,), (EOS, 9, 20)):
        stopped = engine(chunks, layout).generate(make_requests(groups=8, stop_token_ids=stop_ids))
        for full, cut in zip(free, stopped, strict=True):
            hits = np.flatnonzero(np.isin(response(full), stop_ids))
            length = int(hits[0]) + 1 if hits.size else 10
            assert np.array_equal(response(cut), response(full)[:length])
            assert cut.finish_reason == ("stop" if hits.size else "length")
        assert {sample.finish_reason for sample in stopped} == {"stop", "length"}


def test_limits_and_parameters_are_per_request(layout, chunks):
    requests = [
        dataclasses.replace(
            request,
            params=SamplingParams(
                max_new_tokens=1 + number % 10,
                stop_token_ids=(EOS,) if number % 2 else (),
                temperature=(0.0, 0.7, 1.0)[number % 3],
                top_k=(-1, 4)[number % 2],
            ),
        )
        for number, request in enumerate(make_requests(lengths=(4, 9, 1, 6, 4, 2), groups=5))
    ]
    together = engine(chunks, layout).generate(requests)
    assert largest_difference(chunks, together) < 2e-5
    for request, sample in zip(requests, together, strict=True):
        alone = engine(chunks, layout).generate([request])[0]
        assert np.array_equal(alone.token_ids, sample.token_ids) and alone.finish_reason == sample.finish_reason
        assert sample.response_length <= request.params.max_new_tokens


def test_stop_string_ends_the_response_at_the_token_that_completes_it(layout, chunks):
    free = engine(chunks, layout).generate(make_requests(groups=16, stop_token_ids=()))
    texts = [Letters.decode(response(sample)) for sample in free]
    stop_strings = (texts[0][3:5], texts[7][2:5])
    # The prompt contains a stop string too, which must not count.
    requests = make_requests(groups=16, stop_token_ids=(), stop_strings=stop_strings)
    stopped = engine(chunks, layout, tokenizer=Letters).generate(requests)
    for text, sample in zip(texts, stopped, strict=True):
        ends = [text.index(string) + len(string) for string in stop_strings if string in text]
        assert Letters.decode(response(sample)) == text[: min(ends, default=10)]
        assert sample.finish_reason == ("stop" if ends else "length")
    assert sum(sample.finish_reason == "stop" for sample in stopped) >= 2


def test_first_tokens_follow_the_models_distribution(layout, chunks):
    draws = 20_000
    requests = make_requests(lengths=(6,), groups=draws, max_new_tokens=1, temperature=1.3)
    samples = engine(chunks, layout, max_batch_size=draws).generate(requests)
    counts = np.bincount([sample.token_ids[-1] for sample in samples], minlength=VOCAB_SIZE)
    logits = full_forward(chunks, requests[0].prompt.token_ids)[-1].double()
    expected = torch.softmax(logits / 1.3, dim=-1).numpy() * draws
    likely = expected > 5
    assert likely.sum() > 10
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    # Chi-square with n degrees of freedom: mean n, standard deviation sqrt(2 n).
    assert abs(statistic - likely.sum()) < 4 * np.sqrt(2 * likely.sum())


def test_growing_and_shrinking_batches_do_not_change_samples(layout, chunks, monkeypatch):
    requests = make_requests(lengths=(4, 9, 1), groups=6, max_new_tokens=40, stop_token_ids=(EOS,))
    reference = engine(chunks, layout).generate(requests)
    monkeypatch.setattr(kv_cache, "_MIN_FREE_COLUMNS", 3)
    monkeypatch.setattr(batching, "POSITIONS_PER_DRAW", 7)
    samples = engine(chunks, layout).generate(requests)
    assert max(sample.response_length for sample in samples) > 20 > min(sample.response_length for sample in samples)
    for sample, expected in zip(samples, reference, strict=True):
        assert np.array_equal(sample.token_ids, expected.token_ids)
    assert largest_difference(chunks, samples) < 2e-5


@pytest.mark.parametrize("limits", [(40,), (3, 17, 40)])
def test_looking_for_ended_responses_rarely_changes_no_sample(layout, chunks, monkeypatch, limits):
    """What a GPU decodes behind the end of a response, until the host looks, is cut off."""
    requests = make_requests(lengths=(4, 9, 1), groups=6, top_p=0.9, stop_strings=("ab", "q"))
    requests = [
        dataclasses.replace(
            request, params=dataclasses.replace(request.params, max_new_tokens=limits[number % len(limits)])
        )
        for number, request in enumerate(requests)
    ]
    reference = engine(chunks, layout, tokenizer=Letters).generate(requests)
    assert {sample.finish_reason for sample in reference} == {"stop", "length"} or len(limits) == 1
    for positions in (5, 16, 64):
        monkeypatch.setitem(buffer_sizes.POSITIONS_PER_CHECK, "cpu", positions)
        for sample, expected in zip(
            engine(chunks, layout, tokenizer=Letters).generate(requests), reference, strict=True
        ):
            assert np.array_equal(sample.token_ids, expected.token_ids)
            np.testing.assert_allclose(sample.rollout_log_probs, expected.rollout_log_probs, rtol=0, atol=2e-5)
            assert sample.finish_reason == expected.finish_reason


def test_training_continues_after_generation(layout):
    chunks = model(layout)
    chunks[0].train()
    samples = engine(chunks, layout).generate(make_requests())
    assert chunks[0].training and all(parameter.requires_grad for parameter in chunks[0].parameters())
    tokens = torch.from_numpy(samples[0].token_ids)[None]
    chunks[0](tokens, None, None).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in chunks[0].parameters())


def test_generation_uses_the_current_weights(layout):
    chunks = model(layout)
    generator = engine(chunks, layout)
    before = generator.generate(make_requests(temperature=0.0, groups=1))
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(0.7)
    generator.update_weights(chunks, 1)
    after = generator.generate(make_requests(temperature=0.0, groups=1))
    assert largest_difference(chunks, after) < 2e-5 < largest_difference(chunks, before)


def test_invalid_requests_are_one_clear_line(layout, chunks):
    generator = engine(chunks, layout)
    cases = [
        (make_requests(max_new_tokens=600), "exceeds the model's 512 positions"),
        (make_requests(lengths=(3, 0)), "prompt p1 is empty"),
        (make_requests(stop_strings=("x",)), "need a tokenizer"),
    ]
    foreign = make_requests(lengths=(3,), groups=1)[0]
    prompt = dataclasses.replace(foreign.prompt, token_ids=np.array([1, VOCAB_SIZE]))
    cases.append(([dataclasses.replace(foreign, prompt=prompt)], "outside the model's vocabulary of 27"))
    for requests, message in cases:
        with pytest.raises(UserError, match=message) as error:
            generator.generate(requests)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="another one"):
        generator.update_weights(model(layout), 1)
    assert generator.generate([]) == []


def test_broken_weights_are_reported(layout):
    chunks = model(layout)
    with torch.no_grad():
        chunks[0].decoder.final_layernorm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        engine(chunks, layout).generate(make_requests())


def test_batches_are_cut_by_rows_and_tokens():
    requests = make_requests(lengths=(4, 9, 4, 6), groups=5)  # responses of 10 tokens
    batches = batching.plan_batches(requests, max_batch_size=8, max_batch_tokens=10**6)
    assert sorted(index for batch in batches for index in batch) == list(range(20))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    lengths = [len(requests[index].prompt.token_ids) for batch in batches for index in batch]
    assert lengths == sorted(lengths)
    for batch in batching.plan_batches(requests, max_batch_size=100, max_batch_tokens=60):
        assert len(batch) * (10 + max(len(requests[index].prompt.token_ids) for index in batch)) <= 60
    assert [len(batch) for batch in batching.plan_batches(requests, 100, 1)] == [1] * 20
