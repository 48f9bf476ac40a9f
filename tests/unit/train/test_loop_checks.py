"""What stops a run before an update."""

import pytest

pytest.importorskip("torch")

from megatron_s2d.config.base import UserError  # noqa: E402
from megatron_s2d.train.loop import check_kl, check_rollout_kl  # noqa: E402


def test_an_engine_that_drifts_from_the_trainer_stops_the_run():
    check_rollout_kl({"rollout_kl": 0.01}, 0.01, 3)
    check_rollout_kl({"rollout_kl": 5.0}, None, 3)
    check_rollout_kl({}, 0.01, 3)  # a stage that does not use the engine's log-probabilities
    with pytest.raises(UserError, match="step 3: .* 0.02 nats a token .*rollout.max_kl 0.01.*probe_gap"):
        check_rollout_kl({"rollout_kl": 0.02}, 0.01, 3)


def test_a_student_that_leaves_its_teacher_stops_the_run():
    check_kl({"kl": 0.5}, 1.0, 2)
    with pytest.raises(UserError, match="above max_kl 1.0"):
        check_kl({"kl": 1.5}, 1.0, 2)
