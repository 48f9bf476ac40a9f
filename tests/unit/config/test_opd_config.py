"""The configuration validates settings of the policy loss, of SG-OPD's sign gate and of its teacher anchor."""

from __future__ import annotations

import math

import pydantic
import pytest

from megatron_s2d.config.grpo import GrpoConfig, RolloutCorrectionConfig
from megatron_s2d.config.opd import FixedAdvantageConfig, OpdConfig, SignGateConfig, TeacherSamplingConfig
from megatron_s2d.config.teacher_service import services_by_domain, services_of

PHASES = {"fraction": 0.5, "phase_1_end": 0.3, "phase_2_end": 0.7}


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (SignGateConfig, {"conflict_fallback": "drop"}, "'interp', 'preserve', 'grpo' or 'mask'"),
        (SignGateConfig, {"conflict_fallback": "interp"}, "conflict_beta goes with conflict_fallback: interp"),
        (SignGateConfig, {"conflict_fallback": "mask", "conflict_beta": 0.5}, "conflict_beta goes with"),
        (SignGateConfig, {"conflict_beta": 1.5}, "less than or equal to 1"),
        (SignGateConfig, {"conflict_beta": 0.5, "lambda_high": math.inf}, "finite number"),
        (SignGateConfig, {"conflict_beta": 0.5, "stability_clip": 0.0}, "greater than 0"),
        (TeacherSamplingConfig, PHASES | {"phase_1_end": 0.8}, "phase_1_end <= phase_2_end"),
        (TeacherSamplingConfig, PHASES | {"alpha_high": 0.1, "alpha_end": 0.2}, "alpha_end <= alpha_high"),
        (TeacherSamplingConfig, PHASES | {"alpha_high": math.inf}, "finite number"),
        (FixedAdvantageConfig, {"value": 0.2}, "less than 0"),
        (FixedAdvantageConfig, {"fraction": 0.0}, "greater than 0"),
        (FixedAdvantageConfig, {"selected_by": "reference"}, "'student' or 'teacher'"),
        (RolloutCorrectionConfig, {"mode": "clip"}, "'off', 'tis' or 'mask'"),
        (RolloutCorrectionConfig, {"cap": 0.0}, "greater than 0"),
    ],
)
def test_invalid_settings_are_refused(config, values, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        config.model_validate(values)


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip_ratio_low", 1.0), ("clip_ratio_high", 0.0), ("clip_ratio_c", 1.0), ("kl_loss_coef", -1.0)],
)
def test_invalid_policy_loss_is_refused(field, value):
    base = {"role": "student_grpo", "model": "student", "prompts": "math", "steps": 1}
    GrpoConfig.model_validate(base)
    with pytest.raises(pydantic.ValidationError, match=field):
        GrpoConfig.model_validate(base | {field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_estimator": "full_vocab"}, "needs kl_estimator: sampled_token"),
        ({"reward_scale": 1.25, "reference": "student"}, "reward_scale other than 1 uses them"),
        ({"token_weighting": "log_ratio"}, "token_weighting: log_ratio uses them"),
        ({"sign_gate": {"conflict_beta": 0.5, "lambda_high": 1.0}}, "sign_gate uses them"),
        ({"teacher_sampling": PHASES}, "teacher_sampling uses them"),
    ],
)
def test_fixed_advantage_is_refused_beside_the_teachers_advantages(values, message):
    base = {"role": "opd", "init": "student", "teacher": "teacher", "prompts": "pool", "steps": 1}
    base |= {"kl_estimator": "sampled_token", "fixed_advantage": {}}
    assert OpdConfig.model_validate(base).fixed_advantage.value == -0.5
    with pytest.raises(pydantic.ValidationError, match=message):
        OpdConfig.model_validate(base | values)


GRPO = {"role": "student_grpo", "model": "student", "prompts": "math", "steps": 1}


def test_every_policy_loss_has_its_own_defaults():
    def settings(**keys):
        stage = GrpoConfig.model_validate(GRPO | keys)
        return stage.clip_ratio_low, stage.clip_ratio_high, stage.loss_agg_mode

    assert settings() == settings(policy_loss="grpo") == (0.2, 0.2, "token_mean")
    assert settings(policy_loss="gspo") == (3e-4, 4e-4, "seq_mean_token_mean")
    assert settings(policy_loss="cispo") == (1.0, 4.0, "token_mean")
    assert settings(policy_loss="gspo", clip_ratio_high=1e-3) == (3e-4, 1e-3, "seq_mean_token_mean")
    dumped = GrpoConfig.model_validate(GRPO | {"policy_loss": "cispo"}).model_dump()
    assert GrpoConfig.model_validate(dumped).model_dump() == dumped


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"policy_loss": "ppo"}, "'grpo', 'gspo' or 'cispo'"),
        ({"policy_loss": "gspo", "loss_agg_mode": "token_mean"}, "remove loss_agg_mode token_mean, or set"),
        ({"policy_loss": "cispo", "clip_ratio_c": 3.0}, "clip_ratio_c is of policy_loss grpo, not cispo"),
        ({"policy_loss": "gspo", "clip_ratio_low": 1.0}, "choose less than 1 for policy_loss gspo"),
        ({"policy_loss": ["gspo"]}, "'grpo', 'gspo' or 'cispo'"),
        ({"entropy_coeff": math.inf}, "finite number"),
    ],
)
def test_settings_of_another_policy_loss_are_refused(keys, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        GrpoConfig.model_validate(GRPO | keys)


SERVICE = {"url": "http://10.0.0.5:8400/"}


def served(**changes) -> OpdConfig:
    return OpdConfig(**({"role": "opd", "init": "s", "prompts": "p", "steps": 1, "teacher_service": SERVICE} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "t"}, "exactly one of `teacher`"),
        ({"teacher_service": None}, "exactly one of `teacher`"),
        ({"teacher_engine": "sglang", "kl_estimator": "sampled_token"}, "scores and samples nothing"),
        ({"teacher_service": {"url": "10.0.0.5:8400"}}, "is not an address"),
        ({"teacher_service": {"url": "http://me:secret@host:1"}}, "give the key in api_key_file"),
        ({"teacher_service": {"url": []}}, "at least one address"),
        ({"reference": {"math": "r"}, "reward_scale": 2.0}, "by the same domains"),
    ],
)
def test_served_teachers_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(pydantic.ValidationError, match=message) as error:
        served(**changes)
    assert "secret" not in str(error.value.errors(include_input=False))


def test_a_served_teacher_is_no_input_of_its_stage():
    assert served().inputs() == {"init": "s"}
    assert served().teacher_service.urls == ["http://10.0.0.5:8400"]
    by_domain = served(teacher_service={"math": SERVICE, "code": SERVICE}, reference={"math": "r", "code": "r"})
    assert set(by_domain.inputs().values()) == {"s", "r"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of `teacher`"),
        ({"teacher": "t", "teacher_service": SERVICE}, "exactly one of `teacher`"),
        ({"teacher_service": SERVICE | {"cross_tokenizer": True, "tokenizer": "x"}}, "which GRPO has no view for"),
    ],
)
def test_teachers_of_grpo_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        GrpoConfig.model_validate(GRPO | {"teacher_advantage": settings})


def test_a_served_teacher_of_grpo_is_no_input_of_its_stage():
    stage = GrpoConfig.model_validate(GRPO | {"teacher_advantage": {"teacher_service": {"math": SERVICE}}})
    assert "teacher.math" not in stage.inputs()
    assert services_by_domain(services_of(stage))["math"].urls == ["http://10.0.0.5:8400"]
    assert services_of(served()) == served().teacher_service
