"""Scores of given tokens by a served engine over toy servers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch")

from fake_sglang import log_prob_table
from served_helpers import VOCAB_SIZE, change_weights, embedding_of, make_engine, make_requests, toy_score

from megatron_s2d.config.base import UserError

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_scores_are_of_the_updated_weights(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    samples = engine.generate(make_requests())
    change_weights(chunks)
    engine.update_weights(chunks, 1)
    for log_probs, expected in zip(engine.score(samples), toy_score(chunks)(samples), strict=True):
        assert log_probs == pytest.approx(expected, abs=1e-5)
    table = log_prob_table(embedding_of(chunks))
    for sample, top in zip(samples, engine.top_tokens(samples, 4), strict=True):
        # Nothing is asked for the prompt, which the server may have in its prefix cache.
        assert sample.prompt_length > 1 and not top.ids[: sample.prompt_length].any()
        for index in range(sample.prompt_length, len(sample.token_ids)):
            row = table[sample.token_ids[index - 1]]
            assert top.ids[index].tolist() == np.argsort(-row)[:4].tolist()
            assert top.log_probs[index] == pytest.approx(np.sort(row)[::-1][:4], rel=1e-5)
            tail = 1 - np.exp(np.sort(row)[::-1][:4]).sum()
            if tail > 1e-3:
                assert top.log_tail[index] == pytest.approx(np.log(tail), abs=1e-3)
            assert np.exp(top.log_tail[index]) == pytest.approx(tail, abs=2e-6)
    full = engine.top_tokens(samples, VOCAB_SIZE)
    pairs = zip(samples, full, strict=True)
    assert all(np.isneginf(top.log_tail[sample.prompt_length :]).all() for sample, top in pairs)


@pytest.mark.parametrize("fault", ["500", "shifted", "fewer", "nan", "stale", "fewer replies"])
def test_wrong_score_is_retried(chunks, layout, servers, tmp_path, fault):
    engine = make_engine(chunks, layout, tmp_path, servers)
    samples = engine.generate(make_requests())
    servers[0].score_faults.extend([fault] * 2)
    for log_probs, expected in zip(engine.score(samples), toy_score(chunks)(samples), strict=True):
        assert log_probs == pytest.approx(expected, abs=1e-5)


def test_server_that_caps_the_likeliest_tokens_is_named(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers, max_restarts=0)
    samples = engine.generate(make_requests())
    for server in servers:
        server.score_faults.extend(["capped"] * 1000)
    with pytest.raises(UserError, match="3 likeliest tokens instead of 4: does the server cap them"):
        engine.top_tokens(samples, 4)


def test_samples_of_another_temperature_are_not_scored(chunks, layout, servers, tmp_path):
    engine = make_engine(chunks, layout, tmp_path, servers)
    samples = [dataclasses.replace(sample, temperature=0.7) for sample in engine.generate(make_requests())]
    with pytest.raises(UserError, match="sampled at temperature 0.7"):
        engine.score(samples)
