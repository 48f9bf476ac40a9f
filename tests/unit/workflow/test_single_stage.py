"""``s2d run --stage``: one stage of a run, side by side with others."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from megatron_s2d.artifacts.lock import directory_lock
from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.cli import main
from megatron_s2d.config.workflow import load_workflow
from megatron_s2d.errors import UserError
from megatron_s2d.workflow.plan import make_plan
from megatron_s2d.workflow.runner import prepare_run

SMOKE = Path(__file__).resolve().parents[3] / "configs" / "smoke.yaml"
CONSOLE = Console(file=io.StringIO())


def finish(config, run_dir, *stages: str) -> None:
    """Write the directories of finished stages."""
    for job in make_plan(config, run_dir):
        if job.id in {f"stages/{name}" for name in stages}:
            directory = StageDirectory(run_dir / job.id)
            directory.begin(job.resolved, job.inputs, {})
            directory.finish({"seconds": 1.0})


def test_jobs_of_a_stage_are_its_training_and_its_evaluation(tmp_path):
    config = load_workflow(SMOKE)
    finish(config, tmp_path, "student_base")
    with prepare_run(config, tmp_path, CONSOLE, "student_grpo") as (jobs, preflight):
        assert [job.id for job in jobs if job.is_pending] == ["stages/student_grpo", "evaluations/student_grpo"]
        assert [job.id for job in jobs if not job.is_pending] == ["stages/student_base"]
        assert "student_grpo" in preflight.stages


def test_stage_with_unfinished_input_is_refused(tmp_path):
    config = load_workflow(SMOKE)
    finish(config, tmp_path, "student_base")
    unfinished = pytest.raises(UserError, match="--stage opd: its input stages/forward_kl is not finished")
    with unfinished, prepare_run(config, tmp_path, CONSOLE, "opd"):
        pass
    for name in ("nothing", "../../outside"):
        unknown = pytest.raises(UserError, match=f"--stage {name}: no arm needs a stage of this name")
        with unknown, prepare_run(config, tmp_path / "a" / "b", CONSOLE, name):
            pass
    assert not (tmp_path / "a").exists()  # a name becomes a folder only after it was checked


def test_changed_configuration_archives_that_stage_only(tmp_path):
    config = load_workflow(SMOKE)
    finish(config, tmp_path, "teacher_base", "student_base")
    changed = load_workflow(SMOKE, ["stages.teacher_base.steps=3", "stages.student_base.steps=3"])
    with prepare_run(changed, tmp_path, CONSOLE, "teacher_base"):
        assert not (tmp_path / "stages/teacher_base").exists() and (tmp_path / "stages/student_base").exists()
        assert (tmp_path / "stages/.archive/teacher_base-1").exists()


def test_names_that_a_terminal_would_obey_are_written_out(tmp_path, capsys):
    config = load_workflow(SMOKE)
    finish(config, tmp_path, "teacher_base")
    path = tmp_path / "stages/teacher_base/config.json"
    path.write_text(path.read_text().replace('"seed": 1', '"seed": "\\u001b]0;title\\u0007"', 1))
    console = Console(file=io.StringIO(), width=300)
    with prepare_run(config, tmp_path, console, "teacher_base"):
        pass
    assert "\\x1b]0;title\\x07" in console.file.getvalue() and "\x1b" not in console.file.getvalue()
    (tmp_path / ".lock").write_text("process \x1b[2J")
    with directory_lock(tmp_path):
        (tmp_path / ".lock").write_text("process \x1b[2J")
        with pytest.raises(UserError, match=r"in use by process \\x1b\[2J"), directory_lock(tmp_path):
            pass
    assert main(["run", "no\x1b[2Jfile.yaml"]) == 1
    assert "no\\x1b[2Jfile.yaml" in capsys.readouterr().err


def test_single_stages_share_the_run_directory_and_a_full_run_locks_it(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_s2d.workflow.runner._LOCK_WAIT_SECONDS", 0.1)
    config = load_workflow(SMOKE)

    def is_refused(stage: str | None) -> bool:
        with pytest.raises(UserError, match="in use by"), prepare_run(config, tmp_path, CONSOLE, stage):
            pass
        return True

    with prepare_run(config, tmp_path, CONSOLE, "teacher_base"), prepare_run(config, tmp_path, CONSOLE, "student_base"):
        assert is_refused("teacher_base") and is_refused(None)
    with prepare_run(config, tmp_path, CONSOLE, None):
        assert is_refused("teacher_base")


def test_shared_lock_excludes_exclusive_locks_only(tmp_path):
    def is_refused(**options: bool) -> bool:
        with pytest.raises(UserError, match="in use by"), directory_lock(tmp_path, **options):
            pass
        return True

    with directory_lock(tmp_path, shared=True), directory_lock(tmp_path, shared=True):
        assert is_refused()
    with directory_lock(tmp_path):
        assert is_refused(shared=True)
