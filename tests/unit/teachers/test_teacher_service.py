"""Clients of a teacher service: messages, servers that die, restart or lie, requests in the background."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time

import numpy as np
import pytest

from megatron_s2d.config.teacher_service import TeacherServiceConfig
from megatron_s2d.errors import UserError
from megatron_s2d.teachers.service import client as client_module
from megatron_s2d.teachers.service.client import Identity, TeacherClient
from megatron_s2d.teachers.service.info import TeacherInfo
from megatron_s2d.teachers.service.score_queue import ScoreQueue
from megatron_s2d.teachers.service.scorer import block_digest
from megatron_s2d.teachers.service.server import TeacherServer
from megatron_s2d.teachers.service.wire import ScoreRequest, WireError, decode, encode

VOCAB, HIDDEN, BLOCK = 11, 4, 3
LIMITS = {"vocab_size": VOCAB, "max_positions": 64, "max_tokens": 1000}


def request(payload: str = "sampled", **changes) -> ScoreRequest:
    """Two sequences of 5 and 4 tokens, with 3 response tokens in each."""
    ids = np.arange(9, dtype=np.int32) % VOCAB
    mask = np.array([0, 0, 1, 1, 1, 0, 1, 1, 1], dtype=np.uint8)
    plain = ScoreRequest(payload, ids, np.array([5, 4], np.int32), mask, np.ones(2, np.float32))
    return dataclasses.replace(plain, **changes)


class StandIn:
    """A real server in front of a table of numbers; ``change`` may spoil its replies."""

    def __init__(self, *, seed: int = 0, digest: str = "files", instance: str = "first", key: str = "", port: int = 0):
        rng = np.random.default_rng(seed)
        self.layer = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
        self.table = -np.abs(rng.normal(size=VOCAB)).astype(np.float32)
        digests = [block_digest(self.layer[start : start + BLOCK]) for start in range(0, VOCAB, BLOCK)]
        spec = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "max_position_embeddings": 64}
        info = TeacherInfo(1, instance, digest, digests, BLOCK, spec, "float32", "tokenizer", 1000)
        self.server = TeacherServer(info, self.layer, "{}", api_key=key)
        self.change = lambda tensors: tensors
        self.answered: list[ScoreRequest] = []
        self._port, self._stopped, self._stack = port, threading.Event(), contextlib.ExitStack()

    def __enter__(self) -> StandIn:
        self._stack.enter_context(self.server.listening("127.0.0.1", self._port))
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.thread.join()
        self._stack.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def _work(self) -> None:
        while not self._stopped.is_set():
            job = self.server.next_job(0.02)
            if job is not None:
                self.answered.append(job.request)
                job.reply.set_result(self.change(self.answer(job.request)))

    def answer(self, asked: ScoreRequest) -> dict[str, np.ndarray]:
        if asked.payload == "hidden":
            return {"hidden": self.layer[asked.token_ids[asked.response_mask.astype(bool)]]}
        return {"log_probs": self.table[asked.token_ids[asked.response_mask.astype(bool)]]}


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(client_module, "_LONGEST_PAUSE_SECONDS", 0.1)


def connected(*servers: StandIn, **settings) -> TeacherClient:
    urls = [server.url for server in servers]
    client = TeacherClient(TeacherServiceConfig(url=urls, **settings), "stages.opd.teacher_service")
    client.connect()
    return client


# ---------------------------------------------------------------------- messages


def test_messages_keep_every_bit_and_every_cut_or_added_byte_is_refused():
    tensors = {
        "a": np.array([[1.5, -np.inf]], np.float32),
        "b": np.arange(3, dtype=np.uint16),
        "c": np.zeros((0, 4), np.int32),
    }
    data = encode({"k": 1}, tensors)
    meta, found = decode(data)
    assert meta == {"k": 1} and list(found) == list(tensors)
    assert all(
        np.array_equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items()
    )
    for size in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:size])
    with pytest.raises(WireError, match="1 bytes more"):
        decode(data + b"x")


def test_requests_survive_the_journey():
    ids = np.array([[1, 2]] * 6, dtype=np.int32)
    sent = request("top_k", k=2, source="union", student_ids=ids)
    found = ScoreRequest.decode(sent.encode(), **LIMITS)
    for field in dataclasses.fields(ScoreRequest):
        assert np.array_equal(getattr(found, field.name), getattr(sent, field.name))
    assert sent.reply_shapes(VOCAB, HIDDEN, "float32")["ids"] == ("int32", (6, 4))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_ids": np.full(9, VOCAB, np.int32)}, "outside the vocabulary"),
        ({"lengths": np.array([5, 5], np.int32)}, "9 tokens and 9 marks for sequences of 10"),
        ({"lengths": np.array([9, 0], np.int32)}, "9 tokens and 9 marks"),
        ({"temperatures": np.ones(1, np.float32)}, "one temperature for each"),
        ({"response_mask": np.ones(9, np.uint8)}, "mark a first token"),
        ({"payload": "everything"}, "unknown payload"),
        ({"payload": "top_k", "k": 0}, "choose between 1 and 11"),
        ({"payload": "top_k", "k": 2, "source": "student"}, "student_ids goes with"),
        ({"payload": "top_k", "k": 2, "source": "student", "student_ids": np.zeros((5, 2), np.int32)}, "shape"),
    ],
)
def test_requests_that_no_teacher_can_answer_are_refused(changes, reason):
    with pytest.raises(WireError, match=reason):
        ScoreRequest.decode(request(**changes).encode(), **LIMITS)


def test_servers_say_what_is_wrong_with_a_request():
    with StandIn() as server:
        client = connected(server)
        with pytest.raises(
            UserError, match="refused a request: a sequence of 70 tokens is longer than the teacher's 64"
        ):
            client.score(long_request())


def long_request() -> ScoreRequest:
    mask = np.ones(70, np.uint8)
    mask[0] = 0
    return ScoreRequest("sampled", np.zeros(70, np.int32), np.array([70], np.int32), mask, np.ones(1, np.float32))


# ---------------------------------------------------------------------- servers that die, restart or lie


def test_scores_and_rows_of_the_output_layer():
    with StandIn() as server:
        client = connected(server)
        assert np.array_equal(client.score(request())["log_probs"], server.table[[2, 3, 4, 6, 7, 8]])
        for start, stop in ((0, 11), (2, 7), (3, 6), (5, 5), (10, 11)):
            assert np.array_equal(client.output_rows(start, stop), server.layer[start:stop])


def test_a_server_that_restarts_with_its_weights_goes_on():
    with StandIn() as server:
        client, port = connected(server), server.server.port
        before = client.score(request())["log_probs"]
    with StandIn(instance="second", port=port) as server:
        assert np.array_equal(client.score(request())["log_probs"], before)
        # The probes came between the first reply of the new start and its acceptance.
        assert [len(asked.lengths) for asked in server.answered] == [2, 4]


def test_requests_wait_for_a_server_that_is_away():
    with StandIn() as server:
        client, port = connected(server), server.server.port
    result: dict = {}
    waiting = threading.Thread(target=lambda: result.update(client.score(request())))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    with StandIn(instance="second", port=port):
        waiting.join(10)
    assert result["log_probs"].shape == (6,)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"digest": "other files"}, "its digest is"),
        ({"seed": 1}, "its digest is"),  # another output layer in memory, though the files are the same
    ],
)
def test_a_server_that_restarts_with_other_weights_stops_the_run(other, reason):
    with StandIn() as server:
        client, port = connected(server), server.server.port
    with (
        StandIn(instance="second", port=port, **other),
        pytest.raises(UserError, match=f"does not hold the teacher with which this stage began \\({reason}.*resume"),
    ):
        client.score(request())


def test_a_server_that_restarts_with_a_model_of_another_width_stops_the_run():
    """Its replies have other sizes: that it is another teacher is what the line says."""
    with StandIn() as server:
        client, port = connected(server), server.server.port
    with StandIn(instance="second", port=port, digest="other files") as server:
        server.change = lambda tensors: {
            name: array[:, : HIDDEN // 2] if name == "hidden" else array for name, array in tensors.items()
        }
        with pytest.raises(UserError, match="does not hold the teacher with which this stage began"):
            client.score(request("hidden"))


def test_equal_digests_with_other_log_probabilities_stop_the_run():
    with StandIn() as server:
        client, port = connected(server), server.server.port
    with StandIn(instance="second", port=port) as server:
        server.table = server.table * 2
        with pytest.raises(UserError, match="check sequences differ by .* nats, limit 0.0001"):
            client.score(request())


def test_a_resumed_stage_compares_with_the_teacher_of_its_beginning():
    with StandIn() as server:
        first = connected(server).identity
        connected(server, weights_digest="files")
        client = TeacherClient(TeacherServiceConfig(url=server.url), "stages.opd.teacher_service")
        client.connect(Identity.from_json(dataclasses.asdict(first)))
        with pytest.raises(UserError, match="does not hold the teacher"):
            client.connect(Identity("of another teacher", first.probes))
        with pytest.raises(UserError, match="weights_digest asks for other"):
            connected(server, weights_digest="other")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda tensors: {"log_probs": tensors["log_probs"][:-1]},
            r"'log_probs' should be float32 \[6\], and is float32 \[5\]",
        ),
        (lambda tensors: {}, "and is nothing"),
        (lambda tensors: {"log_probs": tensors["log_probs"].astype(np.int32)}, "and is int32"),
        (lambda tensors: {"log_probs": tensors["log_probs"] * np.nan}, "NaN or above 0"),
        (lambda tensors: {"log_probs": -tensors["log_probs"]}, "NaN or above 0"),
    ],
)
def test_replies_that_cannot_be_true_are_asked_for_again_and_named(change, reason):
    with StandIn() as server:
        client = connected(server, max_attempts=3)
        server.change = change
        asked = len(server.answered)
        with pytest.raises(UserError, match=f"in 3 attempts .*{reason}.*can be resumed"):
            client.score(request())
        assert len(server.answered) == asked + 3
        server.change = lambda tensors: tensors
        assert client.score(request())["log_probs"].shape == (6,)


def test_hidden_states_that_are_not_finite_are_refused():
    with StandIn() as server:
        client = connected(server, max_attempts=1)
        assert client.score(request("hidden"))["hidden"].shape == (6, HIDDEN)
        server.layer = np.where(np.arange(HIDDEN) == 1, np.inf, server.layer).astype(np.float32)
        with pytest.raises(UserError, match="hidden states are not finite"):
            client.score(request("hidden"))


def test_rows_that_differ_from_their_digest_are_refused():
    with StandIn() as server:
        client = connected(server, max_attempts=2)
        server.server._output = server.layer + np.float32(1e-6)
        with pytest.raises(UserError, match="block 0 of its output layer is not what its digest says"):
            client.output_rows(0, 2)


def test_a_dead_server_is_one_line_and_another_one_takes_over():
    with StandIn() as first, StandIn(instance="other") as second:
        client = connected(first, second, max_attempts=4)
        second.__exit__()
        for _ in range(3):
            assert client.score(request())["log_probs"].shape == (6,)
    with pytest.raises(UserError, match="gave no good reply in 4 attempts .*the run can be resumed"):
        client.score(request())


def test_servers_of_one_teacher_must_hold_the_same_weights():
    with (
        StandIn() as first,
        StandIn(seed=1, instance="other") as second,
        pytest.raises(UserError, match="does not hold the teacher"),
    ):
        connected(first, second)


def test_requests_need_the_key_and_it_is_never_shown(tmp_path):
    file = tmp_path / "key"
    file.write_text("secret\n")
    with StandIn(key="secret") as server:
        assert connected(server, api_key_file=file).info.vocab_size == VOCAB
        with pytest.raises(UserError, match=r"without its API key: name its file in .*api_key_file") as error:
            connected(server)
        file.write_text("wrong")
        with pytest.raises(UserError, match="without its API key") as error:
            connected(server, api_key_file=file)
        assert "secret" not in str(error.value) and "wrong" not in str(error.value)


# ---------------------------------------------------------------------- requests in the background


def reply() -> dict[str, np.ndarray]:
    return {"log_probs": np.zeros(1, np.float32)}


def test_the_queue_holds_no_more_than_its_capacity_and_never_blocks_who_waits():
    started: list[int] = []
    queue = ScoreQueue(2, 20)

    def job(number: int):
        return queue.submit(lambda: started.append(number) or reply(), 10)

    jobs = [job(number) for number in range(4)]
    deadline = time.monotonic() + 5
    while len(started) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(started) == [0, 1] and queue.held_bytes == 20
    queue.wait(jobs[3])  # at once, before 2, although nothing was taken
    assert sorted(started) == [0, 1, 3]
    for number in (0, 1, 3):
        queue.drop(jobs[number])
    queue.wait(jobs[2])
    queue.drop(jobs[2])
    assert queue.held_bytes == 0
    queue.close()


def test_jobs_that_are_dropped_do_not_start_and_errors_reach_who_waits():
    release, queue = threading.Event(), ScoreQueue(1, 1)
    first = queue.submit(lambda: release.wait(5) and reply(), 10)
    never = queue.submit(lambda: pytest.fail("it was dropped"), 10)
    queue.drop(never)
    release.set()
    queue.wait(first)
    queue.drop(first)

    def fail():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        queue.wait(queue.submit(fail, 10))
    queue.close()


def test_without_threads_a_job_runs_when_it_is_submitted():
    done: list[int] = []
    queue = ScoreQueue(0, 1)
    job = queue.submit(lambda: done.append(1) or reply(), 10)
    assert done == [1] and queue.wait(job)["log_probs"].shape == (1,)
