"""Plans: which jobs are reused, resumed or run again, and for which reason."""

import json
from pathlib import Path

import pytest

from megatron_s2d.config import workflow
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.sweep import load_sweep
from megatron_s2d.config.workflow import WorkflowConfig, load_workflow
from megatron_s2d.studies.simulate import load_simulation, predict
from megatron_s2d.studies.sweep import expand_points
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.preflight import check_workflow

ROOT = Path(__file__).resolve().parents[3]
SMOKE = ROOT / "configs" / "smoke.yaml"


def plan(run_dir, *overrides):
    return {job.id: job for job in make_plan(load_workflow(SMOKE, list(overrides)), run_dir)}


def write_run(run_dir, *overrides, unfinished=()):
    """Write the directories of a run of which only the ``unfinished`` jobs are not finished."""
    for job in plan(run_dir, *overrides).values():
        job.directory.begin(job.resolved, job.inputs, {"seed": 1})
        if job.id not in unfinished:
            job.directory.finish({"key": job.key, "seconds": 1.0})


PARTS = ("stages.yaml", "sizes.yaml")  # included by the tables
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.name not in PARTS)
OTHER_KINDS = {
    "sweeps": lambda path: expand_points(load_sweep(path)),
    "simulations": lambda path: predict(load_simulation(path)),
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "-".join(path.relative_to(ROOT / "configs").parts))
def test_every_shipped_config_is_valid(path):
    if path.parent.name in OTHER_KINDS:
        assert OTHER_KINDS[path.parent.name](path)
        return
    config = load_workflow(path)
    assert config.arms and config.stage_order()


def many_stages(count: int) -> WorkflowConfig:
    """The smoke workflow with ``count`` stages and arms instead of one."""
    runs = {f"run{number}": {"extends": "student_grpo", "seed": number} for number in range(count)}
    overrides = [f"stages.{name}={json.dumps(stage)}" for name, stage in runs.items()]
    arms = json.dumps({name: name for name in runs})
    return load_workflow(SMOKE, [*overrides, f"arms={arms}", "contrasts=[]"])


def test_a_plan_of_many_stages_sorts_them_once_and_looks_at_each_a_few_times(tmp_path, monkeypatch):
    calls = {"sorted": 0, "inputs": 0}
    sort, inputs = workflow.sorted_stages, GrpoConfig.inputs

    def count(name, function):
        def counted(*arguments):
            calls[name] += 1
            return function(*arguments)

        return counted

    monkeypatch.setattr(workflow, "sorted_stages", count("sorted", sort))
    monkeypatch.setattr(GrpoConfig, "inputs", count("inputs", inputs))
    config = many_stages(200)
    assert len(make_plan(config, tmp_path)) == 401 and check_workflow(config, tmp_path).totals
    assert calls["sorted"] == 1 and calls["inputs"] < 30 * 200, calls
    copy = config.model_copy(update={"stages": {"student_base": config.stages["student_base"]}})
    assert list(copy.stage_order()) == ["student_base"] and len(config.stage_order()) > 200


def test_new_run_runs_everything_inputs_first(tmp_path):
    jobs = list(plan(tmp_path).values())
    assert {job.action for job in jobs} == {"run"}
    seen = set()
    for job in jobs:
        assert set(job.inputs) <= seen
        seen.add(job.id)
    assert len([job for job in jobs if not job.is_stage]) == 3


def test_finished_jobs_are_reused_and_unfinished_ones_resume(tmp_path):
    write_run(tmp_path, unfinished=("stages/opd",))
    jobs = plan(tmp_path)
    assert jobs["stages/opd"].action == "resume"
    assert {job.action for id_, job in jobs.items() if id_ != "stages/opd"} == {"reuse"}


def test_change_reruns_what_it_affects_and_gives_the_reason(tmp_path):
    write_run(tmp_path)
    jobs = plan(tmp_path, "stages.opd.optimizer.lr=5e-4")
    reruns = {id_ for id_, job in jobs.items() if job.action == "rerun"}
    assert reruns == {"stages/opd", "stages/stage3", "evaluations/stage3"}
    assert jobs["stages/opd"].reason == "stage.optimizer.lr: 0.001 -> 0.0005"
    assert jobs["stages/stage3"].reason == "its input stages/opd changed"


def test_settings_that_cannot_change_a_result_rerun_nothing(tmp_path):
    write_run(tmp_path)
    jobs = plan(
        tmp_path,
        "max_parallel_stages=1",
        "parallel={tensor_model_parallel_size: 2}",
        "stages.opd.checkpoint.interval_steps=1",
        "stages.opd.micro_batch.max_tokens_per_gpu=100",
    )
    assert {job.action for job in jobs.values()} == {"reuse"}


def test_stages_from_before_a_setting_are_reused_and_its_values_rerun_them(tmp_path):
    """The fields are not in the key at their neutral values, as in runs from before they existed."""
    resolved = plan(tmp_path)["stages/stage3"].resolved["stage"]
    assert not {"ppo_epochs", "max_prompt_length"} & resolved.keys()
    write_run(tmp_path)
    assert {job.action for job in plan(tmp_path, "stages.stage3.ppo_epochs=1").values()} == {"reuse"}
    for setting, text in (("ppo_epochs", "2"), ("max_prompt_length", "15")):
        jobs = plan(tmp_path, f"stages.stage3.{setting}={text}")
        assert jobs["stages/stage3"].reason == f"stage.{setting}: None -> {text}"
        assert {id_ for id_, job in jobs.items() if job.action == "rerun"} == {"stages/stage3", "evaluations/stage3"}


def test_micro_batches_decide_a_result_with_a_load_balancing_loss(tmp_path):
    """It is one of each micro-batch, so that the gradient depends on them."""

    def keys(*settings):
        config = load_workflow(SMOKE, ["models.student={preset: tiny-moe}", *settings])
        return {job.id: job.key for job in make_plan(config, tmp_path / "none")}

    other = "stages.opd.micro_batch.max_tokens_per_gpu=100"
    assert keys()["stages/opd"] == keys(other)["stages/opd"]
    balanced = "models.student.moe_aux_loss_coeff=0.01"
    assert keys(balanced)["stages/opd"] != keys(balanced, other)["stages/opd"]


def test_seed_and_data_changes_rerun_what_uses_them(tmp_path):
    write_run(tmp_path)
    assert {job.action for job in plan(tmp_path, "seed=2").values()} == {"rerun"}
    changed = plan(tmp_path, "data.problems.num_prompts=65")
    assert {id_ for id_, job in changed.items() if job.action == "rerun"} == {
        "evaluations/stage3",
        "evaluations/student_grpo",
        "evaluations/tool_grpo",
    }
