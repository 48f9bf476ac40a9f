"""Settings of served rollouts: mistakes are found before anything is started."""

from __future__ import annotations

import importlib.util

import pytest
import yaml

from megatron_s2d.config.base import parse
from megatron_s2d.config.training import RolloutConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.preflight import check_workflow

WORKFLOW = """
name: served
tokenizer: task:modular_arithmetic
lengths: {max_prompt_length: 16}
models: {student: {preset: tiny-student}}
data:
  corpus: {type: task, split: corpus, num_operations: 2}
  pool: {type: task, split: pool, num_operations: 2, num_prompts: 16}
  problems: {type: task, split: eval, num_operations: 2, num_prompts: 8}
stages:
  base: {type: supervised, model: student, data: corpus, steps: 1}
  grpo: {type: grpo, init: base, prompts: pool, steps: 1, train_batch_size: 2, sampling: {max_response_length: 8}}
  opd:
    {type: opd, init: base, teacher: grpo, prompts: pool, steps: 1, kl_estimator: sampled, train_batch_size: 2,
     sampling: {max_response_length: 8}}
arms: {opd: opd}
evaluation: {prompts: problems, sampling: {max_response_length: 8}}
"""


TRUNCATE = {"mode": "truncate"}


def workflow(rollout: dict, opd: dict | None = None, grpo: dict | None = None, **others) -> WorkflowConfig:
    document = yaml.safe_load(WORKFLOW) | {"rollout": rollout} | others
    document["stages"] = {name: {"role": name, **stage} for name, stage in document["stages"].items()}
    document["stages"]["opd"] |= opd or {}
    document["stages"]["grpo"] |= grpo or {}
    return parse(WorkflowConfig, document, "test.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": {"student": ["127.0.0.1:30000"]}}, "is not an address; write it like http://"),
        ({"urls": {"student": []}}, "give at least one address"),
        ({"urls": {"student": ["http://a:1", "http://a:1"]}}, "each once"),
        ({"urls": {"student": ["http://a:1"]}, "deterministic": True}, "deterministic is a setting of started servers"),
        ({"sync": "carrier pigeon"}, "'disk', 'distributed' or 'tensor'"),
        ({"attempts": 0}, "greater than or equal to 1"),
        ({"over_sampling_ratio": 0.5}, "greater than or equal to 1"),
        ({"release_memory": True, "ahead": "wait"}, "have no memory while the trainer works: set ahead: off"),
        ({"replica": 2}, "did you mean 'replicas'"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(UserError, match=message) as error:
        parse(RolloutConfig, {"engine": "sglang", "sglang": settings}, "test.yaml")
    assert "\n" not in str(error.value)


def test_servers_are_checked_before_the_run(tmp_path, monkeypatch):
    urls = {"urls": {"student": ["http://127.0.0.1:1"]}}
    cases = [
        ({"engine": "sglang", "sglang": {"urls": {"pupil": ["http://a:1"]}}}, {}, "'pupil' is not among `models`"),
        ({"engine": "sglang", "sglang": urls}, {"num_workers": 2}, "set num_workers to 1"),
        ({"engine": "sglang", "sglang": {"python": str(tmp_path / "python")}}, {}, "python: no such program"),
    ]
    for rollout, others, message in cases:
        with pytest.raises(UserError, match=message):
            check_workflow(workflow(rollout, **others), tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sglang" else real(name, *rest)
    )
    for config in (workflow({"engine": "sglang"}), workflow({}, {"teacher_engine": "sglang"})):
        with pytest.raises(UserError, match="sglang is not installed"):
            check_workflow(config, tmp_path)
    found = check_workflow(workflow({"engine": "sglang", "sglang": urls}), tmp_path).memory(on_gpu=False)["grpo"]
    assert "decode" not in found.phases and "train" in found.phases


def test_a_served_teacher_has_conditions():
    for change, message in [
        ({"kl_estimator": "full"}, "needs kl_estimator: sampled, or topk with support: teacher"),
        ({"kl_estimator": "topk"}, "needs kl_estimator: sampled, or topk with support: teacher"),
        ({"kl_estimator": "topk", "support": "union"}, "needs kl_estimator: sampled, or topk with support: teacher"),
        (
            {"kl_estimator": "topk", "support": "teacher", "sampling": {"temperature": 0.0, "max_response_length": 8}},
            "sampling.temperature 1",
        ),
        ({"sampling": {"temperature": 0.7, "max_response_length": 8}}, "sampling.temperature 1"),
    ]:
        with pytest.raises(UserError, match=message):
            workflow({}, {"teacher_engine": "sglang"} | change)
    for change in ({}, {"kl_estimator": "topk", "support": "teacher", "divergence": "forward_kl"}):
        assert workflow({}, {"teacher_engine": "sglang"} | change).stages["opd"].teacher_engine == "sglang"


@pytest.mark.parametrize("sglang", [{"ahead": "continue"}, {"over_sampling_ratio": 1.5}])
def test_responses_of_older_weights_must_be_corrected_for(sglang):
    rollout = {"engine": "sglang", "sglang": sglang}
    with pytest.raises(
        UserError, match="stages.grpo: with rollout.sglang.ahead or over_sampling_ratio responses come from older"
    ):
        workflow(rollout)
    full = {"kl_estimator": "full"}  # needs no correction: a distribution is compared, whoever wrote the tokens
    workflow(rollout, full, grpo={"importance": TRUNCATE})
    workflow({"engine": "megatron", "sglang": sglang})


def test_oversampling_has_conditions():
    rollout = {"engine": "sglang", "sglang": {"over_sampling_ratio": 1.5}}
    truncate = {"importance": TRUNCATE}
    with pytest.raises(UserError, match="dynamic_sampling_rounds goes with rollout.sglang.over_sampling_ratio: 1 only"):
        workflow(rollout, truncate, grpo=truncate | {"dynamic_sampling_rounds": 2})


def test_another_engine_runs_again_what_was_sampled_and_nothing_else(tmp_path):
    keys = [
        {job.id: job.key for job in make_plan(config, tmp_path)}
        for config in (
            workflow({}),
            workflow({"engine": "sglang"}),
            workflow({"engine": "sglang", "max_kl": 1.0, "sglang": {"replicas": 2}}),
            workflow({}, {"teacher_engine": "sglang"}),
        )
    ]
    ahead = {"engine": "sglang", "sglang": {"ahead": "wait"}}
    older = workflow(ahead, {"importance": TRUNCATE}, grpo={"importance": TRUNCATE})
    plain, served, same, teacher = keys
    assert served["stages/base"] == {job.id: job.key for job in make_plan(older, tmp_path)}["stages/base"]
    assert served["stages/grpo"] != {job.id: job.key for job in make_plan(older, tmp_path)}["stages/grpo"]
    assert {name for name in plain if plain[name] != served[name]} == {"stages/grpo", "stages/opd", "evaluations/opd"}
    assert same == served and teacher == plain
