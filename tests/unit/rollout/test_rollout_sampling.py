"""Sampling: the distribution, its filters, and independence of batch and order."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from megatron_s2d.rollout.engine import SamplingParams, sample_seed
from megatron_s2d.rollout.megatron import sampling
from megatron_s2d.rollout.megatron.sampling import BatchParams, _filter, sample_tokens, uniforms


def params(**fields) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 8, "stop_token_ids": (), **fields})


def seeds(count: int) -> np.ndarray:
    return np.array([sample_seed(7, 0, "p", group) for group in range(count)], dtype=np.uint64)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic in standard deviations above its mean; normal for many degrees of freedom."""
    degrees = expected.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - degrees) / np.sqrt(2 * degrees))


def test_uniforms_are_uniform_and_independent_over_positions_and_seeds():
    values = uniforms(seeds(20_000), 0, 8)
    assert values.shape == (8, 20_000) and values.min() >= 0 and values.max() < 1
    for t in range(8):
        counts = np.histogram(values[t], bins=50, range=(0, 1))[0]
        assert abs(chi_square(counts, np.full(50, 400.0))) < 4
    for pairs in ((values[0], values[1]), (values[3], values[7]), (values[2, :-1], values[2, 1:])):
        counts = np.histogram2d(*pairs, bins=10, range=((0, 1), (0, 1)))[0]
        assert abs(chi_square(counts, np.full((10, 10), counts.sum() / 100))) < 4


def test_neighbouring_seeds_do_not_share_a_stream():
    values = uniforms(np.arange(1000, dtype=np.uint64), 0, 64)
    assert len(np.unique(values)) == values.size


def test_uniforms_of_a_position_do_not_depend_on_the_block_they_are_drawn_in():
    values = uniforms(seeds(5), 0, 20)
    assert np.array_equal(values[13:20], uniforms(seeds(5), 13, 20))
    assert np.array_equal(values[:, 2:3], uniforms(seeds(5)[2:3], 0, 20))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_samples_follow_the_distribution(temperature):
    draws, vocab = 60_000, 30
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(0)) * 1.5
    columns = BatchParams.of([params(temperature=temperature)] * draws, vocab)
    uniform = torch.from_numpy(uniforms(seeds(draws), 3, 4)[0])
    tokens, log_probs = sample_tokens(logits.expand(draws, -1), columns, uniform)
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    assert abs(chi_square(np.bincount(tokens.numpy(), minlength=vocab), probs.numpy() * draws)) < 4
    # float32 logits against float64: a few units in the last place of logits of size about 10.
    torch.testing.assert_close(log_probs.double(), probs.log()[tokens], rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(-1, 0.9), (-1, 0.3), (5, 1.0), (1, 1.0), (8, 0.7), (-1, 1.0), (999, 1.0)]
)
def test_filters_agree_with_transformers(top_k, top_p):
    vocab, rows = 50, 200
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    expected = logits
    if top_k != -1:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    # The last row has filters, so that the filter runs even for neutral settings.
    columns = BatchParams.of([params(top_k=top_k, top_p=top_p)] * rows + [params(top_k=2, top_p=0.5)], vocab)
    weights = torch.exp(torch.cat([logits, logits[:1]]))
    filtered = _filter(weights, columns)[:rows]
    assert torch.equal(filtered > 0, expected.isfinite())
    assert torch.equal(filtered[filtered > 0], weights[:rows][filtered > 0])


def kept_by_definition(mass: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Indices of one row that stay, by the definition: sorted in float64, the first of equal tokens first."""
    order = np.argsort(-mass.astype(np.float64), kind="stable")
    order = order[:top_k] if top_k != -1 else order
    if top_p == 1:
        return np.sort(order)
    cumulative = np.cumsum(mass[order].astype(np.float64))
    return np.sort(order[cumulative - mass[order] < top_p * cumulative[-1]])


@pytest.mark.parametrize("least_mass", [sampling._least_mass_on_host, sampling._least_mass_on_device])
@pytest.mark.parametrize("kind", ["normal", "flat", "ties", "two", "peaked"])
def test_filters_keep_what_the_definition_keeps(monkeypatch, least_mass, kind):
    """Also where only a few candidates are sorted first, and with p near 0 and 1."""
    monkeypatch.setattr(sampling, "_CANDIDATES", 16)
    monkeypatch.setattr(sampling, "_least_mass_on_host", least_mass)
    vocab = 300
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(5))
    logits = {
        "normal": logits * 3,
        "flat": torch.zeros(vocab),
        "ties": (logits * 2).round(),
        "two": torch.where(logits > 0, 0.0, -float("inf")),
        "peaked": torch.where(torch.arange(vocab) == 7, 40.0, logits),
    }[kind]
    mass = (logits - logits.max()).exp()
    # Shares that no sum of ties meets: there one rounding decides.
    settings = [(k, p) for k in (-1, 1, 7, 40) for p in (1e-9, 0.0301, 0.5003, 0.9002, 0.99999, 1.0)]
    columns = BatchParams.of([params(top_k=k, top_p=p) for k, p in settings], vocab)
    filtered = _filter(mass.expand(len(settings), -1), columns)
    for (top_k, top_p), row in zip(settings, filtered, strict=True):
        kept = kept_by_definition(mass.numpy(), top_k, top_p)
        expected = torch.zeros(vocab)
        expected[kept] = mass[kept]
        assert torch.equal(row, expected), (top_k, top_p)


def test_filtered_samples_follow_the_renormalised_distribution():
    draws, vocab = 40_000, 12
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2)) * 2
    columns = BatchParams.of([params(top_k=6, top_p=0.95, temperature=0.8)] * draws, vocab)
    uniform = torch.from_numpy(uniforms(seeds(draws), 0, 1)[0])
    tokens, log_probs = sample_tokens(logits.expand(draws, -1), columns, uniform)
    scaled = logits.double() / 0.8
    allowed = TopPLogitsWarper(0.95)(None, TopKLogitsWarper(6)(None, scaled[None]))[0].isfinite().numpy()
    probs = torch.softmax(scaled, dim=-1)
    inside = np.where(allowed, probs.numpy(), 0.0)
    counts = np.bincount(tokens.numpy(), minlength=vocab)
    assert 1 < allowed.sum() < 7 and counts[~allowed].sum() == 0
    assert abs(chi_square(counts[allowed], (inside / inside.sum())[allowed] * draws)) < 4
    # Reported before the filters: the probability in the whole vocabulary.
    torch.testing.assert_close(log_probs.double(), probs.log()[tokens], rtol=0, atol=3e-6)


def test_token_without_probability_is_never_drawn():
    logits = torch.full((4, 6), -1e30)
    logits[:, 2] = 0.0
    for uniform in (0.0, 0.5, 1 - 2.0**-52):
        columns = BatchParams.of([params()] * 4, 6)
        tokens, log_probs = sample_tokens(logits, columns, torch.full((4,), uniform, dtype=torch.float64))
        assert tokens.tolist() == [2] * 4 and log_probs.tolist() == [0.0] * 4


@pytest.mark.parametrize("filters", [{}, {"top_k": 700, "top_p": 0.97}])
def test_blocks_of_a_large_vocabulary_draw_the_tokens_of_the_whole_sum(filters):
    rows, vocab = 200, 128 * 40 + 17
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[:, 1000:1700] = logits[:, -9:] = logits[:, :300] = -1e30  # whole blocks without mass, and both ends
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    uniform[0], uniform[1] = 0.0, 1 - 2.0**-52
    columns = BatchParams.of([params(**filters)] * rows, vocab)
    mass = (logits - logits.amax(1, keepdim=True)).exp()
    log_total = mass.double().sum(1).log()
    mass = _filter(mass, columns).double()
    cumulative = mass.cumsum(1)
    expected = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    tokens, log_probs = sample_tokens(logits, columns, uniform)
    assert torch.equal(tokens, expected)
    assert bool((mass.gather(1, tokens[:, None]) > 0).all())
    of_tokens = logits.double().gather(1, tokens[:, None]).squeeze(1) - logits.double().amax(1) - log_total
    torch.testing.assert_close(log_probs.double(), of_tokens, rtol=0, atol=1e-6)
    alone = sample_tokens(logits[7:8], BatchParams.of([params(**filters)], vocab), uniform[7:8])
    assert (alone[0][0], alone[1][0]) == (tokens[7], log_probs[7])


def test_rows_of_different_parameters_are_independent():
    kinds = [
        params(),
        params(temperature=0.0),
        params(temperature=0.4),
        params(top_k=3),
        params(top_p=0.6),
        params(top_k=4, top_p=0.8, temperature=1.5),
    ]
    vocab, rows = 40, 300
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, vocab, generator=generator) * 2
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    rows_params = [kinds[row % len(kinds)] for row in range(rows)]
    together = BatchParams.of(rows_params, vocab)
    tokens, log_probs = sample_tokens(logits, together, uniform)
    for row in range(rows):
        single = BatchParams.of([rows_params[row]], vocab)
        alone = sample_tokens(logits[row : row + 1], single, uniform[row : row + 1])
        assert (tokens[row], log_probs[row]) == (alone[0][0], alone[1][0])
    assert torch.equal(tokens[1 :: len(kinds)], logits[1 :: len(kinds)].argmax(-1))
    picked = torch.arange(0, rows, 7)
    again = sample_tokens(logits[picked], together.select(picked), uniform[picked])
    assert torch.equal(again[0], tokens[picked])
