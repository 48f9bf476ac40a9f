"""Invalid settings of served rollouts are reported before anything is started."""

from __future__ import annotations

import pytest
import yaml

from megatron_s2d.config.base import parse
from megatron_s2d.config.routing_replay import replays_routes
from megatron_s2d.config.training import RolloutConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.stages.policy_loss import surrogate_of
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
  base: {type: sft, model: student, data: corpus, steps: 1}
  grpo: {type: grpo, init: base, prompts: pool, steps: 1, train_batch_size: 2, sampling: {max_response_length: 8}}
  opd:
    {type: opd, init: base, teacher: grpo, prompts: pool, steps: 1, kl_estimator: sampled_token, train_batch_size: 2,
     sampling: {max_response_length: 8}}
arms: {opd: opd}
evaluation: {prompts: problems, sampling: {max_response_length: 8}}
"""


TRUNCATE = {"mode": "tis"}


def workflow(rollout: dict, opd: dict | None = None, grpo: dict | None = None, **others) -> WorkflowConfig:
    document = yaml.safe_load(WORKFLOW) | {"rollout": rollout} | others
    document["stages"] = {name: {"role": name, **stage} for name, stage in document["stages"].items()}
    document["stages"]["opd"] |= opd or {}
    document["stages"]["grpo"] |= grpo or {}
    return parse(WorkflowConfig, document, "test.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sglang": {"urls": {"student": ["127.0.0.1:30000"]}}}, "is not an address such as http://"),
        ({"sglang": {"urls": {"student": []}}}, "give at least one address"),
        ({"sglang": {"urls": {"student": ["http://a:1", "http://a:1"]}}}, "each once"),
        (
            {"sglang": {"urls": {"student": ["http://a:1"]}, "enable_deterministic_inference": True}},
            "enable_deterministic_inference applies to started servers only",
        ),
        ({"sglang": {"weight_sync": "carrier pigeon"}}, "'disk', 'distributed' or 'tensor'"),
        ({"server": {"max_attempts": 0}}, "greater than or equal to 1"),
        ({"over_sampling_ratio": 0.5}, "greater than or equal to 1"),
        (
            {"async_mode": "one_step_off", "sglang": {"enable_memory_saver": True}},
            "have no memory during training: set async_mode: sync",
        ),
        ({"async_mode": "one_step_off", "max_staleness": 0}, "set max_staleness to 1 or more"),
        ({"max_staleness": 2}, "max_staleness above 0 needs an async_mode"),
        (
            {"async_mode": "partial_rollout", "max_staleness": 1, "over_sampling_ratio": 1.5},
            "needs max_staleness 2 or more",
        ),
        ({"sglang": {"num_server": 2}}, "did you mean 'num_servers'"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message) as error:
        parse(RolloutConfig, {"engine": "sglang", **settings}, "test.yaml")
    assert "\n" not in str(error.value)


def test_servers_are_checked_before_the_run(tmp_path, monkeypatch):
    urls = {"urls": {"student": ["http://127.0.0.1:1"]}}
    cases = [
        ({"engine": "sglang", "sglang": {"urls": {"pupil": ["http://a:1"]}}}, {}, "'pupil' is not among `models`"),
        ({"engine": "sglang", "sglang": urls}, {"max_parallel_stages": 2}, "set max_parallel_stages to 1"),
    ]
    for rollout, others, message in cases:
        with pytest.raises(UserError, match=message):
            check_workflow(workflow(rollout, **others), tmp_path)
    estimate = check_workflow(workflow({"engine": "sglang", "sglang": urls}), tmp_path).memory(on_gpu=False)["grpo"]
    assert "decode" not in estimate.phases and "train" in estimate.phases


def test_routing_replay_is_of_trained_mixtures_of_experts(tmp_path):
    """On by default for them, refused where it would do nothing, and part of the plan's keys where it applies."""
    experts = {"models": {"student": {"preset": "tiny-moe"}}}
    for rollout, replays in (({}, True), ({"routing_replay": True}, True), ({"routing_replay": False}, False)):
        config = workflow(rollout, **experts)
        spec = check_workflow(config, tmp_path).specs["student"]
        assert [replays_routes(config, config.stages[name], spec) for name in ("base", "grpo")] == [False, replays]
    with pytest.raises(UserError, match="routing_replay is true, but no grpo or opd stage trains a mixture-of-experts"):
        check_workflow(workflow({"routing_replay": True}), tmp_path)
    keys = [
        next(job.key for job in make_plan(workflow(rollout, **experts), tmp_path) if job.id == "stages/grpo")
        for rollout in ({}, {"routing_replay": True}, {"routing_replay": False})
    ]
    assert keys[0] == keys[1] != keys[2]
    jobs = {job.id: job for job in make_plan(workflow({}, **experts), tmp_path)}
    assert (
        jobs["stages/grpo"].resolved["routing_replay"] is True and "routing_replay" not in jobs["stages/base"].resolved
    )
    assert not any("routing_replay" in job.resolved for job in make_plan(workflow({}), tmp_path))  # dense
    buffers = [
        check_workflow(workflow(rollout, **experts), tmp_path).memory(on_gpu=False)["grpo"].phases["decode"]
        for rollout in ({}, {"routing_replay": False})
    ]
    # 2 layers x 2 experts a token: of the responses, and of the prompts of a batch.
    assert buffers[0]["rollout buffers"] > buffers[1]["rollout buffers"]


def test_served_teacher_settings():
    for change, message in [
        ({"kl_estimator": "full_vocab"}, "needs kl_estimator: sampled_token, or top_k with top_k_source: teacher"),
        ({"kl_estimator": "top_k"}, "needs kl_estimator: sampled_token, or top_k with top_k_source: teacher"),
        (
            {"kl_estimator": "top_k", "top_k_source": "union"},
            "needs kl_estimator: sampled_token, or top_k with top_k_source: teacher",
        ),
        (
            {
                "kl_estimator": "top_k",
                "top_k_source": "teacher",
                "sampling": {"temperature": 0.0, "max_response_length": 8},
            },
            "sampling.temperature: 1",
        ),
        ({"sampling": {"temperature": 0.7, "max_response_length": 8}}, "sampling.temperature: 1"),
    ]:
        with pytest.raises(UserError, match=message):
            workflow({}, {"teacher_engine": "sglang"} | change)
    for change in ({}, {"kl_estimator": "top_k", "top_k_source": "teacher", "divergence": "forward_kl"}):
        assert workflow({}, {"teacher_engine": "sglang"} | change).stages["opd"].teacher_engine == "sglang"


@pytest.mark.parametrize("settings", [{"async_mode": "partial_rollout"}, {"over_sampling_ratio": 1.5}])
def test_stale_responses_need_a_correction(settings):
    rollout = {"engine": "sglang", **settings}
    with pytest.raises(
        UserError, match="stages.grpo: with rollout.async_mode or over_sampling_ratio responses come from older"
    ):
        workflow(rollout, grpo={"rollout_correction": {"mode": "off"}})
    full = {"kl_estimator": "full_vocab"}  # needs no correction: it compares distributions
    workflow(rollout, full, grpo={"rollout_correction": TRUNCATE})
    workflow(rollout)
    with pytest.raises(UserError, match="need servers beside the trainer: set rollout.engine: sglang"):
        workflow({"engine": "megatron", **settings}, full)


def test_importance_weights_of_served_samples_are_truncated_by_default():
    """Servers compute with other kernels; the engine in the trainer and divergences need no correction."""

    def modes(rollout, **settings):
        config = workflow(rollout, settings.pop("opd", {}), **settings)
        corrections = {name: getattr(stage, "rollout_correction", None) for name, stage in config.stages.items()}
        return {name: (each.mode, each.cap) for name, each in corrections.items() if each is not None}

    served = {"engine": "sglang"}
    assert modes({"engine": "megatron"}) == {"grpo": ("off", 2.0), "opd": ("off", 2.0)}
    assert modes(served) == {"grpo": ("tis", 2.0), "opd": ("tis", 2.0)}
    assert modes(served, opd={"kl_estimator": "full_vocab"})["opd"] == ("off", 2.0)
    assert modes(served, grpo={"rollout_correction": {"mode": "off"}})["grpo"] == ("off", 2.0)
    assert modes({"engine": "megatron"}, grpo={"rollout_correction": {"mode": "mask", "cap": 3.0}})["grpo"] == (
        "mask",
        3.0,
    )
    config = workflow(served)
    assert surrogate_of(config.stages["grpo"]).rollout_correction == "tis"


def test_staleness_in_the_trainer_needs_a_correction_and_changes_the_key(tmp_path):
    def keys(rollout, **settings):
        return {job.id: job.key for job in make_plan(workflow(rollout, {}, **settings), tmp_path)}

    old = workflow({"max_staleness": 4})
    assert {old.stages[name].rollout_correction.mode for name in ("grpo", "opd")} == {"tis"}
    assert keys({"max_staleness": 0}) == keys({})
    assert len({keys({"max_staleness": number})["stages/grpo"] for number in (0, 1, 4)}) == 3
    served = {"engine": "sglang", "async_mode": "one_step_off"}
    assert keys(served) == keys(served | {"max_staleness": 1}) != keys(served | {"max_staleness": 2})
    with pytest.raises(UserError, match="as with max_staleness: set rollout_correction"):
        workflow({"max_staleness": 1}, grpo={"rollout_correction": {"mode": "off"}})


def test_policies_of_the_buffer_go_together_and_have_a_bound_on_the_age_of_responses():
    filtered = {"filter_groups": {"max_num_gen_batches": 3, "max_pass_rate": 0.9}}
    over_sampled = {"engine": "sglang", "over_sampling_ratio": 1.5}
    bounds = {
        0: {"engine": "sglang"} | {"over_sampling_ratio": 1.5, "max_staleness": 0},
        1: over_sampled,
        2: over_sampled | {"async_mode": "partial_rollout"},
        5: over_sampled | {"async_mode": "one_step_off", "max_staleness": 5},
    }
    for bound, rollout in bounds.items():
        assert workflow(rollout, grpo=filtered).rollout.staleness == bound
    with pytest.raises(UserError, match="min_pass_rate is above max_pass_rate"):
        workflow({}, grpo={"filter_groups": {"max_num_gen_batches": 3, "min_pass_rate": 0.5, "max_pass_rate": 0.4}})


def test_another_engine_reruns_only_sampling_stages(tmp_path):
    keys = [
        {job.id: job.key for job in make_plan(config, tmp_path)}
        for config in (
            workflow({}),
            workflow({"engine": "sglang"}),
            workflow({"engine": "sglang", "max_mismatch_kl": 1.0, "sglang": {"num_servers": 2}}),
            workflow({}, {"teacher_engine": "sglang"}),
        )
    ]
    ahead = {"engine": "sglang", "async_mode": "one_step_off"}
    older = workflow(ahead, {"rollout_correction": TRUNCATE}, grpo={"rollout_correction": TRUNCATE})
    plain, served, same, teacher = keys
    assert served["stages/base"] == {job.id: job.key for job in make_plan(older, tmp_path)}["stages/base"]
    assert served["stages/grpo"] != {job.id: job.key for job in make_plan(older, tmp_path)}["stages/grpo"]
    assert {name for name in plain if plain[name] != served[name]} == {"stages/grpo", "stages/opd", "evaluations/opd"}
    assert same == served and teacher == plain


def test_collectives_outlast_the_watchdog():
    with pytest.raises(UserError, match="distributed_timeout_minutes 30 must be more than watchdog_timeout_seconds"):
        workflow({}, watchdog_timeout_seconds=1800.0, distributed_timeout_minutes=30)
    assert workflow({}, watchdog_timeout_seconds=None, distributed_timeout_minutes=1).distributed_timeout_minutes == 1
