"""What the trainer asks a served teacher for, when, and where the answers land; the service is a table of numbers."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from megatron_s2d.config.teacher_service import TeacherServiceConfig
from megatron_s2d.data.aligned_spans import align
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.host_group import HostGroup
from megatron_s2d.parallel.layout import initialize_distributed
from megatron_s2d.records import Prompt, RemoteSample, Sample
from megatron_s2d.teachers.service.teachers import ServiceTeachers, Wanted
from megatron_s2d.teachers.views import PromptViews

VOCAB = 11
LAYOUT = types.SimpleNamespace(
    is_dp_leader=True, is_pipeline_last_stage=True, host_replica=HostGroup(), host_dp=HostGroup(), leader_in_replica=0
)
STUDENT = types.SimpleNamespace(layout=LAYOUT)


def sample(name: str, group: str, response: int, prompt: int = 2, domain: str = "math") -> Sample:
    rng = np.random.default_rng(sum(map(ord, name)))
    mask = np.arange(prompt + response) >= prompt
    return Sample(name, group, group, domain, 0, rng.integers(0, VOCAB, prompt + response), mask, 1.0, "stop")


class Client:
    """Scores each response token by a table of (token before it, token)."""

    info = types.SimpleNamespace(vocab_size=VOCAB, hidden_size=4, dtype="float32")

    def __init__(self, *, overlap: bool = True):
        self.settings = TeacherServiceConfig(url="http://127.0.0.1:1", overlap=overlap)
        self.table = -np.random.default_rng(0).exponential(size=(64, 64)).astype(np.float32)
        self.requests: list = []
        self.failure: UserError | None = None

    def score(self, request) -> dict[str, np.ndarray]:
        self.requests.append(request)
        if self.failure is not None:
            raise self.failure
        rows = np.flatnonzero(request.response_mask)
        return {"log_probs": self.table[request.token_ids[rows - 1], request.token_ids[rows]]}

    def close(self) -> None:
        pass

    def expected(self, of: Sample, before: int | None = None) -> np.ndarray:
        values = np.zeros(of.length, dtype=np.float32)
        rows = np.flatnonzero(of.response_mask)
        previous = of.token_ids[rows - 1].copy()
        if before is not None:
            previous[0] = before
        values[rows] = self.table[previous, of.token_ids[rows]]
        return values


@pytest.fixture(autouse=True)
def process_group():
    initialize_distributed()


@pytest.fixture
def samples() -> list[Sample]:
    return [sample("a", "g", 3), sample("b", "g", 5), sample("c", "h", 2), sample("d", "h", 4, prompt=3)]


@pytest.mark.parametrize("overlap", [True, False])
def test_each_group_is_one_request_whenever_it_is_asked_for(samples, overlap):
    client = Client(overlap=overlap)
    teachers = ServiceTeachers({None: client}, STUDENT, Wanted("sampled"))
    teachers.prefetch(samples[:2])
    teachers.begin_step(samples)
    remote = RemoteSample.of(sample("e", "h", 3), 1)
    scores = teachers.score([*samples, remote], holders=LAYOUT)
    for score, of in zip(scores, samples, strict=False):
        assert np.array_equal(score, client.expected(of))
    assert scores[-1] is None
    assert sorted(asked.lengths.tolist() for asked in client.requests) == [[4, 7], [5, 7]]
    assert teachers._queue.held_bytes == 0 and not teachers._asked
    teachers.close()


def test_groups_that_start_again_are_asked_for_again_and_the_others_forgotten(samples):
    client = Client()
    teachers = ServiceTeachers({None: client}, STUDENT, Wanted("sampled"))
    teachers.begin_step(samples[:2])
    again = dataclasses.replace(samples[2], token_ids=samples[2].token_ids[::-1].copy())
    teachers.begin_step([again, samples[3]])  # the first two were moved to another rank
    (score, _) = teachers.score([again, samples[3]], holders=LAYOUT)
    assert np.array_equal(score, client.expected(again))
    assert not teachers._asked and teachers._queue.held_bytes == 0
    teachers.close()


def test_a_failure_of_the_service_reaches_the_trainer(samples):
    client = Client()
    client.failure = UserError("the teacher is away; the run can be resumed")
    teachers = ServiceTeachers({None: client}, STUDENT, Wanted("sampled"))
    teachers.begin_step(samples)
    with pytest.raises(UserError, match="can be resumed"):
        teachers.score(samples, holders=LAYOUT)
    teachers.close()


def test_prompts_are_those_of_the_view(samples):
    client = Client()
    prompts = [
        Prompt(group, np.array([1, 2, 3, 4, number]), "", "math", None, None) for number, group in enumerate("gh")
    ]
    views = PromptViews({None: PromptTable.of(prompts)})
    teachers = ServiceTeachers({None: client}, STUDENT, Wanted("sampled"), views)
    scores = teachers.score(samples, holders=LAYOUT)
    for score, of in zip(scores, samples, strict=True):
        assert np.array_equal(score, client.expected(of, before="gh".index(of.group_id)))
    assert sorted(asked.lengths.tolist() for asked in client.requests) == [[7, 9], [8, 10]]
    teachers.close()


def test_a_teacher_of_another_tokenizer_reads_its_own_tokens(tmp_path):
    """The teacher's tokens are words of the task in another order; every span is one token, so values are exact."""
    own = load_tokenizer("task:modular_arithmetic", tmp_path)
    other = load_tokenizer("task:modular_arithmetic/19", tmp_path)  # more numbers, so that ids behind them differ
    ids = own("3 + 4 = 7", add_special_tokens=False)["input_ids"]
    of = dataclasses.replace(
        sample("a", "g", len(ids) + 1),
        token_ids=np.array([0, 2, *ids, own.eos_token_id]),
        old_log_probs=np.zeros(len(ids) + 3, np.float32),
    )
    client = Client()

    def aligner(one: Sample):
        end = (own.eos_token_id, other.eos_token_id)
        return align(one.token_ids[one.prompt_length :], own, other, end=end)

    teachers = ServiceTeachers({None: client}, STUDENT, Wanted("sampled"), None, {None: aligner})
    teachers.begin_step([of])
    (score,) = teachers.score([of], holders=LAYOUT)
    (asked,) = client.requests
    expected = [*other("3 + 4 = 7", add_special_tokens=False)["input_ids"], other.eos_token_id]
    assert asked.token_ids.tolist() == [0, 2, *expected] and expected[:-1] != ids
    rows = np.arange(2, len(asked.token_ids))
    assert score[2:] == pytest.approx(client.table[asked.token_ids[rows - 1], asked.token_ids[rows]], abs=1e-6)
    teachers.close()
