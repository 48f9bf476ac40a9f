"""``s2d eval``: prints the accuracies of finished evaluations, or compares two of them in pairs. No torch here."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_s2d.artifacts.files import read_json_object
from megatron_s2d.artifacts.shapes import RunConfig, checked
from megatron_s2d.errors import UserError
from megatron_s2d.formatting import percent, points
from megatron_s2d.report.evaluation import Evaluation, paired_comparison, read_evaluation
from megatron_s2d.report.results import ArmResult, shares_text
from megatron_s2d.workflow.collect_results import EVALUATION_NAME


def read_evaluations(path: Path, arm: str | None) -> dict[str, Evaluation]:
    """Return name -> evaluation of a file, of one arm (or stage) of a run, or of all arms of a run."""
    if path.is_file():
        return {arm or path.stem: read_evaluation(path)}
    if not (path / "config.json").exists():
        raise UserError(f"{path}: neither a run directory nor an evaluation.jsonl file")
    config = path / "config.json"
    if not (path / "stages").is_dir() and "architectures" in read_json_object(config):
        raise UserError(f"{path}: a model, not a run: s2d eval --model {path} --data FILE evaluates it")
    arms: dict[str, str] = checked(read_json_object(config), RunConfig, str(config))["arms"]
    if arm is not None:
        return {arm: _read(path, arms.get(arm, arm), arm)}
    stages = set(_evaluated_stages(path))
    evaluations = {name: _read(path, stage, name) for name, stage in arms.items() if stage in stages}
    evaluations |= {stage: _read(path, stage, stage) for stage in sorted(stages - set(arms.values()))}
    if not evaluations:
        raise UserError(f"{path}: no evaluation has finished; run the workflow again to complete it")
    return evaluations


def _evaluated_stages(run_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in (run_dir / "evaluations").glob(f"*/{EVALUATION_NAME}"))


def _read(run_dir: Path, stage: str, name: str) -> Evaluation:
    path = run_dir / "evaluations" / stage / EVALUATION_NAME
    if not path.exists():
        stages = ", ".join(_evaluated_stages(run_dir)) or "none"
        raise UserError(f"{run_dir}: no finished evaluation of '{name}' (evaluated stages: {stages})")
    return read_evaluation(path)


def print_evaluations(path: Path, arm: str | None, *, as_json: bool, console: Console) -> None:
    """Print avg@k and pass@k with standard errors."""
    evaluations = read_evaluations(path, arm)
    results = [ArmResult.from_evaluation(name, name, evaluation) for name, evaluation in evaluations.items()]
    if as_json:
        print(json.dumps({result.name: result.as_json() for result in results}, indent=1))
        return
    table = Table("arm", "avg@k, %", "k", "problems", "pass@k, %", "tokens", "truncated", "verdicts")
    for result in results:
        pass_at_k = result.pass_at_k[max(result.pass_at_k)]
        table.add_row(
            result.name,
            percent(result.avg.mean, result.avg.std_err),
            str(result.k),
            str(result.avg.num_problems),
            percent(pass_at_k.mean, pass_at_k.std_err),
            f"{result.response_length:.1f}",
            f"{100 * result.truncated_fraction:.1f} %",
            shares_text(result.verdicts),
        )
    console.print(table)


def print_comparison(
    first: tuple[Path, str | None], second: tuple[Path, str | None], *, as_json: bool, console: Console
) -> None:
    """Print first minus second, paired by problem, for every arm that both have (or for the two named arms).

    The last column is the number of problems that show a difference of 5 points (p 0.05, power 80 %).
    """
    left, right = read_evaluations(*first), read_evaluations(*second)
    pairs = [(name, name) for name in left if name in right]
    if first[1] is not None and second[1] is not None:
        pairs = [(first[1], second[1])]
    if not pairs:
        raise UserError(
            f"{first[0]} and {second[0]} have no arm in common; name one of each with --arm and --against-arm"
        )
    rows = {f"{a} - {b}" if a != b else a: paired_comparison(left[a], right[b]) for a, b in pairs}
    if as_json:
        print(json.dumps({name: vars(row) for name, row in rows.items()}, indent=1))
        return
    table = Table("difference", "points", "interval", "p", "problems", "for 5 points")
    for name, row in rows.items():
        low, high = row.interval
        table.add_row(
            name,
            points(row.difference, row.std_err),
            f"{points(low)} to {points(high)}",
            f"{row.p_value:.3f}",
            str(row.num_problems),
            "-" if (needed := row.problems_needed()) is None else f"{needed:,}",
        )
    console.print(table)
