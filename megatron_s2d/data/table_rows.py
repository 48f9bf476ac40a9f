"""Rows of an Arrow table by number, and the prompts in them. No torch here.

Arrow's own ``take`` joins the chunks of a column first: all of its text for a few rows, and more than 2 GiB not at all.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_s2d.records import Prompt

if TYPE_CHECKING:
    import pyarrow

FIELDS = tuple(field.name for field in dataclasses.fields(Prompt))
"""Columns of a table of prompts that are fields of ``Prompt``."""


def take_rows(table: pyarrow.Table, rows: np.ndarray) -> pyarrow.Table:
    """Return the rows [n] of a table with these numbers, in their order."""
    import pyarrow

    if len(rows) < 2:
        return table.slice(int(rows[0]) if len(rows) else 0, len(rows))
    batches = table.to_batches()
    ends = np.cumsum([len(batch) for batch in batches])
    positions = np.searchsorted(ends, rows, side="right")
    order = None if (positions[1:] >= positions[:-1]).all() else np.argsort(positions, kind="stable")
    if order is not None:
        rows, positions = rows[order], positions[order]
    used, first = np.unique(positions, return_index=True)
    parts = [
        batches[batch].take(pyarrow.array(part - (ends[batch] - len(batches[batch]))))
        for batch, part in zip(used.tolist(), np.split(rows, first[1:]), strict=True)
    ]
    taken = pyarrow.Table.from_batches(parts, table.schema)
    if order is None:
        return taken
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    return taken.combine_chunks().take(pyarrow.array(back))


def prompt_of(values: dict[str, Any]) -> Prompt:
    """Return the prompt of Arrow scalars, by field."""
    solution = values["solution_token_ids"]
    return Prompt(
        id=values["id"].as_py(),
        token_ids=_ids(values["token_ids"]),
        text=values["text"].as_py(),
        domain=values["domain"].as_py(),
        verifier=values["verifier"].as_py(),
        answer=values["answer"].as_py(),
        solution_token_ids=_ids(solution) if solution.is_valid else None,
        environment=values["environment"].as_py(),
    )


def _ids(scalar: Any) -> np.ndarray:
    return scalar.values.to_numpy().astype(np.int64)
