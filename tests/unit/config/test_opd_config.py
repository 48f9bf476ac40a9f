"""The configuration validates settings of the policy loss, of SG-OPD's sign gate and of its teacher anchor."""

from __future__ import annotations

import math

import pydantic
import pytest

from megatron_s2d.config.grpo import GrpoConfig, RolloutCorrectionConfig
from megatron_s2d.config.opd import SignGateConfig, TeacherSamplingConfig

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
