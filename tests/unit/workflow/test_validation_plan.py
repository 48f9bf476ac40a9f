"""Validation inside stages before and around a run: keys, checks, labels, costs, the lines of progress, the figure."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.stage_time import stage_time
from megatron_s2d.report.contrasts import arm_differences, arm_of
from megatron_s2d.report.plots import plot_validation
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.plan_estimate import machine_from_options
from megatron_s2d.workflow.plan_table import print_plan
from megatron_s2d.workflow.preflight import check_workflow
from megatron_s2d.workflow.progress import Progress

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"
SHOWN = "{interval_steps: 4, data: {new: held_out}, sampling: {max_response_length: 8}}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def check(cache, *overrides):
    return check_workflow(load_workflow(SMOKE, list(overrides)), cache)


def keys(tmp_path, *overrides):
    return {job.id: job.key for job in make_plan(load_workflow(SMOKE, list(overrides)), tmp_path)}


def changed(tmp_path, *overrides):
    before, after = keys(tmp_path), keys(tmp_path, *overrides)
    return {name for name in before if before[name] != after[name]}


def test_validation_that_only_shows_curves_reruns_nothing(tmp_path):
    assert not changed(tmp_path, f"stages.student_base.validation={SHOWN}", "stages.cache.seed=0")
    assert not changed(tmp_path, "stages.opd.validation=null")
    assert not changed(tmp_path, "stages.opd.validation.samples_per_prompt=4", "stages.stage3.validation.batch_size=3")


@pytest.mark.parametrize(
    "change",
    [
        "validation=null", "validation.samples_per_prompt=3", "validation.best=null", "validation.seed=1",
        "validation.sampling={max_response_length: 7}", "validation.until=[]", "validation.interval_steps=2",
    ],
)  # fmt: skip
def test_validation_that_decides_is_part_of_the_key(tmp_path, change):
    assert changed(tmp_path, f"stages.stage3.{change}") == {"stages/stage3", "evaluations/stage3"}


def test_its_data_and_the_sampling_of_the_evaluation_count_too(tmp_path):
    assert changed(tmp_path, "data.held_out.num_prompts=15") == {"stages/stage3", "evaluations/stage3"}
    assert "stages/stage3" in changed(tmp_path, "evaluation.sampling.temperature=0.5")
    assert "stages/opd" not in changed(tmp_path, "evaluation.sampling.temperature=0.5")


def test_arms_that_differ_in_curves_only_are_matched():
    overrides = [f"stages.student_grpo.validation={SHOWN}"]
    arms = [arm_of(load_workflow(SMOKE, change), "direct_student_grpo") for change in ([], overrides)]
    assert arm_differences(*arms) == []
    decides = [*overrides, "stages.student_grpo.validation.best={metric: new/reward}"]
    assert arm_differences(arms[0], arm_of(load_workflow(SMOKE, decides), "direct_student_grpo"))


def test_labels_of_a_validation_that_selects_count(cache):
    preflight = check(cache)
    rows = {(row.stage, row.prompts): row for row in preflight.ledger.entries(preflight.stages)}
    assert not rows["opd", "held_out"].labels_used and rows["opd", "held_out"].note == "validation: shown only"
    assert rows["stage3", "held_out"].labels_used and "selects" in rows["stage3", "held_out"].note
    ids = json.loads(preflight.ledger.to_json(["stage3"]))[-1]["prompt_ids"]
    assert len(ids) == 16 and ids == preflight.prompts["held_out"].values("id")
    shown = check(cache, "stages.stage3.validation.best=null", "stages.stage3.validation.until=[]")
    number = [item.ledger.num_labels_used(item.stages) for item in (preflight, shown)]
    assert number[0] == number[1] + 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.stage3.validation.data.held_out=problems"], "are evaluation problems .* select weights"),
        (["stages.student_base.validation={interval_steps: 1, data: {a: corpus}}"], "'corpus' is a generated corpus"),
        (["stages.stage3.validation.until=[{rule: kl, threshold: 1}]"], "type grpo has none; use plateau or pass_rate"),
        (["stages.opd.validation.sampling={max_response_length: 5000}"], r"stages.opd.validation: prompt .* exceed"),
        (["stages.opd.validation.interval_step=1"], "did you mean 'interval_steps'"),
    ],
)
def test_what_cannot_work_is_refused(cache, overrides, message):
    with pytest.raises(UserError, match=message):
        check(cache, *overrides)


def test_what_is_likely_a_mistake_is_said(cache):
    lines = check(
        cache,
        "stages.stage3.validation.data.trained=pool/2H",
        "stages.opd.validation.sampling={temperature: 0, max_response_length: 8}",
        "stages.stage3.validation.until=[{rule: plateau, metric: held_out/reward, patience: 4}]",
    ).likely_mistakes
    assert len(lines) == 3
    assert any("data.trained: the stage stage3 trains on the labels of 128 of its prompts" in line for line in lines)
    assert any("stages.opd.validation: temperature 0 makes all 2 samples" in line for line in lines)
    assert any("until.0: the rule cannot end the stage before its last step (4)" in line for line in lines)
    (line,) = check(cache, "stages.stage3.validation.interval_steps=4").likely_mistakes
    assert "validates after the last step only" in line
    # The first half is that of the teacher, which is not an earlier stage of the student's own validation.
    assert check(cache, "stages.stage3.validation.data.held_out=pool/1H").likely_mistakes


def test_costs_are_in_the_plan(cache):
    preflight = check(cache, f"stages.student_base.validation={SHOWN}", "stages.student_base.validation.batch_size=5")
    shape = preflight.shapes["opd"].validation
    assert (shape.count, shape.batches, shape.prompts, shape.requests) == (4, 4, 8, 16)  # steps 0, 2, 4, 6
    console = Console(file=io.StringIO(), width=220)
    print_plan(preflight, [], Path("x"), console)
    row = next(line for line in console.file.getvalue().splitlines() if "new (held_out)" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "student_base", "new (held_out)", "4 steps", "20", "320", "8", "nothing",
    ]  # fmt: skip
    memory = preflight.memory(on_gpu=False)
    assert (
        memory["student_base"].phases["validation"]["KV cache"] > 0 and "validation" not in memory["rl_teacher"].phases
    )
    machine = machine_from_options("h200", None, [])
    seconds = stage_time(preflight.config, "opd", preflight.specs, preflight.shapes["opd"], machine).seconds
    twice = check(cache, "stages.opd.validation.interval_steps=1", "stages.opd.validation.before_training=false")
    more = stage_time(twice.config, "opd", twice.specs, twice.shapes["opd"], machine).seconds
    assert more["validation"] == pytest.approx(seconds["validation"] * 6 / 4)


def row(step, rate, **more):
    data = {
        "pass_rate": rate, "pass_rate_std_err": 0.05, "reward": rate, "reward_std_err": 0.05, "response_length": 3.0,
        "truncated_fraction": 0.0, "num_prompts": 16, "samples_per_prompt": 2,
    }  # fmt: skip
    base = {"step": step, "data": {"new": data}, "kl": None, "best": False, "ended": None, "seconds": 1.0}
    return json.dumps(base | more) + "\n"


def test_a_line_for_each_validation(tmp_path):
    stage = StageDirectory(tmp_path)
    stage.validation_path.write_text(row(2, 0.5))
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    with Progress(console, interval=60.0) as progress:
        progress.add("stages/opd", 8, stage)
        progress.refresh()
        stage.validation_path.write_text(row(2, 0.5) + row(4, 0.625, best=True) + '{"step": 6')
        progress.refresh()
        progress.refresh()
        stage.validation_path.write_text(row(2, 0.5) + row(4, 0.625, best=True) + row(6, 0.5, ended="kl: small"))
        progress.finish("stages/opd", "done in 3s")
    assert console.file.getvalue().splitlines() == [
        "stages/opd: validation after step 4: new 62.5 ± 5.0 %, the best so far",
        "stages/opd: validation after step 6: new 50.0 ± 5.0 %, ends the stage (kl: small)",
        "stages/opd: done in 3s",
    ]


def test_the_figure_has_a_curve_a_data_set(tmp_path):
    stage = StageDirectory(tmp_path)
    assert plot_validation(stage.validations()) is None
    stage.validation_path.write_text(row(2, 0.5) + row(4, 0.7, best=True))
    png = plot_validation(stage.validations())
    stage.validation_path.write_text(row(2, 0.5) + row(4, 0.2, best=True))
    assert png.startswith(b"\x89PNG") and png != plot_validation(stage.validations())


def test_checkpoints_that_are_pinned_are_kept(tmp_path):
    stage = StageDirectory(tmp_path)
    for step in (2, 4, 6, 8):
        stage.checkpoint_path(step).mkdir(parents=True)
    stage.retain_checkpoints(2, lambda steps: [4] if steps == [6, 8] else [])
    assert [path.name for path in stage.checkpoints()] == ["step_00000004", "step_00000006", "step_00000008"]
