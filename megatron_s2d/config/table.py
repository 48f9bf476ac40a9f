"""A paper's table in the report: the arms of its rows, the measurements of its columns, and the paper's figures.

Printed by ``report/paper_table.py``. No torch here.
"""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config


class TableColumn(Config):
    """One measured column: some of the evaluated problems, or the mean of other columns."""

    label: str
    prompts: str | None = Field(None, description="entry of `evaluation.prompts`; by default all problems")
    metric: Literal["avg", "pass", "length"] = Field(
        "avg", description="avg@k or pass@k, k being `samples_per_prompt`; or the mean length of responses, in tokens"
    )
    group: str | None = Field(None, description="key of a row's `arm` if the row's arm differs from column to column")
    average: list[str] = Field(default_factory=list, description="labels of the columns to average in this one")
    paper: str | None = Field(None, description="the paper's column for comparison of the rows' order")

    @pydantic.model_validator(mode="after")
    def _check_one_kind(self) -> TableColumn:
        if self.average and self.prompts is not None:
            raise ValueError("give `prompts` or `average`, not both")
        if self.metric == "length" and self.paper is not None:
            raise ValueError("a column of lengths has no order to compare: remove `paper`")
        return self


class TableRow(Config):
    """One row: an arm (or an arm for each group of columns), and the paper's figures."""

    label: str
    arm: str | dict[str, str] | None = Field(None, description="arm, or group -> arm; null: the row is not run")
    paper: list[float | None] = Field(description="one figure per paper column; null: none")
    note: str = Field("", description="printed after the label, for example why the row is not run")

    def arm_of(self, column: TableColumn) -> str | None:
        """Return the arm that is shown in ``column``."""
        if isinstance(self.arm, dict):
            return None if column.group is None else self.arm.get(column.group)
        return self.arm


class TableConfig(Config):
    """A table of a paper, with its rows in the paper's order."""

    title: str
    paper_columns: list[str] = Field(min_length=1, description="names of the figures in every row's `paper`")
    columns: list[TableColumn] = Field(min_length=1)
    rows: list[TableRow] = Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _check_fits(self) -> TableConfig:
        labels = [column.label for column in self.columns]
        if len(set(labels)) < len(labels):
            raise ValueError("two columns have the same label")
        for column in self.columns:
            for other in column.average:
                if other not in labels or next(c for c in self.columns if c.label == other).average:
                    raise ValueError(f"column '{column.label}' averages '{other}', which is not a measured column")
            if column.paper is not None and column.paper not in self.paper_columns:
                raise ValueError(f"column '{column.label}' names '{column.paper}', which is not among paper_columns")
        for row in self.rows:
            if len(row.paper) != len(self.paper_columns):
                raise ValueError(
                    f"row '{row.label}' has {len(row.paper)} figures and paper_columns {len(self.paper_columns)}"
                )
            groups = {column.group for column in self.columns if column.group is not None}
            if isinstance(row.arm, dict) and set(row.arm) != groups:
                raise ValueError(
                    f"row '{row.label}': set an arm for each group of columns ({', '.join(sorted(groups))})"
                )
        return self
