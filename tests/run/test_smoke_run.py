"""The smoke workflow as a user runs it: results, artifacts, related commands, partial re-runs."""

import json
import re
import shutil

import pytest
from s2d import ROOT, SMOKE, metrics, s2d, s2d_here

from megatron_s2d.artifacts.files import file_digest, json_digest


def test_results_are_complete_and_consistent(unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    assert set(results["arms"]) == {"direct_student_grpo", "half_bridge_stage3", "direct_tool_grpo"}
    for arm in results["arms"].values():
        assert arm["k"] == 4 and arm["num_problems"] == 64
        assert 0 <= arm["avg_at_k"] <= 1 and 0 < arm["std_err"] < 0.1
    (contrast,) = results["contrasts"]
    low, high = contrast["interval"]
    assert low <= contrast["difference"] <= high and contrast["matched"]
    arms = results["arms"]
    expected = arms["half_bridge_stage3"]["avg_at_k"] - arms["direct_student_grpo"]["avg_at_k"]
    assert contrast["difference"] == pytest.approx(expected)
    assert results["wall_seconds"] > 0


def test_validations_are_in_the_stage_the_lineage_and_the_report(unbroken):
    steps = {}
    for stage in ("opd", "stage3"):
        lines = (unbroken / "stages" / stage / "validation.jsonl").read_text().splitlines()
        steps[stage] = [json.loads(line)["step"] for line in lines]
    assert steps["opd"] == [0, 2, 4, 6] and steps["stage3"] == list(range(1, len(steps["stage3"]) + 1))
    assert json.loads((unbroken / "stages/stage3/lineage.json").read_text())["validation"]["best"]["step"] >= 1
    assert len(list((unbroken / "stages/opd/validation").glob("step_*/*.jsonl"))) == 8
    assert (unbroken / "plots/validation_opd.png").exists()
    assert "held_out" in (unbroken / "report.html").read_text()


def test_report_needs_no_network(unbroken):
    page = (unbroken / "report.html").read_text()
    assert "direct_student_grpo" in page and "data:image/png;base64," in page
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)


def test_every_stage_writes_config_seeds_lineage_metrics_and_result(unbroken):
    for stage in (unbroken / "stages").iterdir():
        lineage = json.loads((stage / "lineage.json").read_text())
        assert {"inputs", "seeds", "code", "libraries", "finished"} <= set(lineage) and lineage["resumed"] == []
        finished = json.loads((stage / "finished.json").read_text())
        assert finished["outputs"] and finished["seconds"] > 0
        assert (stage / "config.json").exists() and (stage / "metrics.jsonl").exists()
        assert not (stage / "checkpoints").exists(), "only the final weights remain"
    opd = json.loads((unbroken / "stages/opd/lineage.json").read_text())
    assert set(opd["inputs"]) == {"stages/forward_kl", "stages/rl_teacher"}


def test_training_reduces_the_losses(unbroken):
    """Losses decrease, and the engine samples with the trained weights."""
    base = metrics(unbroken, "stages/teacher_base")
    assert base[-1]["loss"] < 0.6 * base[0]["loss"]
    forward_kl = metrics(unbroken, "stages/forward_kl")
    assert forward_kl[-1]["kl"] < 0.5 * forward_kl[0]["kl"]
    opd = metrics(unbroken, "stages/opd")  # starts from there, and each of its few steps has other prompts
    assert min(row["kl"] for row in opd) < 0.5 * opd[0]["kl"]
    for row in metrics(unbroken, "stages/rl_teacher"):
        assert row["mismatch/k3_kl"] < 1e-9 and abs(row["importance_ratio_max"] - 1) < 1e-4
        assert row["mismatch/log_prob_abs_diff_max"] < 1e-4


def test_episodes_with_a_calculator_are_trained_on(unbroken):
    rows = metrics(unbroken, "stages/tool_grpo")
    assert len(rows) == 4 and all(row["mismatch/k3_kl"] < 1e-9 for row in rows)
    assert max(row["num_turns_max"] for row in rows) > 1


def test_label_ledger_is_written(unbroken):
    rows = json.loads((unbroken / "label_ledger.json").read_text())
    entries = {(row["stage"], row["prompts"]): row for row in rows}
    first, last = (set(entries[key]["prompt_ids"]) for key in (("rl_teacher", "pool/1H"), ("stage3", "pool/2H")))
    assert len(first) == len(last) == 128 and not first & last
    assert not any(row["labels_used"] for row in rows if row["stage"] == "opd")
    assert entries["stage3", "held_out"]["labels_used"] and not set(entries["stage3", "held_out"]["prompt_ids"]) & last


def test_same_command_reuses_everything(unbroken):
    before = (unbroken / "stages/opd/finished.json").stat().st_mtime_ns
    finished = s2d("run", SMOKE, "--out", unbroken)
    assert finished.returncode == 0 and "12 of 12 stages and evaluations are finished and reused" in finished.stdout
    assert (unbroken / "stages/opd/finished.json").stat().st_mtime_ns == before


def test_changed_config_reruns_only_affected_stages(unbroken, tmp_path):
    run_dir = tmp_path / "changed"
    shutil.copytree(unbroken, run_dir)
    finished = s2d("run", SMOKE, "--out", run_dir, "--set", "stages.stage3.steps=2")
    assert finished.returncode == 0, finished.stderr
    assert "stages/stage3: will run again: stage.steps: 4 -> 2" in finished.stdout
    assert "10 of 12 stages and evaluations are finished and reused" in finished.stdout
    assert len(metrics(run_dir, "stages/stage3")) == 2
    archived = run_dir / "stages" / ".archive" / "stage3-1"
    assert "stage.steps: 4 -> 2" in (archived / "reason.txt").read_text() and (archived / "model").exists()
    assert metrics(run_dir, "stages/stage3") == metrics(unbroken, "stages/stage3")[:2]


def test_dry_run_prints_the_plan_and_touches_nothing(tmp_path):
    finished = s2d("run", SMOKE, "--dry-run", "--out", tmp_path / "never")
    assert finished.returncode == 0 and not (tmp_path / "never").exists()
    for text in ("stages/rl_teacher", "forward_kl", "qwen3", "Estimated memory", "101,9"):
        assert text in finished.stdout
    wrong = s2d_here("run", SMOKE, "--dry-run", "--set", "parallel.tensor_model_parallel_size=3")
    assert wrong.returncode == 1 and "num_attention_heads" in wrong.stderr


def test_eval_prints_and_compares(unbroken):
    output = s2d("eval", unbroken, "--json")
    assert json.loads(output.stdout)["half_bridge_stage3"]["k"] == 4
    comparison = s2d_here(
        "eval",
        unbroken,
        "--arm",
        "half_bridge_stage3",
        "--against",
        unbroken,
        "--against-arm",
        "direct_student_grpo",
        "--json",
    )
    (row,) = json.loads(comparison.stdout).values()
    (contrast,) = json.loads((unbroken / "results.json").read_text())["contrasts"]
    assert row["difference"] == pytest.approx(contrast["difference"]) and row["num_problems"] == 64
    wrong = s2d_here("eval", unbroken, "--arm", "nothing")
    assert wrong.returncode == 1 and "no finished evaluation of 'nothing'" in wrong.stderr


def test_generate_report_cache_doctor(unbroken):
    generated = s2d("generate", unbroken, "half_bridge_stage3", "--prompt", "3 + 4 * 2 =", "--num-samples", "2")
    assert generated.returncode == 0 and "3 + 4 * 2 =" in generated.stdout
    assert len(generated.stdout.strip().splitlines()) == 3
    (unbroken / "report.html").unlink()
    assert s2d_here("report", unbroken).returncode == 0 and (unbroken / "report.html").exists()
    cache = unbroken / "stages/cache/cache"
    assert "hidden" in s2d_here("cache", "info", cache).stdout
    assert s2d_here("cache", "verify", cache).returncode == 0
    doctor = s2d("doctor")
    assert "megatron-core" in doctor.stdout and doctor.returncode == 0


@pytest.mark.parametrize("name", ["teacher_digest", pytest.param("tokenizer_fingerprint", marks=pytest.mark.slow)])
def test_cache_of_another_teacher_or_tokenizer_raises(unbroken, tmp_path, name):
    run_dir = tmp_path / "foreign"
    shutil.copytree(unbroken, run_dir)
    shutil.rmtree(run_dir / "stages/forward_kl")
    header = run_dir / "stages/cache/cache/header.json"
    document = json.loads(header.read_text())
    body = {**document["body"], "header": {**document["body"]["header"], name: "0" * 64}}
    header.write_text(json.dumps({**document, "body": body, "body_digest": json_digest(body)}))
    record = run_dir / "stages/cache/finished.json"  # test_changed_inputs.py: without this it "has changed"
    summary = json.loads(record.read_text())
    summary["outputs"]["cache"] = file_digest(header)
    record.write_text(json.dumps(summary))
    finished = s2d("run", SMOKE, "--out", run_dir)
    assert finished.returncode == 1 and name in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yml"], "nowhere.yml: no such file"),
        (["run", str(SMOKE), "--set", "stages.opd.stpes=3"], "did you mean 'steps'"),
        (["report", "nowhere"], "not a run directory"),
        (["eval", "nowhere"], "neither a run directory nor"),
        (["cache", "info", "nowhere"], "no such teacher cache"),
        (["generate", "nowhere", "opd", "--prompt", "1"], "not a run directory"),
        (["convert", "inspect", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_gives_a_one_line_error_and_a_non_zero_exit_code(arguments, message):
    finished = s2d_here(*arguments)
    assert finished.returncode == 1
    assert message in finished.stderr and "Traceback" not in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


def test_wrong_input_ends_the_process_with_one_line():
    finished = s2d("run", "nowhere.yaml")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr == "error: nowhere.yaml: no such file\n"


def test_shipped_configs_are_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert "configs/quickstart.yaml" in readme and "configs/smoke.yaml" in readme
