"""From finished directories to ``RunResults``: arms, contrasts, gates, ledger, examples. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_s2d.artifacts.files import read_jsonl
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.report.contrasts import arm_of, check_matched
from megatron_s2d.report.evaluation import Evaluation, avg_at_k, paired_comparison, read_evaluation
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
    checked: Preflight,
    wall_seconds: float,
    environment: Mapping[str, str],
) -> RunResults:
    """Everything that the report of a finished run shows."""
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
        ledger=checked.ledger.entries(checked.stages),
        rollouts=tuple(example for job in stages for example in _examples(job)),
        environment=environment,
        warnings=(*_gate_warnings(config, jobs), *_dropped_warnings(checked)),
        table=make_table(config, evaluations, _problems(config, checked)),
    )


def _problems(config: WorkflowConfig, checked: Preflight) -> dict[str, list[str]]:
    return {entry: [prompt.id for prompt in checked.prompts[entry]] for entry in config.evaluation.entries}


def compare_arms(
    config: WorkflowConfig, evaluations: Mapping[str, Evaluation]
) -> tuple[tuple[ContrastResult, ...], tuple[RefusedContrast, ...]]:
    """The declared contrasts; those whose arms are not matched are refused with the reason."""
    arms = {name: arm_of(config, name) for name in config.arms}
    found, refused = [], []
    for contrast in config.contrasts:
        try:
            differences = check_matched(contrast, arms)
        except UserError as error:
            refused.append(RefusedContrast(contrast.a, contrast.b, contrast.factor, str(error)))
            continue
        comparison = paired_comparison(
            evaluations[config.arms[contrast.a]], evaluations[config.arms[contrast.b]], seed=config.seed
        )
        found.append(
            ContrastResult(
                contrast.a,
                contrast.b,
                contrast.factor,
                contrast.expect,
                comparison,
                tuple(difference.text for difference in differences),
            )
        )
    return tuple(found), tuple(refused)


def _gate_warnings(config: WorkflowConfig, jobs: Sequence[Job]) -> list[str]:
    found = []
    for job in jobs:
        if job.pass_rate_check is None:
            continue
        gate = config.pass_rate_checks[job.pass_rate_check]
        rate = avg_at_k(read_evaluation(job.directory.path / EVALUATION_NAME)).mean
        if not gate.low <= rate <= gate.high:
            found.append(
                f"pass rate of {gate.stage} on {gate.prompts} is {100 * rate:.1f} %, outside the window of "
                f"{100 * gate.low:.0f} to {100 * gate.high:.0f} % that was fixed in advance"
            )
    return found


def _dropped_warnings(checked: Preflight) -> list[str]:
    long = [
        f"{count} prompts of {name} were longer than max_prompt_length and left out"
        for name, count in checked.dropped.items()
        if count
    ]
    twice = [
        f"{count} rows of {name} had an id that came before and were left out"
        for name, count in checked.duplicates.items()
        if count
    ]
    return long + twice


def _examples(job: Job) -> list[RolloutExample]:
    path = job.directory.path / "rollouts.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    picked = (
        rows[: _EXAMPLES_PER_STAGE // 2] + rows[max(_EXAMPLES_PER_STAGE // 2, len(rows) - _EXAMPLES_PER_STAGE // 2) :]
    )
    return [RolloutExample(job.stage, **{key: value for key, value in row.items() if key != "step"}) for row in picked]
