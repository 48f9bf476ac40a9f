"""Collects ``RunResults`` from the directories of finished jobs: arms, contrasts, ledger, examples. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.report.contrasts import arm_of, check_matched
from megatron_s2d.report.evaluation import Evaluation, paired_comparison, pass_rate, read_evaluation
from megatron_s2d.report.paper_table import make_table
from megatron_s2d.report.results import (
    ArmResult,
    ContrastResult,
    RefusedContrast,
    RunResults,
    StageRun,
)
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.preflight import Preflight
from megatron_s2d.workflow.run_samples import run_samples

EVALUATION_NAME = "evaluation.jsonl"


def collect_results(
    config: WorkflowConfig,
    jobs: Sequence[Job],
    preflight: Preflight,
    wall_seconds: float,
    environment: Mapping[str, str],
    *,
    live: bool = False,
) -> RunResults:
    """Return everything that the report of a run shows; ``live``: it has not ended, and some jobs are not finished."""
    finished = [job for job in jobs if not live or job.directory.is_finished()]
    evaluations = {
        job.stage: read_evaluation(job.directory.path / EVALUATION_NAME)
        for job in finished
        if not job.is_stage and job.pass_rate_check is None
    }
    if live:  # contrasts and tables need all arms
        config = config.model_copy(update={
            "arms": {arm: stage for arm, stage in config.arms.items() if stage in evaluations},
            "also_evaluate": [stage for stage in config.also_evaluate if stage in evaluations],
            "contrasts": [], "table": None,
        })  # fmt: skip
    contrasts, refused = compare_arms(config, evaluations)
    stages = [job for job in jobs if job.is_stage]
    samples = run_samples(jobs, preflight)
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
        stages=tuple(_stage_run(job, live) for job in stages),
        ledger=preflight.ledger.entries(preflight.stages),
        rollouts=samples.examples,
        num_samples=samples.total,
        live=live,
        environment=environment,
        warnings=(*_pass_rate_warnings(config, finished), *preflight.warnings),
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


def _stage_run(job: Job, live: bool) -> StageRun:
    directory = job.directory
    if not live or directory.is_finished():
        return StageRun(job.stage, directory, directory.finished()["seconds"], not job.is_pending, total=job.total)
    state = "running" if directory.path.is_dir() else "waiting"
    seconds = sum(row.get("timing_s/step") or 0.0 for row in directory.metrics())
    return StageRun(job.stage, directory, seconds, reused=False, state=state, total=job.total)
