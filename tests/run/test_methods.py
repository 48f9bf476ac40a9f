"""Every method runs, and settings that the papers prove equivalent train identically."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from s2d import metrics, s2d, s2d_here

from megatron_s2d.data.cache import TeacherCache

CONFIG = Path(__file__).with_name("methods.yaml")


# Arms that slow tests add to the run: variants of others, which unit tests compare with float64.
SLOW_ARMS = {
    "any_anchor", "by_entropy", "by_log_ratio", "by_position", "exopd_teacher_base", "jsd", "skew", "topk_student",
    "topk_teacher", "topk_union",
}  # fmt: skip
ARMS = yaml.safe_load(CONFIG.read_text())["arms"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("methods") / "run"
    arms = {name: stage for name, stage in ARMS.items() if name not in SLOW_ARMS}
    finished = s2d("run", CONFIG, "--out", path, "--set", f"arms={json.dumps(arms)}")
    assert finished.returncode == 0, finished.stderr
    return path


@pytest.fixture(scope="module")
def complete_run(run_dir) -> Path:
    finished = s2d("run", CONFIG, "--out", run_dir)
    assert finished.returncode == 0, finished.stderr
    return run_dir


def losses(run_dir, stage, name="loss"):
    return [row[name] for row in metrics(run_dir, f"stages/{stage}")]


def test_every_arm_is_evaluated(run_dir):
    arms = json.loads((run_dir / "results.json").read_text())["arms"]
    assert len(arms) >= 25 and all(arm["num_problems"] == 12 for arm in arms.values())
    rows = [json.loads(line) for line in (run_dir / "evaluations/opd/evaluation.jsonl").read_text().splitlines()]
    assert [(row["domain"], len(row["rewards"])) for row in rows] == [("arithmetic", 2)] * 8 + [("products", 3)] * 4


@pytest.mark.parametrize(
    ("stage", "same_as"),
    [
        ("gate_off", "opd"),  # lambda_high = lambda_base = 1 with fallback preserve is OPD (M5, M4)
        ("routed", "opd"),  # one teacher, named by domain
        ("full_routed", "full"),
        ("fixed_other_teacher", "fixed"),  # tokens that the student selects: the teacher is measured only
    ],
)
def test_identical_methods_train_identically(run_dir, stage, same_as):
    for name in ("loss", "grad_norm", "entropy"):
        assert losses(run_dir, stage, name) == losses(run_dir, same_as, name)


@pytest.mark.parametrize(("stage", "same_as"), [("topk_all", "full"), ("fkl_full", "fkl"), ("fkl_topk", "fkl")])
def test_exact_sources_agree_up_to_rounding(run_dir, stage, same_as):
    """A top-k of all tokens and caches of full distributions or hidden states give the same distribution."""
    for name in ("loss", "grad_norm"):
        assert losses(run_dir, stage, name) == pytest.approx(losses(run_dir, same_as, name), rel=2e-4, abs=1e-6)


def test_sampling_stages_report_the_mismatch_of_trainer_and_engine(run_dir):
    """Both are the same model here, so only rounding differs; cached and anchor responses are not compared."""
    configs = {path.parent.name: json.loads(path.read_text()) for path in run_dir.glob("stages/*/config.json")}
    sampling = [name for name, config in configs.items() if config["stage"]["type"] in ("grpo", "opd")]
    assert len(sampling) > 15
    for name in sampling:
        for row in metrics(run_dir, f"stages/{name}"):
            assert (
                row["mismatch/log_prob_abs_diff_mean"] <= row["mismatch/log_prob_abs_diff_max"] < 1e-4
                and row["mismatch/k3_kl"] < 1e-8
            ), name
            fractions = [value for key, value in row.items() if key.startswith("mismatch/hist/")]
            assert sum(fractions) == pytest.approx(1) and all(fractions), name


def test_adapters_start_from_the_same_model_as_all_weights(run_dir):
    """The first step of both: same samples, same KL; the reference is the student without its adapter."""
    assert losses(run_dir, "lora_full")[0] == pytest.approx(losses(run_dir, "full_exopd")[0], rel=1e-5)
    assert losses(run_dir, "lora_full")[1] != pytest.approx(losses(run_dir, "full_exopd")[1], rel=1e-5)
    assert losses(run_dir, "lora_rl", "reference_kl")[0] < 1e-6
    for stage in ("lora_rl", "lora_full", "lora_opd"):
        assert (run_dir / "stages" / stage / "adapter" / "adapter_model.safetensors").is_file()
        assert (run_dir / "stages" / stage / "model").is_dir()


@pytest.mark.slow
def test_the_other_arms_are_evaluated(complete_run):
    arms = json.loads((complete_run / "results.json").read_text())["arms"]
    assert arms.keys() == ARMS.keys() and all(arm["num_problems"] == 12 for arm in arms.values())


@pytest.mark.slow
def test_top_k_kl_is_a_lower_bound_of_the_full_kl(complete_run):
    """The divergence with a tail bucket is a lower bound, measured on the same first samples."""
    full = losses(complete_run, "full", "reverse_kl")[0]
    for stage in ("topk_student", "topk_teacher", "topk_union"):
        assert losses(complete_run, stage, "reverse_kl")[0] <= full * (1 + 1e-5)
    assert 0 < losses(complete_run, "topk_student", "topk/overlap")[0] <= 1
    assert (
        losses(complete_run, "topk_union", "topk/teacher_mass")[0]
        >= losses(complete_run, "topk_student", "topk/teacher_mass")[0]
    )


def test_extrapolation_has_larger_advantages_than_distillation(run_dir):
    opd, exopd = losses(run_dir, "opd", "advantage_abs_mean")[0], losses(run_dir, "exopd", "advantage_abs_mean")[0]
    assert exopd > opd
    assert losses(run_dir, "exopd", "teacher_kl")[0] == pytest.approx(losses(run_dir, "opd", "teacher_kl")[0])


def test_fixed_advantage_suppresses_a_fifth_of_the_tokens(run_dir):
    for stage in ("fixed", "fixed_by_teacher"):
        for row in metrics(run_dir, f"stages/{stage}"):
            assert row["fixed_advantage/selected_fraction"] == pytest.approx(0.2, abs=0.01)
            assert row["advantage_mean"] == pytest.approx(-0.5 * row["fixed_advantage/selected_fraction"])
            assert row["fixed_advantage/highest_selected_log_prob"] < 0
    assert losses(run_dir, "fixed", "teacher_kl")[0] == pytest.approx(losses(run_dir, "opd", "teacher_kl")[0])
    assert losses(run_dir, "fixed", "grad_norm") != losses(run_dir, "fixed_by_teacher", "grad_norm")
    assert losses(run_dir, "fixed", "teacher_kl")[0] != losses(run_dir, "fixed_other_teacher", "teacher_kl")[0]


def test_several_passes_clip_ratios_to_the_weights_before_the_first(run_dir):
    """Six updates a step: ratios leave 1, and some are clipped, while old log-probabilities stay the engine's."""
    for row in metrics(run_dir, "stages/passes"):
        assert row["ratio_min"] < 1 < row["ratio_max"] and row["approx_kl"] > 0
        assert row["mismatch/k3_kl"] < 1e-8
    assert any(row["clip_fraction_low"] + row["clip_fraction_high"] > 0 for row in metrics(run_dir, "stages/passes"))


def test_gspo_has_one_ratio_for_a_response(run_dir):
    """Ratios of responses spread less than those of their tokens; the bonus is the entropy's."""
    rows = metrics(run_dir, "stages/gspo")
    for row in rows:
        assert row["ratio_min"] < 1 <= row["ratio_max"] and row["loss/entropy"] < 0  # before the first update it is 1
        assert row["clip_fraction_low"] + row["clip_fraction_high"] <= 1
    assert any(row["clip_fraction_low"] > 0 for row in rows)  # a step may have no group with both rewards
    assert rows[0]["ratio_max"] < metrics(run_dir, "stages/passes")[0]["ratio_max"]


def test_reward_and_teacher_share_one_advantage(run_dir):
    for stage, name, weights in (("joint", "reward", (0.5, 0.75, 1.0)), ("joint_rl", "teacher", (1.0, 0.5, 0.0))):
        rows = metrics(run_dir, f"stages/{stage}")
        assert [row[f"advantage/{name}_weight"] for row in rows] == pytest.approx(list(weights))
        assert all(0 <= row["advantage/conflict_fraction"] <= 1 for row in rows)
    assert metrics(run_dir, "stages/joint_rl")[2]["advantage/teacher_abs_mean"] == 0


def test_episodes_with_a_tool_train_by_rewards_and_by_a_teacher(run_dir):
    """Several turns, observations between them; trainer and engine agree on the model's tokens."""
    for stage in ("tool_rl", "tool_opd"):
        for row in metrics(run_dir, f"stages/{stage}"):
            assert row["num_turns"] > 2 and row["num_turns_max"] <= 4
            assert row["mismatch/log_prob_abs_diff_max"] < 1e-4
    examples = (run_dir / "stages/tool_rl/rollouts.jsonl").read_text().splitlines()
    episode = json.loads(examples[0])["episode"]
    assert [part["role"] for part in episode[:3]] == ["model", "environment", "model"]
    assert episode[0]["text"].endswith("=") and episode[1]["text"].isdigit()


def test_sign_gate_and_teacher_sampling_schedule(run_dir):
    rows = metrics(run_dir, "stages/sg_opd")
    for row in rows:
        parts = [row[f"gate/{name}_fraction"] for name in ("consensus", "conflict", "neutral")]
        assert sum(parts) == pytest.approx(1.0) and 0 <= row["gate/stability_clipped_fraction"] <= 1
        by_position = [value for key, value in row.items() if key.startswith("gate/conflict_by_position/")]
        assert min(by_position) <= row["gate/conflict_fraction"] <= max(by_position)
    assert [row["anchor/alpha"] for row in rows] == pytest.approx([1.0, 1.0, 0.55, 0.0])
    assert rows[3]["anchor/num_samples"] == 0 and any(row["anchor/num_samples"] > 0 for row in rows[:3])


@pytest.mark.slow
def test_incorrect_teacher_responses_are_anchors_only_if_enabled(complete_run):
    rows = [row for row in metrics(complete_run, "stages/any_anchor") if row["anchor/alpha"] > 0]
    assert rows and all(row["anchor/kept_fraction"] == 1 for row in rows)
    assert any(row["anchor/kept_fraction"] < 1 for row in metrics(complete_run, "stages/sg_opd")[:3])


def test_only_correct_cache_contains_only_correct_responses(run_dir):
    cache = TeacherCache.open(run_dir / "stages/cache_verified/cache")
    rows = metrics(run_dir, "stages/cache_verified")
    assert {sample.reward for sample in cache.samples} == {1.0}
    assert len(cache.samples) == sum(row["kept"] for row in rows) < 64 * 4
    assert sum(row["reward"] for row in rows) > 0


@pytest.mark.slow
def test_load_checkpoint_stage_reproduces_an_exported_stage(run_dir, tmp_path):
    """An exported stage is loaded as a stage without training: the same samples for the same problems."""
    exported = s2d("convert", "megatron-to-hf", run_dir / "stages/fkl/model", tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr
    config = yaml.safe_load(CONFIG.read_text())
    config["models"]["published"] = {"path": str(tmp_path / "hf")}
    config["stages"] |= {
        "published": {"type": "load_checkpoint", "model": "published"},
        "from_published": {"extends": "opd", "init": "published", "teacher": "published", "steps": 1},
    }
    config["arms"] = {"published": "published", "from_published": "from_published"}
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(config))
    finished = s2d("run", tmp_path / "published.yaml", "--out", tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    rows = [
        (path / "evaluation.jsonl").read_text()
        for path in (run_dir / "evaluations/fkl", tmp_path / "run/evaluations/published")
    ]
    assert rows[0] == rows[1]
    assert metrics(tmp_path / "run", "stages/from_published")[0]["teacher_kl"] == 0


@pytest.mark.slow
def test_token_weighting_changes_the_loss_but_not_its_scale(complete_run):
    for stage, plain in (("by_entropy", "full"), ("by_position", "full"), ("by_log_ratio", "opd")):
        weighted, reference = losses(complete_run, stage)[0], losses(complete_run, plain)[0]
        assert weighted != reference
        if plain == "full":
            assert 0.3 * reference < weighted < 3 * reference


def test_metrics_of_kl_by_position_and_top_k_overlap(run_dir):
    row = metrics(run_dir, "stages/full")[0]
    parts = [value for name, value in row.items() if name.startswith("kl_by_position/")]
    assert len(parts) >= 3 and all(part >= 0 for part in parts) and min(parts) <= row["kl"] <= max(parts)
    assert losses(run_dir, "topk_all", "topk/overlap")[0] == 1


def test_run_stops_above_max_kl(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")  # with the stages before this one
    finished = s2d(
        "run", CONFIG, "--out", tmp_path / "run", "--set", "stages.full.max_kl=1e-6", "--set", "arms={full: full}"
    )
    assert finished.returncode == 1 and "above max_kl" in finished.stderr


def test_dynamic_sampling_replaces_groups_without_a_signal(run_dir):
    for row in metrics(run_dir, "stages/rl_teacher"):
        assert row["rollout/num_generated"] >= 64
    assert any(row["rollout/num_generated"] > 64 for row in metrics(run_dir, "stages/rl_teacher"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.opd.reward_scale=1.25", "reward scale other than 1 needs a `reference`"),
        ("stages.full.sign_gate={conflict_beta: 1, lambda_high: 1.0}", "sign_gate needs kl_estimator: sampled_token"),
        ("stages.routed.teacher={code: rl_teacher}", "no teacher for the domain 'arithmetic'"),
        ("stages.gkd.cache=null", "set `cache` if on_policy_fraction is below 1"),
        ("stages.jsd.beta=null", "beta goes with jsd"),
        ("stages.fkl.cache=cache_sampled", "has representation sampled_token"),
        ("stages.expo.base=student", "have different models"),
        ("stages.sg_opd.sign_gate.conflict_fallback=preserve", "conflict_beta goes with conflict_fallback: interp"),
        ("stages.continued_rl.label_reuse=refuse", "already used the labels"),
        ("stages.student={type: load_checkpoint, model: student}", "model 'student' has no `path`"),
    ],
)
def test_invalid_settings_fail_before_the_run(override, message, tmp_path):
    finished = s2d_here("run", CONFIG, "--dry-run", "--out", tmp_path / "no", "--set", override)
    assert finished.returncode == 1 and message in finished.stderr, finished.stderr
