"""What every engine by request has to do, as checks of an engine: used on each engine where it can run.

An ``Engine`` of these checks has ``run`` and ``update_weights`` of a rollout engine. score(version, token_ids,
temperature): float64 [s] log-probabilities of the tokens under the weights of that version (entry 0: unused).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from megatron_s2d.errors import UserError
from megatron_s2d.rollout.engine import SamplingParams, sample_seed
from megatron_s2d.rollout.sampling_client import Completion

Score = Callable[[int, np.ndarray, float], np.ndarray]


@dataclasses.dataclass
class Subject:
    """An engine under test."""

    engine: Any
    score: Score
    vocab_size: int
    stop_id: int  # a token that responses end with now and then
    tolerance: float = 2e-5  # of log-probabilities, in nats
    seeds_count: bool = True  # whether a seed determines the tokens
    num_requests: int = 12


def prompts_of(subject: Subject, count: int | None = None) -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, subject.vocab_size, 2 + n % 7) for n in range(count or subject.num_requests)]


def one_request(tokens: np.ndarray, params: SamplingParams, number: int, **options: Any):
    """An episode of one request; its result is the completion."""

    async def episode(client) -> Completion:
        seed = sample_seed(1, 0, "contract", number)
        return await client.sample(tokens, params, seed=seed, request_id=f"r{number}", **options)

    return episode


def sample_all(subject: Subject, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Completion]:
    return subject.engine.run([one_request(tokens, params, n) for n, tokens in enumerate(prompts)])


def check_record(subject: Subject, tokens: np.ndarray, completion: Completion, params: SamplingParams) -> None:
    """A completion agrees with itself, and its log-probabilities with the trainer's."""
    ids, spans = completion.token_ids, completion.weight_versions
    assert ids.dtype == np.int64 and completion.log_probs.dtype == np.float32
    assert len(ids) == len(completion.log_probs) and len(ids) <= params.max_new_tokens
    covered = [index for span in spans for index in range(span.start, span.stop)]
    assert covered == list(range(len(ids)))
    assert not len(ids) or (ids.min() >= 0 and ids.max() < subject.vocab_size)
    whole = np.concatenate([tokens, ids])
    for span in spans:
        expected = subject.score(span.version, whole, params.temperature or 1.0)[len(tokens) :]
        difference = np.abs(completion.log_probs - expected)[span.start : span.stop]
        assert difference.max() < subject.tolerance, f"log-probabilities are off by {difference.max()}"


def check_log_probs_and_ends(subject: Subject) -> None:
    prompts = prompts_of(subject)
    for params in (
        SamplingParams(8, (subject.stop_id,)),
        SamplingParams(8, (subject.stop_id,), temperature=0.7),
        SamplingParams(5, (subject.stop_id,), temperature=0.0),
    ):
        completions = sample_all(subject, prompts, params)
        for tokens, completion in zip(prompts, completions, strict=True):
            check_record(subject, tokens, completion, params)
            stops = np.flatnonzero(completion.token_ids == subject.stop_id)
            if completion.finish_reason == "stop":
                assert stops.tolist() == [len(completion.token_ids) - 1]
            else:
                assert completion.finish_reason == "length" and not len(stops)
                assert len(completion.token_ids) == params.max_new_tokens
            if params.temperature == 0:
                check_greedy(subject, tokens, completion)
    reasons = {c.finish_reason for c in sample_all(subject, prompts, SamplingParams(8, (subject.stop_id,)))}
    assert reasons == {"stop", "length"}, "the cases have both ends"


def check_greedy(subject: Subject, tokens: np.ndarray, completion: Completion) -> None:
    """No other first token is likelier."""
    first = completion.log_probs[0]
    others = [
        subject.score(0, np.append(tokens, token), 1.0)[-1] for token in range(subject.vocab_size)
    ]  # of the first version: greedy checks come before updates
    assert first >= max(others) - 2 * subject.tolerance


def check_seeds(subject: Subject) -> None:
    """The same seed gives the same tokens in any company; other seeds give others."""
    params = SamplingParams(8, (subject.stop_id,))
    prompts = [prompts_of(subject)[0]] * 6
    together = sample_all(subject, prompts, params)
    assert len({tuple(completion.token_ids) for completion in together}) > 1
    if subject.seeds_count:
        for number in (0, 3):
            (alone,) = subject.engine.run([one_request(prompts[0], params, number)])
            assert np.array_equal(alone.token_ids, together[number].token_ids)


def check_turns(subject: Subject) -> None:
    """An episode continues its own tokens; ids are never changed on the way."""
    params = SamplingParams(5, (subject.stop_id,))

    def conversation(number: int):
        async def episode(client):
            tokens, turns = prompts_of(subject)[number], []
            for turn in range(1 + number % 3):
                seed = sample_seed(1, turn, "turns", number)
                completion = await client.sample(tokens, params, seed=seed, request_id=f"c{number}.{turn}")
                turns.append((tokens, completion))
                tokens = np.concatenate([tokens, completion.token_ids, [1, 2]])  # an observation
            return turns

        return episode

    conversations = subject.engine.run([conversation(number) for number in range(7)])
    assert [len(turns) for turns in conversations] == [1 + number % 3 for number in range(7)]
    for turns in conversations:
        for tokens, completion in turns:
            check_record(subject, tokens, completion, params)


def check_abort(subject: Subject, *, before: Callable[[], None] = lambda: None) -> None:
    """An aborted request returns with what it has; the others are not touched. before: called before the abort."""
    params = SamplingParams(200, ())
    prompts = prompts_of(subject, 3)

    async def episode(client):
        calls = [
            asyncio.create_task(client.sample(tokens, params, seed=number, request_id=f"a{number}", priority=number))
            for number, tokens in enumerate(prompts)
        ]
        await asyncio.sleep(0.05)
        before()
        client.abort("a1")
        client.abort("unknown")
        aborted = await calls[1]
        calls[0].cancel()
        client.abort("a2")
        return aborted, await calls[2]

    ((aborted, last),) = subject.engine.run([episode])
    for tokens, completion in ((prompts[1], aborted), (prompts[2], last)):
        assert completion.finish_reason == "abort" and len(completion.token_ids) < 200
        check_record(subject, tokens, completion, params)
    again = sample_all(subject, prompts, SamplingParams(4, ()))
    assert [completion.finish_reason for completion in again] == ["length"] * 3


def check_versions(subject: Subject, update: Callable[[], int]) -> None:
    """update: changes the weights and returns their version. Later tokens carry it and agree with it."""
    params = SamplingParams(6, (subject.stop_id,))
    prompts = prompts_of(subject)
    before = sample_all(subject, prompts, params)
    version = update()
    assert subject.engine.version == version
    after = sample_all(subject, prompts, params)
    for tokens, first, second in zip(prompts, before, after, strict=True):
        check_record(subject, tokens, first, params)
        check_record(subject, tokens, second, params)
        assert {span.version for span in second.weight_versions} == {version}
        assert version not in {span.version for span in first.weight_versions}


def check_errors(subject: Subject) -> None:
    """A request that cannot be served raises in its episode, which may go on; an episode's own error ends the run."""
    params = SamplingParams(4, ())

    async def careful(client):
        with pytest.raises(UserError, match="empty"):
            await client.sample(np.array([], dtype=np.int64), params, seed=1, request_id="e")
        with pytest.raises(UserError, match="vocabulary"):
            await client.sample(np.array([subject.vocab_size]), params, seed=1, request_id="v")
        return await client.sample(np.array([1]), params, seed=1, request_id="good")

    (completion,) = subject.engine.run([careful])
    assert completion.finish_reason == "length"

    async def broken(client):
        await client.sample(np.array([1]), params, seed=1, request_id="x")
        raise UserError("the environment is on fire")

    with pytest.raises(UserError, match="on fire"):
        subject.engine.run([broken, one_request(np.array([2]), params, 1)])
    assert subject.engine.run([one_request(np.array([2]), params, 1)])[0].finish_reason == "length"
    assert subject.engine.run([]) == []
