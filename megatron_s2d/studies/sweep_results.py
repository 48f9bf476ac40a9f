"""Collects the table, contrasts, power laws and efficiencies of a sweep from its finished runs. No torch here."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_s2d.artifacts.stage_directory import StageDirectory
from megatron_s2d.config.hardware import gpu_of
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.stage import TrainingStageConfig
from megatron_s2d.config.sweep import FitConfig, SweepConfig, SweepContrastConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.model_tokenizers import ModelTokenizers
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.layers import model_flops
from megatron_s2d.estimate.stage_time import output_flops
from megatron_s2d.report.evaluation import Evaluation, avg_at_k, paired_comparison, read_evaluation
from megatron_s2d.report.statistics import Estimate, PairedComparison
from megatron_s2d.studies.scaling import Efficiency, Observations, PowerLaw, efficiencies, fit_power_law
from megatron_s2d.studies.sweep import Point
from megatron_s2d.workflow.collect_results import EVALUATION_NAME


@dataclasses.dataclass(frozen=True)
class ArmRow:
    """One arm of one point."""

    point: Point
    arm: str
    accuracy: Estimate
    k: int
    parameters: int  # of the arm's model
    ranks: int
    tokens_per_second: float  # over all steps of the arm's training stages, including sampling
    mfu: float | None  # None if the sweep names no GPU
    peak_memory: int | None  # largest peak of a rank, in bytes; None if the run did not record it
    wall_seconds: float  # of the stages that lead to the arm, including resumes
    evaluation: Evaluation
    losses: np.ndarray  # of the last tenth of the steps of the last training stage


@dataclasses.dataclass(frozen=True)
class ContrastRow:
    """A comparison of two values with everything else equal; seeds are pooled problem by problem."""

    contrast: SweepContrastConfig
    others: Mapping[str, str]  # values of the fixed axes
    seeds: tuple[int, ...]
    comparison: PairedComparison


@dataclasses.dataclass(frozen=True)
class FitRow:
    """A fitted power law, or the reason why it is missing."""

    fit: FitConfig
    others: Mapping[str, str]
    law: PowerLaw | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class SweepResults:
    """Everything that the report of a sweep shows."""

    sweep: SweepConfig
    rows: tuple[ArmRow, ...]
    contrasts: tuple[ContrastRow, ...]
    fits: tuple[FitRow, ...]
    efficiencies: tuple[tuple[str, Mapping[str, str], tuple[Efficiency, ...]], ...]  # stage, fixed axes, rows
    failed: tuple[tuple[str, str], ...]  # point, message


def collect_sweep(sweep: SweepConfig, out: Path, points: Sequence[Point], failed: Mapping[str, str]) -> SweepResults:
    """Collect the results of the finished points; ``failed`` maps the others to messages."""
    finished = [point for point in points if point.name not in failed and (out / point.name / "results.json").exists()]
    rows = [row for point in finished for row in _arm_rows(sweep, point, out / point.name)]
    return SweepResults(
        sweep,
        tuple(rows),
        tuple(row for contrast in sweep.contrasts for row in _contrasts(sweep, contrast, rows)),
        tuple(row for fit in sweep.fits for row in _fits(sweep, fit, rows)),
        tuple(_efficiencies(sweep, out, finished)),
        tuple(failed.items()),
    )


def _spec(config: WorkflowConfig, stage: str, tokenizers: ModelTokenizers) -> ModelSpec:
    model = config.model_of(stage)
    return config.models[model].resolve(len(tokenizers.of_model(model)))


def _arm_rows(sweep: SweepConfig, point: Point, run_dir: Path) -> list[ArmRow]:
    config = point.config
    tokenizers = ModelTokenizers(config, run_dir / "tokenizer")
    rows = []
    for arm, stage in config.arms.items():
        chain = config.chain(stage)
        evaluation = read_evaluation(run_dir / "evaluations" / stage / EVALUATION_NAME)
        summaries = [StageDirectory(run_dir / "stages" / name).finished() for name in chain]
        peaks = [summary["peak_memory"] for summary in summaries if "peak_memory" in summary]
        trained = [name for name in chain if isinstance(config.stages[name], TrainingStageConfig)]
        tokens, seconds, flops = 0.0, 0.0, 0.0
        for name in trained:
            spec = _spec(config, name, tokenizers)
            stage_tokens, stage_seconds = _speed(run_dir, name)
            tokens, seconds = tokens + stage_tokens, seconds + stage_seconds
            flops += stage_tokens * training_flops(spec)
        spec = _spec(config, stage, tokenizers)
        ranks = config.parallel.world_size
        mfu = None if sweep.gpu is None else flops / seconds / ranks / gpu_of(sweep.gpu).bf16_flops
        rows.append(
            ArmRow(
                point=point,
                arm=arm,
                accuracy=avg_at_k(evaluation),
                k=evaluation.k,
                parameters=spec.num_parameters,
                ranks=ranks,
                tokens_per_second=tokens / seconds if seconds else 0.0,
                mfu=mfu,
                peak_memory=max(peaks, default=None),
                wall_seconds=sum(summary["seconds"] for summary in summaries),
                evaluation=evaluation,
                losses=_last_losses(run_dir, trained[-1]) if trained else np.zeros(0),
            )
        )
    return rows


def training_flops(spec: ModelSpec) -> float:
    """Return the FLOPs of training on a token, without attention scores, which depend on the sequence length."""
    return 3 * (model_flops(spec, 1, 0) + output_flops(spec))


def _speed(run_dir: Path, stage: str) -> tuple[float, float]:
    """Return (tokens, seconds) of all steps of a stage."""
    rows = StageDirectory(run_dir / "stages" / stage).metrics()
    tokens = sum(row["tokens_per_second"] * row["timing_s/step"] for row in rows)
    return tokens, sum(row["timing_s/step"] for row in rows)


def _last_losses(run_dir: Path, stage: str) -> np.ndarray:
    losses = [row["loss"] for row in StageDirectory(run_dir / "stages" / stage).metrics() if row["loss"] is not None]
    return np.array(losses[-max(1, len(losses) // 10) :])


def _grouped(sweep: SweepConfig, rows: Sequence[ArmRow], arm: str, free: set[str]) -> list[tuple[dict, list[ArmRow]]]:
    """Group the rows of ``arm`` by the values of all axes that are not ``free``."""
    fixed = [axis for axis in sweep.grid if axis not in free]
    groups: dict[tuple[str, ...], list[ArmRow]] = {}
    for row in rows:
        if row.arm == arm:
            groups.setdefault(tuple(row.point.choice[axis] for axis in fixed), []).append(row)
    return [(dict(zip(fixed, key, strict=True)), group) for key, group in groups.items()]


def _contrasts(sweep: SweepConfig, contrast: SweepContrastConfig, rows: Sequence[ArmRow]) -> list[ContrastRow]:
    contrast_rows = []
    for others, group in _grouped(sweep, rows, contrast.arm, set(contrast.a)):
        sides = []
        for values in (contrast.a, contrast.b):
            labels = {axis: str(value) for axis, value in values.items()}
            sides.append({row.point.seed: row for row in group if labels.items() <= dict(row.point.choice).items()})
        seeds = sorted(set(sides[0]) & set(sides[1]))
        if seeds:
            pooled = [_pooled([side[seed].evaluation for seed in seeds]) for side in sides]
            contrast_rows.append(ContrastRow(contrast, others, tuple(seeds), paired_comparison(*pooled)))
    return contrast_rows


def _pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Join the samples of all seeds as samples of the same problems, in the order of the first."""
    first = evaluations[0]
    for other in evaluations[1:]:
        if set(other.problem_ids) != set(first.problem_ids):
            raise UserError(f"{first.source} and {other.source} have different problems: evaluate both on the same")
    ordered = [first, *(other.of_problems(first.problem_ids) for other in evaluations[1:])]
    return dataclasses.replace(
        first,
        rewards=np.concatenate([item.rewards for item in ordered], axis=1),
        correct=np.concatenate([item.correct for item in ordered], axis=1),
        response_lengths=np.concatenate([item.response_lengths for item in ordered], axis=1),
        finish_reasons=tuple(
            tuple(itertools.chain(*parts)) for parts in zip(*(item.finish_reasons for item in ordered), strict=True)
        ),
    )


def _fits(sweep: SweepConfig, fit: FitConfig, rows: Sequence[ArmRow]) -> list[FitRow]:
    free = {fit.x} if fit.x != "parameters" else set(sweep.grid)
    fit_rows = []
    for others, group in _grouped(sweep, rows, fit.arm, free):
        by_x: dict[float, list[ArmRow]] = {}
        for row in group:
            x = float(row.parameters if fit.x == "parameters" else row.point.choice[fit.x])
            by_x.setdefault(x, []).append(row)
        try:
            observed = [Observations(x, _values(fit, by_x[x])) for x in sorted(by_x)]
            law = fit_power_law(observed, complement=fit.y == "error")
            fit_rows.append(FitRow(fit, others, law))
        except UserError as error:
            fit_rows.append(FitRow(fit, others, None, str(error)))
    return fit_rows


def _values(fit: FitConfig, rows: Sequence[ArmRow]) -> np.ndarray:
    if fit.y == "loss":
        return np.array([row.losses.mean() for row in rows])
    problems = rows[0].evaluation.problem_ids
    return np.stack([row.evaluation.of_problems(problems).rewards.mean(axis=1) for row in rows])


def _efficiencies(sweep: SweepConfig, out: Path, points: Sequence[Point]):
    for item in sweep.efficiency:
        groups: dict[tuple[str, ...], dict[str, list[Point]]] = {}
        fixed = [axis for axis in sweep.grid if axis != item.axis]
        for point in points:
            key = tuple(point.choice[axis] for axis in fixed)
            groups.setdefault(key, {}).setdefault(point.choice[item.axis], []).append(point)
        for key, by_label in groups.items():
            measured = {label: _measured(out, group, item.stage) for label, group in by_label.items()}
            yield item.stage, dict(zip(fixed, key, strict=True)), tuple(efficiencies(measured))


def _measured(out: Path, points: Sequence[Point], stage: str) -> tuple[int, float, float]:
    """Return (ranks, tokens per step, tokens per second) over the points' steps except the first."""
    tokens = seconds = steps = 0.0
    for point in points:
        rows = StageDirectory(out / point.name / "stages" / stage).metrics()
        if len(rows) < 2:
            raise UserError(f"{out / point.name}: stage '{stage}' has {len(rows)} steps; efficiency needs at least 2")
        for row in rows[1:]:
            tokens += row["tokens_per_second"] * row["timing_s/step"]
            seconds += row["timing_s/step"]
            steps += 1
    return points[0].config.parallel.world_size, tokens / steps, tokens / seconds
