"""Where the seconds of a step go: scoring and teachers have their own columns, and nothing is scored twice."""

import time

import pytest
from toy_models import ToyModel

_SECONDS = 0.05  # of one call, slept

SAMPLING = {"max_response_length": 8, "temperature": 0.7}
COMMON = {
    "init": "student", "prompts": "pool", "steps": 2, "train_batch_size": 4, "num_generations": 3, "sampling": SAMPLING,
}  # fmt: skip
OPD = {**COMMON, "type": "opd", "teacher": "teacher"}
CASES = {
    "grpo": ({**COMMON, "type": "grpo", "kl_loss_coef": 0}, 0, set()),
    "grpo with a teacher": (
        {**COMMON, "type": "grpo", "kl_loss_coef": 0, "teacher_advantage": {"teacher": "teacher"}}, 2, {"teacher"},
    ),
    "sampled token": ({**OPD, "kl_estimator": "sampled_token"}, 2, {"teacher"}),
    "weighted sampled token": (
        {**OPD, "kl_estimator": "sampled_token", "token_weighting": "log_ratio"}, 2, {"teacher"},
    ),
    "full": ({**OPD, "kl_estimator": "full_vocab"}, 0, {"teacher"}),
    "weighted full": ({**OPD, "kl_estimator": "full_vocab", "token_weighting": "log_ratio"}, 2, {"teacher"}),
    "by entropy": ({**OPD, "kl_estimator": "full_vocab", "token_weighting": "entropy"}, 2, {"teacher"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_steps_of_one_update_score_the_student_once_each(workflow, monkeypatch, case):
    settings, num_scored, parts = CASES[case]
    score, calls = ToyModel.score, []

    def counted(self, samples, output="log_probs", *, holders=None):
        calls.append(self)
        time.sleep(_SECONDS)
        return score(self, samples, output, holders=holders)

    monkeypatch.setattr(ToyModel, "score", counted)
    context = workflow.run("stage", **settings)
    assert sum(model is context.models.trained for model in calls) == num_scored
    (row, _) = context.directory.metrics()
    assert parts <= {name.removeprefix("timing_s/") for name in row if row[name] and name.startswith("timing_s/")}
    assert row["response_tokens_per_second"] > 0
    assert (row["timing_s/score"] >= _SECONDS) == bool(num_scored)
    if len(calls) > num_scored:  # the teacher scored, too
        assert row["timing_s/teacher"] >= _SECONDS
