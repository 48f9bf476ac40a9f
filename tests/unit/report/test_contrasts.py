"""avg@k, pass@k and paired comparisons against enumeration, and the matched-arms check."""

import itertools
import math

import numpy as np
import pytest

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.sft import SftConfig
from megatron_s2d.config.workflow import ContrastConfig, WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.report.contrasts import arm_differences, arm_of, check_matched
from megatron_s2d.report.evaluation import (
    avg_at_k,
    evaluation_from_rows,
    paired_comparison,
    pass_at_k,
    read_evaluation,
)
from megatron_s2d.report.statistics import compare_paired


def row(problem, rewards, domain="math"):
    k = len(rewards)
    lengths, reasons = list(range(1, k + 1)), ["stop"] * (k - 1) + ["length"]
    return {
        "problem_id": problem,
        "domain": domain,
        "rewards": rewards,
        "response_lengths": lengths,
        "finish_reasons": reasons,
    }


def evaluation(rewards, source="run"):
    rows = [row(f"p{index}", [float(value) for value in line]) for index, line in enumerate(rewards)]
    return evaluation_from_rows(rows, source)


def random_evaluation(generator, n, k, rate):
    rates = np.clip(rate + 0.3 * generator.standard_normal(n), 0, 1)
    return evaluation(generator.random((n, k)) < rates[:, None])


def test_avg_at_k_by_hand():
    result = avg_at_k(evaluation([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]))
    values = [0.5, 0.25, 0.0]
    assert result.mean == pytest.approx(0.25, abs=1e-15) and result.num_problems == 3
    deviation = math.sqrt(sum((value - 0.25) ** 2 for value in values) / 2)
    assert result.std_err == pytest.approx(deviation / math.sqrt(3), rel=1e-12)
    assert avg_at_k(evaluation([[1, 0]])).std_err is None


def test_pass_at_k_equals_enumeration_of_all_subsets():
    rewards = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]
    results = pass_at_k(evaluation(rewards), ks=range(1, 6))
    for k in range(1, 6):
        per_problem = [np.mean([any(subset) for subset in itertools.combinations(line, k)]) for line in rewards]
        assert results[k].mean == pytest.approx(np.mean(per_problem), rel=1e-12)
        assert results[k].std_err == pytest.approx(np.std(per_problem, ddof=1) / 2, rel=1e-12)
    assert results[1].mean == pytest.approx(avg_at_k(evaluation(rewards)).mean, rel=1e-12)


def test_pass_at_k_default_ks_and_refusals():
    data = evaluation(np.eye(12))
    assert list(pass_at_k(data)) == [1, 2, 4, 8, 12]
    with pytest.raises(UserError, match="pass@13 needs 1 to 12"):
        pass_at_k(data, [13])
    with pytest.raises(UserError, match="rewards of 0 and 1"):
        pass_at_k(evaluation([[0.5, 1.0]]))
    big = evaluation(np.concatenate([np.ones((3, 1)), np.zeros((3, 2047))], axis=1))
    assert pass_at_k(big, [1024])[1024].mean == pytest.approx(0.5, rel=1e-12)


def test_paired_comparison_matches_the_normal_theory_on_many_problems():
    generator = np.random.default_rng(0)
    a, b = random_evaluation(generator, 800, 8, 0.55), random_evaluation(generator, 800, 8, 0.5)
    result = paired_comparison(a, b, seed=1)
    differences = a.rewards.mean(axis=1) - b.rewards.mean(axis=1)
    std_err = differences.std(ddof=1) / math.sqrt(800)
    assert result.difference == pytest.approx(differences.mean(), rel=1e-12)
    assert result.std_err == pytest.approx(std_err, rel=1e-12)
    # 10,000 resamples place the 2.5 % quantile within about 0.03 standard errors; 0.1 is generous.
    assert result.interval[0] == pytest.approx(differences.mean() - 1.96 * std_err, abs=0.1 * std_err)
    assert result.interval[1] == pytest.approx(differences.mean() + 1.96 * std_err, abs=0.1 * std_err)
    normal = math.erfc(abs(differences.mean() / std_err) / math.sqrt(2))
    assert result.p_value == pytest.approx(normal, abs=0.01)


def test_p_value_of_many_problems_counts_both_sides():
    differences = np.random.default_rng(4).normal(size=400)
    differences += 1.2 * differences.std(ddof=1) / math.sqrt(400) - differences.mean()  # 1.2 standard errors
    p_value = compare_paired(differences, k=1, seed=0, resamples=10_000, level=0.95).p_value
    assert p_value == pytest.approx(math.erfc(1.2 / math.sqrt(2)), abs=0.02)  # 0.23


def test_p_value_equals_enumeration_of_sign_flips():
    a, b = evaluation([[1], [1], [1], [1], [0]]), evaluation([[0], [0], [0], [0], [1]])
    differences = np.array([1, 1, 1, 1, -1])
    flips = np.array(list(itertools.product([1, -1], repeat=5)))
    exact = np.mean(np.abs(flips @ differences) >= 3)
    assert paired_comparison(a, b).p_value == pytest.approx(exact, abs=1e-12)


def test_interval_of_few_problems_has_the_values_that_the_exact_test_does_not_refuse():
    differences = np.random.default_rng(2).normal(0.3, 0.4, size=8)
    flips = np.array(list(itertools.product([1, -1], repeat=8)))

    def p_value(theta):
        moved = differences - theta
        return np.mean(np.abs(flips @ moved) >= abs(moved.sum()) - 1e-9)

    result = compare_paired(differences, k=1, seed=0, resamples=10, level=0.95)
    low, high = result.interval
    assert result.p_value == p_value(0) and result.level == 0.95
    step = 1e-4
    assert p_value(low - step) <= 0.05 < p_value(low + step)
    assert p_value(high + step) <= 0.05 < p_value(high - step)
    assert compare_paired(differences[:3], k=1, seed=0, resamples=10, level=0.95).level == 0.75  # 8 flips allow no more
    assert compare_paired(differences[:3], k=1, seed=0, resamples=10, level=0.95).order == "a~b"


def test_problems_needed_for_five_points():
    # standard deviation 0.5: (2.8016 * 0.5 / 0.05) ** 2 = 784.9
    differences = np.tile([0.5, -0.5], 50) * math.sqrt(99 / 100)
    assert compare_paired(differences, k=1, seed=0, resamples=10, level=0.95).problems_needed() == 785
    assert compare_paired(differences[:1], k=1, seed=0, resamples=10, level=0.95).problems_needed() is None
    alike = np.zeros(12)  # no answer of either run is right
    assert compare_paired(alike, k=1, seed=0, resamples=10, level=0.95).problems_needed() is None


def test_comparison_is_seeded_antisymmetric_and_order_free():
    generator = np.random.default_rng(3)
    a, b = random_evaluation(generator, 60, 4, 0.6), random_evaluation(generator, 60, 4, 0.4)
    first, again, other = (paired_comparison(a, b, seed=seed) for seed in (5, 5, 6))
    assert first == again and first.interval != other.interval
    swapped = paired_comparison(b, a, seed=5)
    assert swapped.difference == pytest.approx(-first.difference)
    assert swapped.interval == pytest.approx((-first.interval[1], -first.interval[0]), abs=1e-12)
    rows = [row(problem, line.tolist()) for problem, line in zip(b.problem_ids, b.rewards, strict=True)]
    assert paired_comparison(a, evaluation_from_rows(rows[::-1], "reversed"), seed=5) == first
    assert first.order == "a>b" and swapped.order == "a<b" and paired_comparison(a, a).order == "a~b"
    assert paired_comparison(a, a).p_value == 1.0


def test_comparison_refuses_other_problems_and_other_k():
    a = evaluation([[1, 0], [0, 0]], "one.jsonl")
    with pytest.raises(UserError, match="one.jsonl has k = 2 and two.jsonl has k = 1"):
        paired_comparison(a, evaluation([[1], [0]], "two.jsonl"))
    with pytest.raises(UserError, match=r"different problems \(0 only in the first, 1 only in the second.*'p2'"):
        paired_comparison(a, evaluation([[1, 0], [0, 0], [0, 0]], "two.jsonl"))


def test_read_evaluation_names_the_bad_row(tmp_path):
    import json

    path = tmp_path / "e.jsonl"

    def refused(rows, message):
        path.write_text("".join(json.dumps(item) + "\n" for item in rows))
        with pytest.raises(UserError, match=message):
            read_evaluation(path)

    good = row("p0", [1.0, 0.0])
    refused([], "no evaluated problem")
    refused([good, good], r"e\.jsonl:2: problem 'p0' comes twice")
    refused([good, row("p1", [1.0])], r"e\.jsonl:2: 'rewards' must list one entry for each of the 2 samples")
    refused([good | {"response_lengths": [3]}], r"e\.jsonl:1: 'response_lengths'")
    refused([good | {"rewards": [1.0, None]}], r"e\.jsonl:1: damaged file, rewards\.1")
    refused([{"problem_id": "p"}], "no 'domain'")
    path.write_text(json.dumps(good) + "\n" + json.dumps(row("p1", [1.0, 1.0], "code")) + "\n")
    data = read_evaluation(path)
    assert (data.k, data.num_problems, data.truncated_fraction) == (2, 2, 0.5)
    assert avg_at_k(data.of_domain("code")).mean == 1.0


def arm(**changes):
    base = {"role": "student_base", "type": "supervised", "steps": 800, "optimizer": {"lr": 5e-3, "grad_clip": 1.0}}
    opd = {"role": "opd", "type": "opd", "teacher": "teacher_grpo", "steps": 60, "optimizer": {"lr": 1e-3}}
    return [base, opd | changes]


def contrast(differs):
    return ContrastConfig(a="full", b="other", factor="the teacher", differs=differs)


def test_arm_differences_by_dotted_key():
    assert arm_differences(arm(), arm()) == []
    other = [*arm(optimizer={"lr": 1e-4}, teacher="teacher_base", extra=None), {"role": "stage3", "type": "grpo"}]
    differences = arm_differences(arm(), other)
    assert [item.key for item in differences] == ["opd.teacher", "opd.optimizer.lr", "opd.extra", "stage3"]
    assert [str(item) for item in differences[1:]] == [
        "opd.optimizer.lr: 0.001 against 0.0001",
        "opd.extra: absent against null",
        "stage3: only the second arm has it",
    ]
    assert [item.key for item in arm_differences(arm(), arm()[::-1])] == ["order"]
    # A mapping against a plain value is a difference of its own, whatever is inside.
    assert {item.key for item in arm_differences(arm(), arm(optimizer="adam"))} == {"opd.optimizer", "opd.optimizer.lr"}


def test_check_matched_refuses_what_was_not_declared():
    arms = {"full": arm(), "other": arm(teacher="teacher_base", steps=50)}
    declared = check_matched(contrast(["opd.teacher", "opd.st*"]), arms)
    assert [item.key for item in declared] == ["opd.teacher", "opd.steps"]
    undeclared = r"the arms also differ in opd\.steps: 60 against 50\. Make them equal"
    with pytest.raises(UserError, match=undeclared) as caught:
        check_matched(contrast(["opd.teacher"]), arms)
    assert "opd.teacher:" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"opd\.teacher: .*; opd\.steps: "):
        check_matched(contrast([]), arms)
    with pytest.raises(UserError, match="configured alike"):
        check_matched(contrast(["*"]), {"full": arm(), "other": arm()})
    with pytest.raises(UserError, match="no arm 'other'"):
        check_matched(contrast([]), {"full": arm()})


def test_patterns_cross_dots_and_roles_must_be_unique():
    arms = {"full": arm(), "other": arm(optimizer={"lr": 1e-4})}
    assert len(check_matched(contrast(["opd.*"]), arms)) == 1
    with pytest.raises(UserError):
        check_matched(contrast(["opd"]), arms)
    with pytest.raises(UserError, match="role 'opd'"):
        arm_differences([*arm(), arm()[1]], arm())
    with pytest.raises(UserError, match="no role"):
        arm_differences([{"type": "grpo"}], arm())


def test_arms_of_a_workflow_are_compared_by_role():
    stages = {
        "base_s": SftConfig(role="student_base", model="student", data="corpus", steps=8),
        "base_t": SftConfig(role="teacher_base", model="teacher", data="corpus", steps=8),
        "rl": GrpoConfig(role="teacher_grpo", init="base_t", prompts="pool", steps=4),
        "opd_rl": OpdConfig(role="opd", init="base_s", teacher="rl", prompts="pool", steps=4),
        "opd_raw": OpdConfig(role="opd", init="base_s", teacher="base_t", prompts="pool", steps=4),
    }
    stages["joint"] = GrpoConfig(
        role="joint", init="base_s", prompts="pool", steps=4, teacher_advantage={"teacher": {"math": "rl"}}
    )
    config = WorkflowConfig.model_construct(stages=stages, arms={"rl": "opd_rl", "raw": "opd_raw", "joint": "joint"})
    assert arm_of(config, "joint")[-1]["teacher_advantage"]["teacher"] == {"math": "teacher_grpo"}
    first = arm_of(config, "rl")
    assert sorted(stage["role"] for stage in first) == ["opd", "student_base", "teacher_base", "teacher_grpo"]
    assert first[-1]["init"] == "student_base" and first[-1]["optimizer"]["lr"] == 1e-6
    differences = arm_differences(first, arm_of(config, "raw"))
    assert {item.key for item in differences} == {"teacher_grpo", "opd.teacher"}
