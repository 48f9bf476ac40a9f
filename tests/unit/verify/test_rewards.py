"""Rewards of one's own: functions in worker processes, judges behind HTTP, sums, and partial credit for programs."""

import http.server
import importlib.util
import json
import logging
import threading
import time
import typing
from pathlib import Path

import numpy as np
import pytest

from megatron_s2d.config.base import parse
from megatron_s2d.config.data import FileSource, TaskSource
from megatron_s2d.config.reward import (
    FunctionReward,
    HttpReward,
    needs_label,
    read_verifier,
    runs_unit_tests,
    verifier_text,
)
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.verify import RewardManager, check_labels

ROOT = Path(__file__).resolve().parents[3]
MODULE = """
import asyncio, os, time
import numpy as np

print("this goes to standard error")

def length(prompt, response, answer):
    print("not a reply")
    return len(response) - len(prompt), f"{answer} is the answer"

def moody(prompt, response, answer):
    if response == "raise":
        raise ValueError("no\\nway")
    if response == "hang":
        time.sleep(60)
    if response == "exit":
        os._exit(3)
    values = {"nan": float("nan"), "text": "1.0", "none": None, "numpy": np.float32(0.5), "bool": True}
    return values.get(response, 0.25)

async def slow(prompt, response, answer):
    await asyncio.sleep(60 if response == "hang" else 0.05)
    return float(response)

def together(prompt, response, answer):
    if "exit" in response:
        os._exit(3)
    if "short" in response:
        return [1.0]
    return np.array([len(text) for text in response]) / len(response)
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory):
    """The user's module, in the working directory of the trainer."""
    directory = tmp_path_factory.mktemp("work")
    (directory / "my_rewards.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield


def prompts_of(verifier, count, answer="7"):
    return [
        Prompt(f"p/{index}", np.zeros(1, np.int64), "ask", "d", verifier_text(verifier), answer)
        for index in range(count)
    ]


def grade(verifier, responses, answer="7"):
    with RewardManager() as manager:
        verdicts = manager.grade(prompts_of(verifier, len(responses), answer), responses)
    return [(verdict.reward, verdict.label) for verdict in verdicts], [verdict.detail for verdict in verdicts]


def test_a_function_gives_any_real_reward_and_a_remark():
    reward = FunctionReward(function="my_rewards:length", correct_at=-1.0, num_workers=1)
    graded, details = grade(reward, ["", "ab", "abcdef"])
    assert graded == [(-3.0, "wrong"), (-1.0, "correct"), (3.0, "correct")]
    assert details == ["7 is the answer"] * 3


def test_failures_of_a_function_count_as_stated_and_lose_nothing(caplog):
    reward = FunctionReward(function="my_rewards:moody", timeout_seconds=1.0, failure_reward=-2.0, num_workers=1)
    responses = ["fine", "raise", "hang", "exit", "nan", "text", "none", "numpy", "bool", "fine"]
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        graded, details = grade(reward, responses)
    assert time.monotonic() - started < 300
    assert graded == [
        (0.25, "wrong"), (-2.0, "error"), (-2.0, "timeout"), (-2.0, "crash"), (-2.0, "not_finite"),
        (-2.0, "wrong_shape"), (-2.0, "wrong_shape"), (0.5, "wrong"), (1.0, "correct"), (0.25, "wrong"),
    ]  # fmt: skip
    assert details[1] == "ValueError: no way" and details[2] == "no result after 1 s"
    (line,) = caplog.messages
    assert line == (
        "reward my_rewards:moody: 6 of 10 responses could not be graded, for example to prompt p/1: error: "
        "ValueError: no way (they count as reward -2)"
    )


def test_a_failure_is_never_correct_and_may_stop_the_run():
    graded, _ = grade(FunctionReward(function="my_rewards:moody", failure_reward=5.0, num_workers=1), ["raise"])
    assert graded == [(5.0, "error")]
    stopping = FunctionReward(function="my_rewards:moody", failure_reward=None, num_workers=1)
    with pytest.raises(UserError, match="p/0: error: ValueError: no way; mend it, or set failure_reward"):
        grade(stopping, ["raise"])


def test_an_async_function_is_awaited_for_several_responses_at_once():
    reward = FunctionReward(function="my_rewards:slow", timeout_seconds=2.0, concurrency=16, num_workers=1)
    started = time.monotonic()
    graded, _ = grade(reward, [*map(str, range(10)), "hang", "word"])
    assert time.monotonic() - started < 300
    assert graded[:10] == [(float(number), "correct" if number else "wrong") for number in range(10)]
    assert graded[10:] == [(0.0, "timeout"), (0.0, "error")]


def test_a_batched_function_gets_lists_and_one_response_does_not_spoil_the_others():
    reward = FunctionReward(function="my_rewards:together", batch_size=4, num_workers=1)
    graded, _ = grade(reward, ["a", "bb", "ccc", "dddd", "short", "ff", "exit", "e"])
    assert [value for value, _ in graded[:4]] == [0.25, 0.5, 0.75, 1.0]
    # The second call failed as a whole, so its responses were graded one by one.
    assert graded[4:] == [(1.0, "correct"), (2.0, "correct"), (0.0, "crash"), (1.0, "correct")]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module:f", "verifier no_such_module:f: ModuleNotFoundError: No module named 'no_such_module'"),
        ("my_rewards:no_such", "verifier my_rewards:no_such: AttributeError: .* has no attribute 'no_such'"),
        ("my_rewards:os", "verifier my_rewards:os: TypeError: os is not a function"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_the_run(function, message):
    with pytest.raises(UserError, match=message):
        check_labels(prompts_of(FunctionReward(function=function), 2, answer=None))


# ------------------------------------------------------------------------------------------------------------- judges


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers by what the response says; ``requests`` has what it was sent."""

    requests: typing.ClassVar[list] = []
    busy: typing.ClassVar[int] = 0  # how many requests are answered with 503 first

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append((self.path, self.headers.get("Authorization"), body))
        said = body.get("response") or body["messages"][0]["content"]
        if said == "busy" and type(self).busy > 0:
            type(self).busy -= 1
            return self.reply(503, b"{}")
        if said == "moved":
            return self.reply(302, b"{}", Location="http://localhost:1/elsewhere")
        if said == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            return None
        texts = {"nan": b'{"reward": NaN}', "list": b'{"reward": [1]}', "page": b"<html>", "long": b"x" * 5000}
        if self.path == "/v1/chat/completions":
            words = "Score: 0.2, no.\nScore: 0.9" if "good" in said else "I cannot say."
            return self.reply(200, json.dumps({"choices": [{"message": {"content": words}}]}).encode())
        return self.reply(200, texts.get(said, b'{"reward": 0.75, "detail": "well done"}'))

    def reply(self, status, content, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    Judge.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.handle_error = lambda *_: None  # clients that hang up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_reward_model_is_asked_by_plain_json(url):
    reward = HttpReward(url=f"{url}/score?v=1", correct_at=0.7)
    graded, details = grade(reward, ["good"], answer=None)
    assert graded == [(0.75, "correct")] and details == ["well done"]
    assert Judge.requests == [("/score?v=1", None, {"prompt": "ask", "response": "good", "answer": None})]


def test_a_judge_is_asked_by_chat_completions_and_its_verdict_is_kept(url, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    reward = HttpReward(
        url=f"{url}/v1/chat/completions", protocol="openai", model="judge", api_key_file=tmp_path / "key",
        template="{prompt}|{response}|{answer}", correct_at=0.9,
    )  # fmt: skip
    graded, details = grade(reward, ["good {answer}", "bad"])
    assert graded == [(0.9, "correct"), (0.0, "bad_reply")]
    assert details[0] == "Score: 0.2, no.\nScore: 0.9" and "I cannot say." in details[1]
    path, key, body = next(request for request in Judge.requests if "good" in str(request))
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "judge")
    assert body["messages"][0]["content"] == "ask|good {answer}|7"  # a response cannot fill in places


def test_replies_are_bounded_in_time_size_and_attempts(url):
    Judge.busy = 1
    reward = HttpReward(url=url, timeout_seconds=1.0, max_retries=1, max_reply_bytes=1000, failure_reward=-1.0)
    started = time.monotonic()
    graded, details = grade(reward, ["busy", "drip", "moved", "nan", "list", "page", "long"])
    assert time.monotonic() - started < 300
    assert graded[0] == (0.75, "wrong")
    assert [label for _, label in graded[1:]] == [
        "timeout", "refused", "not_finite", "bad_reply", "bad_reply", "too_long",
    ]  # fmt: skip
    assert all(value == -1.0 for value, _ in graded[1:]) and details[2] == "status 302 Found"
    sent = [request[2]["response"] for request in Judge.requests]
    assert sent.count("busy") == 2 and sent.count("drip") == 2 and sent.count("moved") == 1


def test_an_endpoint_that_is_not_there_is_a_failure():
    reward = HttpReward(url="http://127.0.0.1:9/", max_retries=0, failure_reward=None)
    with pytest.raises(UserError, match=r"judge http://127.0.0.1:9/: 2 of 2 .* unreachable: ConnectionRefusedError"):
        grade(reward, ["a", "b"])


# ------------------------------------------------------------------------------------------------------ sums and code


def test_a_judge_is_asked_once_before_the_run(url):
    good = prompts_of(HttpReward(url=url), 3)
    check_labels(good)
    check_labels(good)  # of another stage
    assert [body["response"] for _, _, body in Judge.requests] == ["7"]
    with pytest.raises(UserError, match=r"gives no reward for the label of prompt p/0: bad_reply"):
        check_labels(prompts_of(HttpReward(url=f"{url}/other"), 1, answer="page"))
    with pytest.raises(UserError, match=r"unreachable: .*start the endpoint"):
        check_labels(prompts_of(HttpReward(url="http://127.0.0.1:1/", max_retries=0), 1))


def test_a_sum_weighs_real_rewards_and_keeps_its_parts():
    settings = {
        "type": "sum",
        "correct_at": 1.0,
        "terms": [{"weight": 1.0, "verifier": "math"}, {"weight": -0.01, "verifier": "my_rewards:length"}],
    }
    reward = parse(FileSource, {"path": "x.jsonl", "verifier": settings}, "file").verifier
    graded, details = grade(reward, [r"\boxed{7}", r"\boxed{8}", "7" * 103])
    assert [value for value, _ in graded] == pytest.approx([0.94, -0.06, -1.0])
    assert [label for _, label in graded] == ["wrong", "wrong", "wrong"]
    assert json.loads(details[0]) == [[1.0, "correct", None], [6.0, "correct", "7 is the answer"]]


SORT = "def f(values):\n    return {}\n"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (SORT.format("sorted(values)"), (1.0, "correct")),
        (SORT.format("values"), (0.5, "wrong")),  # right where the list is sorted already
        (SORT.format("values if len(values) < 3 else 1 // 0"), (0.25, "wrong")),
        (SORT.format("sorted(values) if len(values) < 3 else __import__('os')._exit(0)"), (0.5, "crash")),
    ],
)
def test_partial_credit_for_calls(program, expected):
    label = {"inputs": [[[1]], [[2, 1]], [[1, 2, 3]], [[3, 2, 1]]], "outputs": [[1], [1, 2], [1, 2, 3], [1, 2, 3]]}
    assert _code(label | {"fn_name": "f"}, program, {}) == expected


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (SORT.format("sorted(values)"), (1.0, "correct")),
        (SORT.format("[value + 1e-9 for value in sorted(values)]"), (1.0, "correct")),
        (SORT.format("values"), (0.5, "wrong")),
        (SORT.format("sorted(values) if len(values) != 2 else 1 // 0"), (0.75, "error")),
        (SORT.format("sorted(values) if len(values) != 2 else __import__('os')._exit(0)"), (0.75, "crash")),
        ("1 / 0\n" + SORT.format("sorted(values)"), (0.0, "error")),
        ("__import__('os')._exit(0)\n" + SORT.format("sorted(values)"), (0.0, "crash")),
    ],
)
def test_partial_credit_for_calls_that_are_compared_with_a_reference(program, expected):
    label = {
        "kind": "reference",
        "reference": SORT.format("sorted(values)"),
        "entry_point": "f",
        "inputs": [[[1]], [[2, 1]], [[1, 2, 3]], [[3, 2, 1]]],
        "example": "[[1]]",
        "compare": "value",
        "tolerance": 0.0,
    }
    assert _code(label, program, {}) == expected
    assert _code(label, program, {"partial_credit": False})[0] == float(expected[0] == 1)


def test_partial_credit_for_scripts_and_where_a_response_counts_as_correct():
    label = {"inputs": ["1", "2", "3", "4"], "outputs": ["1", "4", "9", "15"]}
    program = "print(int(input()) ** 2)"
    assert _code(label, program, {}) == (0.75, "wrong")
    assert _code(label, program, {"correct_at": 0.75}) == (0.75, "correct")
    assert _code(label, program, {"partial_credit": False}) == (0.0, "wrong")
    assert _code(label, "1 / 0", {}) == (0.0, "error")
    assert _code(label, "print(15)", {}) == (0.25, "wrong")  # the last case passes


CHECK = """\
def check(f):
    assert f([1]) == [1]
    for values in ([2, 1], [1, 2]):
        assert f(values) == [1, 2]
    smallest = f([3, 2, 1])[0]
    assert smallest == 1
    assert f([]) == []
"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (SORT.format("sorted(values)"), (1.0, "correct")),
        (SORT.format("values"), (0.5, "wrong")),  # the second assert holds for one of two lists only
        (
            SORT.format("sorted(values) if len(values) < 3 else []"),
            (0.5, "wrong"),
        ),  # the others are behind an exception
        (SORT.format("1 // 0"), (0.0, "error")),
        (SORT.format("sorted(values) if len(values) < 2 else __import__('os')._exit(0)"), (0.25, "crash")),
    ],
)
def test_partial_credit_for_the_asserts_of_test_code(program, expected):
    label = {"test": CHECK, "entry_point": "f"}
    assert _code(label, program, {}) == expected
    assert _code(label, program, {"partial_credit": False})[0] == float(expected[0] == 1)


def _code(label, program, settings):
    source = parse(FileSource, {"path": "x.jsonl", "verifier": {"type": "code"} | settings}, "file")
    graded, _ = grade(source.verifier, [f"```python\n{program}```"], json.dumps(label))
    return graded[0]


# ------------------------------------------------------------------------------------------------------- configuration


def test_texts_stand_for_settings_and_labels_are_needed_by_some():
    def verifier(value):
        return parse(FileSource, {"path": "x.jsonl", "verifier": value}, "file").verifier

    assert verifier("a.b:c") == FunctionReward(function="a.b:c")
    assert verifier("https://host/x") == HttpReward(url="https://host/x")
    assert verifier("math") == "math" and verifier(None) is None
    assert needs_label("math") and not needs_label(verifier("a:b")) and not needs_label(None)
    mixed = verifier({"type": "sum", "terms": [{"weight": 1, "verifier": "a:b"}, {"weight": 1, "verifier": "code"}]})
    assert needs_label(mixed) and runs_unit_tests(mixed)
    assert all(read_verifier(verifier_text(one)) == one for one in (mixed, verifier("a.b:c"), "math"))
    assert parse(TaskSource, {"split": "pool", "verifier": "a:b"}, "file").verifier == FunctionReward(function="a:b")


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ({"type": "function", "function": "a"}, "verifier.function: String should match"),
        ({"type": "function", "function": "a:b", "batch_size": 2, "concurrency": 2}, "set one of them"),
        ({"type": "http", "url": "file:///etc/passwd"}, "expected http://host:port/path"),
        ({"type": "http", "url": "http://user:word@host/"}, "without a user name"),
        ({"type": "http", "url": "http://host", "protocol": "openai"}, "`model` goes with protocol: openai"),
        ({"type": "http", "url": "http://host", "score_pattern": "score"}, "needs one group in parentheses"),
        ({"type": "http", "url": "http://host", "score_pattern": "("}, "not a regular expression"),
        ({"type": "sum", "terms": []}, "at least 1 item"),
    ],
)
def test_wrong_settings_are_refused(verifier, message):
    with pytest.raises(UserError, match=message):
        parse(FileSource, {"path": "x.jsonl", "verifier": verifier}, "file")


def test_the_example_gives_credit_for_every_right_step():
    spec = importlib.util.spec_from_file_location("own_reward", ROOT / "configs/own_reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompt = "14 * 7 - 7 ="  # 13, 6 (modulo 17)
    assert module.steps(prompt, "13 6 [ 6 ]", "6") == (1.0, "2 of 2 steps")
    assert module.steps(prompt, "13 5 [ 5 ]", "6") == (0.25, "1 of 2 steps")
    assert module.steps(prompt, "[ 6 ]", "6") == (0.5, "0 of 2 steps")
    assert module.steps(prompt, "", None) == (0.0, "0 of 2 steps")
    assert load_workflow(ROOT / "configs/own_reward.yaml").data["steps"].verifier.function == "configs.own_reward:steps"
