"""A GRPO stage of every model family: responses are sampled, scored and trained on, and weights exported."""

import pytest
from cases import CASES, HAS_TRANSFORMER_ENGINE, REFUSE_TRANSFORMER_ENGINE, Case
from rank_checks import *  # noqa: F403
from rank_checks import PLAN_ERROR

from megatron_s2d.config.families import FAMILIES

NAMES = [f"grpo_{family}" for family in FAMILIES]
SERVED = {"engine": "sglang", "sglang": {"urls": {"student": ["http://127.0.0.1:1"]}}}


def test_responses_are_sampled_and_scored(case):
    assert {"prefill", "decode", "score", "reference"} <= {call.phase for call in case.measurement.calls}
    assert case.spec.family == case.name.removeprefix("grpo_")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_exported(name):
    if name in REFUSE_TRANSFORMER_ENGINE and HAS_TRANSFORMER_ENGINE:
        pytest.skip("Transformer Engine's layers do not have its parts (docs/supported-models.md)")
    served = Case(name, CASES[name].values | {"rollout": SERVED})
    (export,) = (item for item in served.memory() if item.phase == "export")
    assert abs(export.error) <= PLAN_ERROR, export
