"""The interface of engines by request, on the stand-in that other tests use."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from stand_in_engine import StandInEngine

from megatron_s2d.errors import UserError
from megatron_s2d.records import WeightVersionSpan
from megatron_s2d.rollout.engine import SamplingParams, version_spans
from megatron_s2d.rollout.sampling_client import shift_spans

PROMPT = np.array([4, 9])


def test_spans_are_runs_of_equal_versions():
    spans = version_spans(np.array([3, 3, 4, 4, 4, 7]))
    assert spans == (WeightVersionSpan(0, 2, 3), WeightVersionSpan(2, 5, 4), WeightVersionSpan(5, 6, 7))
    assert shift_spans(spans, 10)[1] == WeightVersionSpan(12, 15, 4)
    assert version_spans(np.array([], dtype=np.int64)) == ()


def test_episodes_interleave_and_results_are_in_order():
    engine = StandInEngine()

    def episode(number: int):
        async def turns(client):
            tokens = PROMPT
            for turn in range(number):
                completion = await client.sample(
                    tokens, SamplingParams(4, ()), seed=100 * number + turn, request_id=f"{number}.{turn}"
                )
                tokens = np.concatenate([tokens, completion.token_ids])
            return tokens

        return turns

    results = engine.run([episode(number) for number in (3, 1, 2)])
    assert [len(tokens) for tokens in results] == [14, 6, 10]
    assert engine.most_active == 3
    again = StandInEngine().run([episode(2)])
    assert np.array_equal(again[0], results[2])


def test_an_update_in_the_middle_shows_in_the_spans_and_an_abort_keeps_tokens():
    engine = StandInEngine()

    async def episode(client):
        whole = asyncio.create_task(client.sample(PROMPT, SamplingParams(6, ()), seed=1, request_id="a"))
        ended = asyncio.create_task(client.sample(PROMPT, SamplingParams(6, ()), seed=2, request_id="b"))
        for _ in range(4):
            await asyncio.sleep(0)
        engine.update_weights(None, 1)
        client.abort("b")
        return await whole, await ended

    ((whole, ended),) = engine.run([episode])
    assert [span.version for span in whole.weight_versions] == [0, 1] and whole.finish_reason == "length"
    assert ended.finish_reason == "abort" and 0 < len(ended.token_ids) < 6
    previous = np.concatenate([PROMPT[-1:], whole.token_ids[:-1]])
    for span in whole.weight_versions:
        table = engine.log_probs(span.version)[previous, whole.token_ids]
        np.testing.assert_allclose(whole.log_probs[span.start : span.stop], table[span.start : span.stop], atol=1e-6)


def test_a_refused_request_ends_the_run():
    async def episode(client):
        await client.sample(np.array([], dtype=np.int64), SamplingParams(4, ()), seed=1, request_id="a")

    with pytest.raises(UserError, match="empty"):
        StandInEngine().run([episode])
