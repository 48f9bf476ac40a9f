"""What a judge said about a response is on disk wherever the response is: caches, evaluations, rollouts of a step."""

import http.server
import json
import threading

import pytest

from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.rollout.sampler import response_text
from megatron_s2d.stages.evaluate import RESPONSES_NAME, run_evaluation

SAMPLING = {"max_response_length": 8, "temperature": 0.7}


@pytest.fixture
def judge(workflow):
    """Grades the prompts of the workflow: (response, prompt) -> every (reward, remark) that it gave; none twice."""
    given: dict[tuple[str, str], list[tuple[float, str]]] = {}
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = sum(map(len, given.values()))
                reward, remark = number % 7 / 7, f"remark {number}: ünfounded"
                given.setdefault((asked["prompt"], asked["response"]), []).append((reward, remark))
            content = json.dumps({"reward": reward, "detail": remark}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    verifier = {"type": "http", "url": f"http://127.0.0.1:{server.server_port}/", "correct_at": 0.5}
    entry = {"type": "task", "num_operations": 2, "verifier": verifier}
    workflow.data = {"pool": entry | {"split": "pool", "num_prompts": 12}}
    yield given
    server.shutdown()
    server.server_close()


def assert_as_given(judge, rows) -> None:
    """rows: (prompt, response, reward, remark, label, reason). Each verdict was given, to this response, and once."""
    rows = list(rows)
    ended = [row for row in rows if row[5] == "stop"]
    assert ended and len(ended) < len(rows)
    for prompt, response, reward, remark, label, _ in ended:
        judge[prompt, response].remove((reward, remark))
        assert label == ("correct" if reward >= 0.5 else "wrong")
    assert all(row[3] is None and row[4] == "truncated" for row in rows if row[5] == "length")


def test_of_a_teacher_cache(workflow, judge):
    context = workflow.run(
        "cache", type="teacher_cache", teacher="teacher", prompts="pool", num_generations=4, sampling=SAMPLING,
        representation="sampled_token", only_correct=True,
    )  # fmt: skip
    texts = {prompt.id: prompt.text for prompt in context.inputs.prompts("pool")}
    kept = context.inputs.teacher_cache("cache").samples
    for sample in kept:
        response = response_text(context.inputs.tokenizer, sample)
        judge[texts[sample.prompt_id], response].remove((sample.reward, sample.verifier_detail))
    assert kept and all(sample.reward >= 0.5 for sample in kept)
    assert all(reward < 0.5 for left in judge.values() for reward, _ in left)  # of those that were not kept


def test_of_an_evaluation(workflow, judge):
    context = workflow.context("student", type="load_checkpoint", model="toy")
    prompts = context.inputs.prompts("pool")
    run_evaluation(context, [(prompts, 3)], sampling=SamplingConfig(**SAMPLING), seed=11, eval_batch_size=5)
    texts = {prompt.id: prompt.text for prompt in prompts}
    responses = [json.loads(line) for line in (context.directory.path / RESPONSES_NAME).read_text().splitlines()]
    assert_as_given(
        judge,
        (
            (texts[row["problem_id"]], row["response"], row["reward"], row.get("verifier_detail"),
             row["verifier_label"], row["finish_reason"])
            for row in responses
        ),
    )  # fmt: skip
    assert not any(judge.values()), "every verdict is stored"


def test_of_the_rollouts_of_a_step(workflow, judge):
    context = workflow.run(
        "rl", type="grpo", init="student", prompts="pool", steps=6, train_batch_size=2, num_generations=3,
        sampling=SAMPLING, optimizer={"lr": 0.02},
    )  # fmt: skip
    rows = [json.loads(line) for line in (context.directory.path / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert_as_given(
        judge,
        (
            (row["prompt"], row["response"], row["reward"], row.get("verifier_detail"), row["verifier_label"],
             row["finish_reason"])
            for row in rows
        ),
    )  # fmt: skip
