"""Validation inside a stage, on toy models: what it measures, that training does not notice it, what it decides."""

import itertools
import json

import numpy as np
import pytest
import torch
from toy_models import ToyEngine

from megatron_s2d.config.base import parse
from megatron_s2d.config.validation import ValidationConfig
from megatron_s2d.errors import UserError
from megatron_s2d.rollout.sampler import RolloutWorker
from megatron_s2d.stages.validation import end_reason
from megatron_s2d.train.loop import Stopped

SAMPLING = {"max_response_length": 8, "temperature": 0.7}
OFFLINE = {"init": "student", "global_batch_size": 4}
OPD = {"type": "opd", "init": "student", "teacher": "teacher", "prompts": "pool", "train_batch_size": 4}
STAGES = {
    "sft": {"type": "sft", "cache": "cache", **OFFLINE},
    "forward_kl": {"type": "forward_kl", "cache": "cache", **OFFLINE},
    "opd": {**OPD, "kl_estimator": "full_vocab", "sampling": SAMPLING},
    "sg_opd": {
        **OPD, "kl_estimator": "sampled_token", "reference": "reference", "sampling": SAMPLING,
        "sign_gate": {"lambda_high": 1.8, "conflict_fallback": "interp", "conflict_beta": 0.5},
        "teacher_sampling": {
            "fraction": 0.5, "num_generations": 2, "alpha_high": 1.0, "alpha_end": 0.1, "phase_1_end": 0.25,
            "phase_2_end": 0.75,
        },
    },
    "grpo": {
        "type": "grpo", "init": "student", "prompts": "pool", "train_batch_size": 4, "num_generations": 3,
        "sampling": SAMPLING, "kl_loss_coef": 0.1,
    },
}  # fmt: skip
VALIDATION = {
    "interval_steps": 2, "data": {"held_out": "other", "seen": "pool"}, "samples_per_prompt": 2, "batch_size": 3,
    "before_training": True, "sampling": SAMPLING,
}  # fmt: skip


def settings(kind, validation=VALIDATION, steps=5, **more):
    return STAGES[kind] | {"steps": steps, "optimizer": {"lr": 0.02}, "validation": validation} | more


def write_cache(workflow):
    workflow.run(
        "cache", type="teacher_cache", teacher="teacher", prompts="pool", num_generations=1, sampling=SAMPLING,
        representation="full_vocab",
    )  # fmt: skip


def trained_rows(context) -> list[dict]:
    """The metrics without what the clock says."""
    timed = ("timing_s/", "tokens_per_second", "response_tokens_per_second", "time")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in context.directory.metrics()]


def weights(context) -> list[torch.Tensor]:
    return context.models.trained.saved


@pytest.fixture
def improving(monkeypatch):
    """Answers that are right more and more often, and less often after the sixth update."""
    chances = [0.1, 0.2, 0.3, 0.5, 0.6, 0.8, 1.0, 0.5, 0.4, 0.3, 0.2]
    monkeypatch.setattr(ToyEngine, "chance", staticmethod(lambda version: chances[version]))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "sg_opd" else ()) for kind in STAGES]
)
def test_training_does_not_notice_it(workflow, kind):
    write_cache(workflow)
    plain = workflow.run("plain", **settings(kind, None))
    validated = workflow.run("validated", **settings(kind))
    assert trained_rows(validated) == trained_rows(plain) and len(trained_rows(plain)) == 5
    assert all(map(torch.equal, weights(validated), weights(plain)))
    rows = validated.directory.validations()
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert not plain.directory.validation_path.exists()


def test_rows_are_means_over_problems_of_the_responses_on_disk(workflow, improving):
    context = workflow.run("rl", **settings("grpo"))
    for row, (name, count) in itertools.product(context.directory.validations(), (("held_out", 4), ("seen", 12))):
        path = context.directory.validation_folder(row["step"]) / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        correct = np.array([line["verifier_label"] == "correct" for line in lines], dtype=float).reshape(count, 2)
        found = row["data"][name]
        assert found["pass_rate"] == pytest.approx(correct.mean())
        assert found["pass_rate_std_err"] == pytest.approx(correct.mean(axis=1).std(ddof=1) / count**0.5)
        assert (found["num_prompts"], found["samples_per_prompt"]) == (count, 2)
        assert {line["step"] for line in lines} == {row["step"]} and all(line["response"] for line in lines)
    rates = [row["data"]["seen"]["pass_rate"] for row in context.directory.validations()]
    assert rates[0] < 0.3 < rates[2]


def test_the_best_weights_are_what_the_stage_leaves(workflow, improving):
    best = VALIDATION | {"best": {"metric": "seen/pass_rate"}}
    kept = {"checkpoint": {"keep_last_n": 1, "interval_steps": 100}}
    until_six = workflow.run("six", **settings("grpo", None, steps=6))
    context = workflow.run("rl", **settings("grpo", best, steps=10, **kept))
    rates = {row["step"]: row["data"]["seen"]["pass_rate"] for row in context.directory.validations()}
    assert max(rates, key=rates.get) == 6 and len(context.directory.metrics()) == 10
    assert [row["step"] for row in context.directory.validations() if row["best"]] == [2, 4, 6]
    names = {path.name for path in context.directory.checkpoints()}
    assert names == {"step_00000006", "step_00000008"}  # the best one and the newest
    decision = context.directory.lineage()["validation"]
    assert decision["best"] == {"step": 6, "metric": "seen/pass_rate", "value": rates[6]}
    # Six of ten steps: the learning rate is constant, so they are the six steps of the other stage.
    assert all(map(torch.equal, weights(context), weights(until_six)))


def test_the_pass_rate_ends_the_stage_and_the_next_one_starts_there(workflow, improving):
    until = [{"rule": "pass_rate", "data": "seen", "threshold": 0.4}]
    four = workflow.run("four", **settings("opd", None, steps=4))
    context = workflow.run("opd", **settings("opd", VALIDATION | {"until": until}, steps=10))
    rows = context.directory.validations()
    assert [row["step"] for row in rows] == [0, 2, 4] and len(context.directory.metrics()) == 4
    rate = rows[-1]["data"]["seen"]["pass_rate"]
    reason = f"pass_rate: seen has {rate:.4g}, at least 0.4"
    assert rows[-1]["ended"] == reason and rows[-2]["ended"] is None
    assert context.directory.lineage()["validation"]["ended"] == {"step": 4, "rule": reason}
    assert all(map(torch.equal, weights(context), weights(four)))
    again = workflow.run("opd", **settings("opd", VALIDATION | {"until": until}, steps=10))  # killed before its end
    assert len(again.directory.metrics()) == 4 and not again.models.trained.updates


def test_the_kl_rule_reads_the_steps_since_the_last_validation(workflow):
    plain = workflow.run("plain", **settings("opd", None))
    means = [np.mean([row["kl"] for row in plain.directory.metrics()[start : start + 2]]) for start in (0, 2)]
    assert means[1] < means[0], "the student approaches its teacher"
    until = [{"rule": "kl", "threshold": float(np.mean(means))}]
    context = workflow.run("opd", **settings("opd", VALIDATION | {"until": until}))
    rows = context.directory.validations()
    assert [row["kl"] for row in rows] == [None, *(pytest.approx(mean) for mean in means)]
    assert rows[-1]["step"] == 4 and rows[-1]["ended"].startswith("kl: ")


def rows_of(rates, kls=None):
    kls = kls or [None] * len(rates)
    return [
        {"step": 10 * index, "data": {"a": {"pass_rate": rate}}, "kl": kl}
        for index, (rate, kl) in enumerate(zip(rates, kls, strict=True))
    ]


@pytest.mark.parametrize(
    ("rates", "rule", "ends_at"),
    [
        ([0.1, 0.2, 0.2, 0.2, 0.3], {"patience": 3}, None),
        ([0.1, 0.2, 0.2, 0.2, 0.2], {"patience": 3}, 40),
        ([0.1, 0.2, 0.21, 0.22, 0.23], {"patience": 3, "min_delta": 0.05}, 40),
        ([0.5, 0.4, 0.3, 0.2, 0.2], {"patience": 1, "mode": "min"}, 40),
        ([0.5, 0.4, 0.4, 0.3], {"patience": 1, "after_step": 31}, None),
        ([0.5, 0.4, 0.4, 0.3, 0.3], {"patience": 1, "after_step": 40}, 40),
    ],
)
def test_plateau(rates, rule, ends_at):
    rule = {"rule": "plateau", "metric": "a/pass_rate", **rule}
    config = parse(ValidationConfig, {"interval_steps": 10, "data": {"a": "pool"}, "until": [rule]}, "x")
    rows = rows_of(rates)
    reasons = {row["step"]: end_reason(config, rows[: index + 1]) for index, row in enumerate(rows)}
    assert next((step for step, reason in reasons.items() if reason), None) == ends_at


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("die_at", "resumes_at"), [(9, 2), (14, 4), (26, 4)])
def test_killed_inside_a_validation(workflow, improving, monkeypatch, die_at, resumes_at):
    """Validations have 2 + 4 batches and steps 1 call each; the last one (from call 23 on) has no checkpoint."""
    validation = VALIDATION | {"best": {"metric": "held_out/pass_rate"}}
    expected = workflow.run("expected", **settings("grpo", validation))
    sample, calls = RolloutWorker.generate, []

    def dies(self, requests, progress=None):
        calls.append([request.prompt.id for request in requests])
        if len(calls) == die_at:
            raise Killed
        return sample(self, requests, progress)

    monkeypatch.setattr(RolloutWorker, "generate", dies)
    with pytest.raises(Killed):
        workflow.run("killed", **settings("grpo", validation))
    done = len(calls) - 1
    resumed = workflow.run("killed", **settings("grpo", validation))
    assert int(resumed.directory.lineage()["validation"]["best"]["step"]) == 4
    repeated = len(calls) - done - 1
    total = 4 * 6 + 5
    again = {9: 0, 14: 0, 26: 1 + 2}[die_at]  # step 5, and the first batches of its validation
    assert done + repeated == total + again
    assert trained_rows(resumed) == trained_rows(expected)
    clock = ("seconds", "at")
    pairs = zip(resumed.directory.validations(), expected.directory.validations(), strict=True)
    for mine, theirs in pairs:
        assert {k: v for k, v in mine.items() if k not in clock} == {k: v for k, v in theirs.items() if k not in clock}
    for step in (0, 2, 4, 5):
        for name in ("held_out", "seen"):
            files = [c.directory.validation_folder(step) / f"{name}.jsonl" for c in (resumed, expected)]
            assert files[0].read_bytes() == files[1].read_bytes()
    assert all(map(torch.equal, weights(resumed), weights(expected)))


def test_a_stop_between_two_batches_keeps_them(workflow, improving):
    expected = workflow.run("expected", **settings("grpo"))
    calls = iter(range(100))
    stopped = workflow.context("rl", lambda: next(calls) == 9, **settings("grpo"))
    stopped.directory.begin({}, {}, {})
    from megatron_s2d.stages.grpo import run_grpo

    with pytest.raises(Stopped, match="stopped in the validation after step 2 of 5"):
        run_grpo(stopped)
    resumed = workflow.run("rl", **settings("grpo"))
    assert trained_rows(resumed) == trained_rows(expected)
    data = [[row["data"] for row in context.directory.validations()] for context in (resumed, expected)]
    assert data[0] == data[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best": {"metric": "held_out"}}, "best.metric: 'held_out' is not NAME/METRIC, such as held_out/pass_rate"),
        ({"best": {"metric": "other/reward"}}, "best.metric: 'other/reward' is not NAME/METRIC"),
        ({"until": [{"rule": "pass_rate", "data": "no", "threshold": 0.5}]}, "until.0.data: 'no' is not among"),
        ({"until": [{"rule": "plateu", "metric": "seen/reward"}]}, "'plateau'"),
        ({"data": {"a": "nothing"}}, "validation.data.a: 'nothing' is not among `data`"),
    ],
)
def test_wrong_settings_are_named(workflow, change, message):
    with pytest.raises(UserError) as raised:
        workflow.context("rl", **settings("grpo", VALIDATION | change))
    assert message in str(raised.value)
