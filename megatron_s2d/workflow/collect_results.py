"""Collects ``RunResults`` from the directories of finished jobs: arms, contrasts, ledger, examples. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_s2d.artifacts.files import read_jsonl
from megatron_s2d.artifacts.shapes import ResponseRow, checked_rows
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.report.contrasts import arm_of, check_matched
from megatron_s2d.report.evaluation import Evaluation, paired_comparison, pass_rate, read_evaluation
from megatron_s2d.report.paper_table import make_table
from megatron_s2d.report.results import (
    ArmResult,
    ContrastResult,
    RefusedContrast,
    RolloutExample,
    RunResults,
    StageRun,
)
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.preflight import Preflight

EVALUATION_NAME = "evaluation.jsonl"
_EXAMPLES_PER_STAGE = 4


def collect_results(
    config: WorkflowConfig,
    run_dir: Path,
    jobs: Sequence[Job],
    preflight: Preflight,
    wall_seconds: float,
    environment: Mapping[str, str],
) -> RunResults:
    """Return everything that the report of a finished run shows."""
    evaluations = {
        job.stage: read_evaluation(job.directory.path / EVALUATION_NAME)
        for job in jobs
        if not job.is_stage and job.pass_rate_check is None
    }
    contrasts, refused = compare_arms(config, evaluations)
    stages = [job for job in jobs if job.is_stage]
    return RunResults(
        name=config.name,
        description=config.description,
        seed=config.seed,
        wall_seconds=wall_seconds,
        arms=tuple(ArmResult.from_evaluation(arm, stage, evaluations[stage]) for arm, stage in config.arms.items()),
        contrasts=contrasts,
        refused=refused,
        also_evaluated=tuple(
            ArmResult.from_evaluation(stage, stage, evaluations[stage]) for stage in config.also_evaluate
        ),
        stages=tuple(
            StageRun(job.stage, job.directory, job.directory.finished()["seconds"], reused=not job.is_pending)
            for job in stages
        ),
        ledger=preflight.ledger.entries(preflight.stages),
        rollouts=tuple(example for job in stages for example in _examples(job)),
        environment=environment,
        warnings=(*_pass_rate_warnings(config, jobs), *preflight.warnings),
        table=make_table(config, evaluations, _problems(config, preflight)),
    )


def _problems(config: WorkflowConfig, preflight: Preflight) -> dict[str, list[str]]:
    return {entry: preflight.prompts[entry].values("id") for entry in config.evaluation.entries}


def compare_arms(
    config: WorkflowConfig, evaluations: Mapping[str, Evaluation]
) -> tuple[tuple[ContrastResult, ...], tuple[RefusedContrast, ...]]:
    """Return the declared contrasts, and those refused (with the reason) because their arms are not matched."""
    arms = {name: arm_of(config, name) for name in config.arms}
    contrasts, refused = [], []
    for contrast in config.contrasts:
        try:
            differences = check_matched(contrast, arms)
        except UserError as error:
            refused.append(RefusedContrast(contrast.a, contrast.b, contrast.factor, str(error)))
            continue
        comparison = paired_comparison(
            evaluations[config.arms[contrast.a]], evaluations[config.arms[contrast.b]], seed=config.seed
        )
        contrasts.append(
            ContrastResult(
                contrast.a,
                contrast.b,
                contrast.factor,
                contrast.expect,
                comparison,
                tuple(difference.text for difference in differences),
                by_paper=config.expectations == "paper",
            )
        )
    return tuple(contrasts), tuple(refused)


def _pass_rate_warnings(config: WorkflowConfig, jobs: Sequence[Job]) -> list[str]:
    warnings = []
    for job in jobs:
        if job.pass_rate_check is None:
            continue
        check = config.pass_rate_checks[job.pass_rate_check]
        rate = pass_rate(read_evaluation(job.directory.path / EVALUATION_NAME)).mean
        if not check.low <= rate <= check.high:
            warnings.append(
                f"pass rate of {check.stage} on {check.prompts} is {100 * rate:.1f} %, outside the window of "
                f"{100 * check.low:.0f} to {100 * check.high:.0f} % that was fixed in advance"
            )
    return warnings


def _examples(job: Job) -> list[RolloutExample]:
    """Return the first and the last responses that a stage saved."""
    path = job.directory.path / "rollouts.jsonl"
    rows = checked_rows(read_jsonl(path), ResponseRow, str(path)) if path.exists() else []
    half = _EXAMPLES_PER_STAGE // 2
    first_and_last = rows[:half] + rows[max(half, len(rows) - half) :]
    return [
        RolloutExample(job.stage, **{key: value for key, value in row.items() if key != "step"})
        for row in first_and_last
    ]
