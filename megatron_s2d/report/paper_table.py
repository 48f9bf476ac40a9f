"""A paper's table with this run's measurements beside its figures, and whether the order of rows agrees.

Two rows of a column count as ordered only if their difference, paired by problem, exceeds 1.96 standard errors; an
average of columns treats the columns' problems as independent. Columns of pass@k and of lengths are shown but not
ordered. No torch here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.table import TableColumn, TableConfig, TableRow
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.formatting import percent, tokens
from megatron_s2d.report.evaluation import Evaluation, avg_at_k, mean_length, pass_at_k

_Z = 1.96


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Pairs of rows whose order in a paper's column is compared with that in a measured one."""

    column: str
    paper: str
    agree: int
    undecided: int  # measured difference within its error
    against: int

    @property
    def sentence(self) -> str:
        """For people."""
        total = self.agree + self.undecided + self.against
        return (
            f"{self.column} beside the paper's {self.paper}: of {total} pairs of rows {self.agree} in the paper's "
            f"order, {self.against} in the other, {self.undecided} too close to call."
        )


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """Cells as text, and the comparison of orders."""

    title: str
    header: list[str]
    rows: list[list[str]]
    agreements: list[Agreement]

    def as_json(self) -> dict[str, Any]:
        """Return the entry of ``results.json``."""
        return dataclasses.asdict(self)


def make_table(
    config: WorkflowConfig, evaluations: Mapping[str, Evaluation], problems: Mapping[str, Sequence[str]]
) -> PaperTable | None:
    """Return the workflow's ``table``, if it has one.

    ``evaluations``: stage -> evaluation; ``problems``: entry of ``evaluation.prompts`` -> ids of its problems.
    """
    table = config.table
    if table is None:
        return None
    by_arm = {arm: evaluations[stage] for arm, stage in config.arms.items()}
    parts = _Parts(table, by_arm, problems)
    header = ["", *(f"{name} (paper)" for name in table.paper_columns), *(column.label for column in table.columns)]
    rows = [
        [
            f"{row.label} ({row.note})" if row.note else row.label,
            *("" if figure is None else f"{figure:.1f}" for figure in row.paper),
            *(parts.cell(row, column) for column in table.columns),
        ]
        for row in table.rows
    ]
    agreements = [parts.agreement(column) for column in table.columns if column.paper and column.metric == "avg"]
    return PaperTable(table.title, header, rows, agreements)


@dataclasses.dataclass(frozen=True)
class _Parts:
    table: TableConfig
    arms: Mapping[str, Evaluation]
    problems: Mapping[str, Sequence[str]]

    def cell(self, row: TableRow, column: TableColumn) -> str:
        """``83.2 ± 1.5``, in per cent or tokens; a dash where the row has no arm in this column."""
        parts = self._columns(column)
        evaluations = [self._evaluation(row, part) for part in parts]
        if any(evaluation is None for evaluation in evaluations):
            return "–"
        if column.metric == "pass":
            estimates = [pass_at_k(evaluation, [evaluation.k])[evaluation.k] for evaluation in evaluations]
        elif column.metric == "length":
            estimates = [mean_length(evaluation) for evaluation in evaluations]
        else:
            estimates = [avg_at_k(evaluation) for evaluation in evaluations]
        mean = sum(estimate.mean for estimate in estimates) / len(estimates)
        errors = [estimate.std_err for estimate in estimates]
        error = None if any(error is None for error in errors) else math.hypot(*errors) / len(errors)
        return tokens(mean, error) if column.metric == "length" else percent(mean, error)

    def agreement(self, column: TableColumn) -> Agreement:
        """All pairs of rows that differ in the paper's column and were measured."""
        index = self.table.paper_columns.index(column.paper)
        counts = {"agree": 0, "undecided": 0, "against": 0}
        for first, second in itertools.combinations(self.table.rows, 2):
            if first.paper[index] is None or second.paper[index] is None or first.paper[index] == second.paper[index]:
                continue
            difference = self._difference(first, second, column)
            if difference is None:
                continue
            mean, error = difference
            if abs(mean) <= _Z * error:
                counts["undecided"] += 1
            else:
                counts["agree" if (mean > 0) == (first.paper[index] > second.paper[index]) else "against"] += 1
        return Agreement(column.label, column.paper, **counts)

    def _difference(self, first: TableRow, second: TableRow, column: TableColumn) -> tuple[float, float] | None:
        """Mean and standard error of first - second; None where one is not measured."""
        means, errors = [], []
        for part in self._columns(column):
            left, right = self._evaluation(first, part), self._evaluation(second, part)
            if left is None or right is None:
                return None
            differences = left.means - right.means  # both in the order of the problems
            means.append(differences.mean())
            errors.append(differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf)
        return float(np.mean(means)), math.hypot(*errors) / len(errors)

    def _columns(self, column: TableColumn) -> list[TableColumn]:
        if not column.average:
            return [column]
        return [other for other in self.table.columns if other.label in column.average]

    def _evaluation(self, row: TableRow, column: TableColumn) -> Evaluation | None:
        """Return the row's evaluation on the column's problems."""
        arm = row.arm_of(column)
        if arm is None:
            return None
        evaluation = self.arms[arm]
        return evaluation if column.prompts is None else evaluation.of_problems(self.problems[column.prompts])
