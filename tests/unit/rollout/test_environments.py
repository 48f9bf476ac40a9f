"""Episodes with environments: token in and token out, masks, limits, rewards, seeds, tool calls, observations."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import types

import numpy as np
import pytest
from stand_in_engine import StandInEngine

from megatron_s2d.config.data import FileSource, TaskSource
from megatron_s2d.config.environment import (
    CalculatorEnvironment,
    EnvironmentLimits,
    RetryEnvironment,
    environment_text,
    read_environment,
)
from megatron_s2d.data.sample_bytes import decode_samples, encode_samples
from megatron_s2d.data.tasks import task_documents, task_prompts
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.records import Prompt, WeightVersionSpan, sample_from_json, sample_to_json
from megatron_s2d.rollout.engine import Request, SamplingParams
from megatron_s2d.rollout.environments.calculator import calculate
from megatron_s2d.rollout.environments.environment import Step
from megatron_s2d.rollout.environments.episode import run_episode, turn_seed
from megatron_s2d.rollout.environments.manager import EnvironmentManager
from megatron_s2d.rollout.environments.tool_calls import llama3_calls, qwen3_calls
from megatron_s2d.rollout.sampler import RolloutWorker, episode_text, last_turn_text, response_metrics
from megatron_s2d.rollout.sampling_client import Completion
from megatron_s2d.verify import RewardManager, Verdict

DATE = datetime.date(2026, 1, 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("task:modular_arithmetic", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def words(tokenizer):
    return lambda text: tokenizer.convert_tokens_to_ids(text.split())


def task(**settings) -> TaskSource:
    return TaskSource(split="pool", num_operations=2, num_prompts=4, **settings)


def request_of(prompt: Prompt, tokenizer, *, max_new_tokens: int = 30, seed: int = 5) -> Request:
    params = SamplingParams(max_new_tokens, (tokenizer.eos_token_id,))
    return Request(f"{prompt.id}#0@1", prompt, f"{prompt.id}@1.0", seed, params)


def says(*turns: list[int]):
    """Return a script of the stand-in: its turns, one after the other."""
    state = {"turn": -1}

    def script(token_ids, position):
        if position == 0:
            state["turn"] += 1
        return turns[state["turn"]][position]

    return script


def run(engine, request, manager):
    (sample,) = engine.run([manager.episode(request)])
    return sample


def test_the_calculator_answers_calls_until_the_model_ends(tokenizer, words):
    prompt = dataclasses.replace(
        task_prompts(task(environment="calculator"), tokenizer)[0],
        token_ids=np.array(words("3 * 9 + 4 =")),
        answer="14",
    )
    turns = [words("3 * 9 ="), words("10 + 4 ="), words("[ 14 ] <eos>")]
    engine = StandInEngine(25, says(*turns))
    manager = EnvironmentManager(tokenizer, DATE, (tokenizer.eos_token_id,), None)
    sample = run(engine, request_of(prompt, tokenizer), manager)
    assert tokenizer.decode(sample.token_ids) == "3 * 9 + 4 = 3 * 9 = 10 10 + 4 = 14 [ 14 ] <eos>"
    expected = [0] * 6 + [1] * 4 + [0] + [1] * 4 + [0] + [1] * 4
    assert sample.response_mask.tolist() == [bool(value) for value in expected]
    assert (sample.finish_reason, sample.num_turns, sample.response_length) == ("stop", 3, 12)
    assert sample.turn_starts.tolist() == [6, 11, 16] and sample.prompt_length == 6
    # Token in, token out: every request is the one before it, what was sampled after it, and the observation.
    (_, first), (_, second), (_, third) = engine.requests
    assert second == [*first, *turns[0], *words("10")] and third == [*second, *turns[1], *words("14")]
    assert [name for name, _ in engine.requests] == [f"{prompt.id}#0@1{end}" for end in ("", "/1", "/2")]
    # Log-probabilities of the model's tokens only, at their places.
    table = engine.log_probs(0)
    for index in range(1, sample.length):
        wanted = table[sample.token_ids[index - 1], sample.token_ids[index]] if sample.response_mask[index] else 0.0
        assert sample.rollout_log_probs[index] == pytest.approx(wanted, abs=1e-6)
    assert [(span.start, span.stop) for span in sample.weight_versions] == [(6, 10), (11, 15), (16, 20)]
    with RewardManager() as rewards:
        assert rewards.grade([prompt], [last_turn_text(tokenizer, sample)])[0].label == "correct"
    assert [part["role"] for part in episode_text(tokenizer, sample)] == ["model", "environment"] * 2 + ["model"]


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("3 * 9", 10), ("3 - 9", 11), ("16 + 1", 0), ("17 + 1", None), ("3 * 10", None), ("3 * 0", None),
        ("3 9", None), ("* 3 9", None), ("= 3 9", None), ("-3 + 9", None), ("", None),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_read_have_no_result(call, result):
    assert calculate(call.split(), 17) == result


def test_a_bad_call_ends_the_episode_with_its_own_label(tokenizer, words):
    prompt = task_prompts(task(environment="calculator"), tokenizer)[0]
    manager = EnvironmentManager(tokenizer, DATE, (tokenizer.eos_token_id,), None)
    sample = run(StandInEngine(script=says(words("3 3 ="))), request_of(prompt, tokenizer), manager)
    assert (sample.finish_reason, sample.reward, sample.verifier_label) == ("stop", 0.0, "bad_call")


class Talks:
    """Answers every turn with the same tokens; counts what it was asked."""

    stop_token_ids = ()

    def __init__(self, *steps, delay=0.0):
        self.steps, self.delay, self.seeds, self.turns = list(steps), delay, [], []

    async def reset(self, prompt, seed):
        self.seeds.append(seed)

    async def step(self, turn):
        self.turns.append(turn.token_ids.tolist())
        await asyncio.sleep(self.delay)
        return self.steps[min(len(self.turns), len(self.steps)) - 1]


def play(environment, tokenizer, turns, *, max_new_tokens=30, **limits):
    prompt = Prompt("p", np.array([3, 4]), "", "math", None, None)
    engine = StandInEngine(25, says(*turns))

    async def episode(client):
        return await run_episode(
            client, request_of(prompt, tokenizer, max_new_tokens=max_new_tokens), environment,
            EnvironmentLimits(**limits), tokenizer,
        )  # fmt: skip

    return engine.run([episode])[0], engine


def test_limits_on_turns_and_tokens_truncate(tokenizer):
    end = tokenizer.eos_token_id
    goes_on = Step(np.array([9, 9, 9]))
    sample, _ = play(Talks(goes_on), tokenizer, [[5, end]] * 9, max_turns=2)
    assert (sample.num_turns, sample.finish_reason, sample.length) == (2, "length", 2 + 2 + 3 + 2)
    # An observation that leaves no room for a turn is left out: the sample ends with a token of the model.
    sample, engine = play(Talks(goes_on), tokenizer, [[5, end]] * 9, max_new_tokens=10)
    assert (sample.num_turns, sample.finish_reason, sample.response_mask[-1]) == (2, "length", True)
    assert len(engine.requests) == 2 and sample.length == 9
    sample, _ = play(Talks(goes_on), tokenizer, [[5, 6, 7, end], [5, end]], max_turn_tokens=3)
    assert (sample.num_turns, sample.finish_reason) == (1, "length")


def test_rewards_of_turns_and_seeds_of_turns(tokenizer):
    end = tokenizer.eos_token_id
    environment = Talks(Step(np.array([9]), 0.25), Step(np.array([9]), -1.0), Step(None, 2.0, Verdict(1.0, "correct")))
    sample, _ = play(environment, tokenizer, [[5, end]] * 3)
    assert sample.turn_rewards == (0.25, -1.0, 2.0) and sample.reward == 1.0
    assert environment.seeds == [5] and environment.turns == [[5, end]] * 3
    for copy in (sample_from_json(sample_to_json(sample)), decode_samples(encode_samples([sample]))[0][0]):
        assert copy.turn_rewards == sample.turn_rewards and np.array_equal(copy.response_mask, sample.response_mask)
    assert turn_seed(5, 0) == 5 and len({turn_seed(5, turn) for turn in range(50)}) == 50
    assert all(0 <= turn_seed(seed, 1) < 2**63 for seed in range(100))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(np.array([9]), float("nan")), "no Step with a finite reward"),
        (None, "no Step with a finite reward"),
        (Step(np.array([], dtype=np.int64)), r"int64 \(0,\)"),
        (Step(np.array([[1, 2]])), r"\(1, 2\)"),
        (Step(np.array([1.0])), "float64"),
        (Step(np.array([25])), "outside of the vocabulary of 25"),
        (Step(np.array([-1])), "outside of the vocabulary"),
    ],
)
def test_an_environment_that_answers_nonsense_stops_with_one_line(step, message, tokenizer):
    with pytest.raises(UserError, match=message):
        play(Talks(step), tokenizer, [[5, tokenizer.eos_token_id]])


def test_time_is_a_guard_and_never_changes_a_sample(tokenizer):
    turns = [[5, tokenizer.eos_token_id]] * 3
    steps = (Step(np.array([9])), Step(np.array([9])), Step(None))
    slow, _ = play(Talks(*steps, delay=0.02), tokenizer, turns, max_seconds=60)
    fast, _ = play(Talks(*steps), tokenizer, turns)
    assert sample_to_json(slow) == sample_to_json(fast)
    with pytest.raises(UserError, match=r"prompt p: its environment took more than max_seconds 0.05"):
        play(Talks(*steps, delay=30), tokenizer, turns, max_seconds=0.05)

    class Broken(Talks):
        async def step(self, turn):
            raise KeyError("no such room")

    with pytest.raises(UserError, match=r"prompt p: its environment failed \(KeyError: 'no such room'\)"):
        play(Broken(), tokenizer, turns)


def test_routes_are_those_of_the_weights_that_sampled_each_token(tokenizer):
    """Rows up to the last sampled token of a turn come from its own completion, later ones from the next."""

    class Client:
        version = 0

        def __init__(self):
            self.calls = 0

        async def sample(self, token_ids, params, *, seed, request_id, priority=0):
            self.calls += 1
            routes = np.full((len(token_ids) + 1, 1, 1), self.calls, dtype=np.uint8)
            spans = (WeightVersionSpan(0, 2, self.calls),)
            return Completion(np.array([5, 1]), np.zeros(2, np.float32), "stop", spans, routes)

    prompt = Prompt("p", np.array([3, 4]), "", "math", None, None)
    environment = Talks(Step(np.array([9, 9])), Step(None))
    sample = asyncio.run(
        run_episode(Client(), request_of(prompt, tokenizer), environment, EnvironmentLimits(), tokenizer)
    )
    assert sample.length == 2 + 2 + 2 + 2
    assert sample.routed_experts[:, 0, 0].tolist() == [1, 1, 1, 2, 2, 2, 2]
    assert [(span.start, span.stop, span.version) for span in sample.weight_versions] == [(2, 4, 1), (6, 8, 2)]


def test_retry_tells_the_model_what_the_verifier_said_and_ends_with_the_first_correct_attempt(tokenizer, words):
    settings = {"type": "retry", "message": "= =", "turn_reward": -0.1, "max_turns": 3}
    prompts = task_prompts(task(environment=settings), tokenizer)[:2]
    right = [words(f"[ {prompt.answer} ] <eos>") for prompt in prompts]
    wrong = words("[ 16 ] <eos>") if prompts[0].answer != "16" else words("[ 15 ] <eos>")
    with RewardManager() as rewards:
        manager = EnvironmentManager(tokenizer, DATE, (tokenizer.eos_token_id,), rewards)
        sample = run(StandInEngine(script=says(wrong, wrong, right[0])), request_of(prompts[0], tokenizer), manager)
        assert sample.num_turns == 3 and sample.verifier_label == "correct" and sample.turn_rewards == (-0.1, -0.1, 0.0)
        last = run(StandInEngine(script=says(wrong, wrong, wrong)), request_of(prompts[0], tokenizer), manager)
        assert (last.num_turns, last.reward, last.finish_reason) == (3, 0.0, "stop")
        # Several episodes at once, through the worker, which adds the rewards of turns.
        layout = types.SimpleNamespace(
            dp_rank=0, dp_size=1, is_dp_leader=True, is_replica_root=True, leader_in_replica=0,
            host_dp=HostGroup(), host_replica=HostGroup(),
        )  # fmt: skip
        scripts = {tuple(prompt.token_ids): says(wrong, ids) for prompt, ids in zip(prompts, right, strict=True)}

        def script(token_ids, position):
            return scripts[tuple(token_ids[: len(prompts[0].token_ids)])](token_ids, position)

        params = SamplingParams(30, (tokenizer.eos_token_id,))
        worker = RolloutWorker(layout, StandInEngine(script=script), params, 1, tokenizer, rewards, manager)
        samples = worker.sample(prompts, 1, 1)
        assert [sample.reward for sample in samples] == pytest.approx([0.9, 0.9])
        assert response_metrics(samples)["num_turns"] == 2 and response_metrics(samples)["verifier/correct"] == 1
        manager.close()


def test_prompts_without_an_environment_are_one_call_of_the_engine_and_one_turn_of_an_episode(tokenizer):
    """Both ways give the same sample, bit for bit, where the engine is the same."""
    prompt = task_prompts(task(), tokenizer)[0]
    engine = StandInEngine(25)
    manager = EnvironmentManager(tokenizer, DATE, (tokenizer.eos_token_id,), None)
    sample = run(engine, request_of(prompt, tokenizer), manager)

    async def plain(client):
        request = request_of(prompt, tokenizer)
        return await client.sample(prompt.token_ids, request.params, seed=request.seed, request_id=request.id)

    (completion,) = StandInEngine(25).run([plain])
    assert np.array_equal(sample.token_ids[sample.prompt_length :], completion.token_ids)
    assert np.array_equal(sample.rollout_log_probs[sample.prompt_length :], completion.log_probs)

    class Calls:
        def generate(self, requests, progress=None):
            self.requests = requests
            return [sample]

    calls = Calls()
    worker = RolloutWorker(None, calls, None, 1, tokenizer, None, manager)
    assert worker.generate([request_of(prompt, tokenizer)]) == [sample] and len(calls.requests) == 1


def test_documents_with_calls_are_worked_like_calls_and_change_no_other_document(tokenizer):
    plain, calls = (
        task_documents(
            TaskSource(split="corpus", num_operations=2, direct_fraction=0.0, call_fraction=share), tokenizer, 0, 200
        )
        for share in (0.0, 1.0)
    )
    assert [document.text for document in plain] == [document.text for document in calls]
    for document, other in zip(plain, calls, strict=True):
        solution, with_calls = (tokenizer.decode(item.solution_token_ids).split() for item in (document, other))
        values = document.text.split()
        assert with_calls[-4:] == solution[-4:] and with_calls.count("=") == 2
        assert with_calls[:4] == [values[0], *values[1:3], "="] and with_calls[5] == with_calls[4]


def test_settings_of_environments():
    assert isinstance(task(environment="calculator").resolved_environment, CalculatorEnvironment)
    assert task(environment="calculator", modulus=13).resolved_environment.modulus == 13
    text = environment_text(task(environment={"type": "retry", "message": "="}).environment)
    assert isinstance(read_environment(text), RetryEnvironment) and read_environment(text).max_turns == 2
    for source, message in (
        (lambda: task(environment={"type": "python", "tool_parser": "qwen3"}), "needs a chat model"),
        (lambda: FileSource(path="x.jsonl", environment="calculator"), "of the embedded task"),
        (lambda: FileSource(path="x.jsonl", environment="retry", verifier=None), "set verifier"),
        (lambda: task(environment="chess"), "does not match any of the expected tags"),
        (lambda: task(environment={"type": "retry", "max_turns": 1}), "greater than or equal to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            source()


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (qwen3_calls, 'a <tool_call>\n{"name": "python", "arguments": {"code": "print({})"}}\n</tool_call>',
         [("python", {"code": "print({})"}, None)]),
        (qwen3_calls, '<tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "b"}</tool_call>',
         [("a", {}, None), ("b", {}, None)]),
        (qwen3_calls, "the answer is 4", []),
        (qwen3_calls, '<tool_call>{"name": "a"', [("", {}, "the call has no </tool_call>")]),
        (qwen3_calls, "<tool_call>print(1)</tool_call>", [("", {}, "the call is not JSON")]),
        (qwen3_calls, '<tool_call>["a"]</tool_call>', [("", {}, "the call needs a name and arguments")]),
        (qwen3_calls, '<tool_call>{"name": "a", "arguments": 1}</tool_call>',
         [("a", {}, "arguments must be an object")]),
        (qwen3_calls, f"<tool_call>{'[' * 100_000}</tool_call>", [("", {}, "the call is not JSON")]),
        (llama3_calls, '{"name": "python", "parameters": {"code": "1"}}<|eom_id|>', [("python", {"code": "1"}, None)]),
        (llama3_calls, '<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b"}<|eot_id|>',
         [("a", {}, None), ("b", {}, None)]),
        (llama3_calls, "<|python_tag|>print(1)<|eom_id|>", [("", {}, "the call is not JSON")]),
        (llama3_calls, "the set {1, 2}", []),
        (llama3_calls, "{1, 2}<|eot_id|>", []),
    ],
)  # fmt: skip
def test_tool_calls_of_qwen3_and_llama3(parse, text, expected):
    assert [(call.name, call.arguments, call.error) for call in parse(text)] == expected
