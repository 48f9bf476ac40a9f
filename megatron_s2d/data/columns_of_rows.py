"""Problems as columns: what reads millions of rows without an object for each. No torch here.

``plain_problems`` reads the usual rows (schema ``columns``, text and whole numbers) of Parquet and JSON lines; all
others, and every row with a mistake, are read one by one by ``data/files.py``, which says what is wrong with them.

n: problems.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from megatron_s2d.config.data import FileSource
from megatron_s2d.data.files import Problem
from megatron_s2d.data.row_ranges import RowRange, parquet_columns, read_lines

_scan_object = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # of json.loads, without its checks of a call


class ProblemColumns(Sequence[Problem]):
    """Problems [n] whose fields are lists [n] of their values.

    contexts: None if no problem has messages before its question. answers, solutions: None where a problem has none.
    """

    def __init__(
        self,
        ids: list[str],
        questions: list[str],
        answers: list[Any],
        solutions: list[Any],
        fields: Mapping[str, list[str]],
        contexts: list[list[dict[str, str]]] | None = None,
    ) -> None:
        self.ids, self.questions, self.answers, self.solutions = ids, questions, answers, solutions
        self.fields, self.contexts = fields, contexts

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> ProblemColumns:
        """Return the columns of problems, which all have the same ``fields``."""
        names = problems[0].fields if problems else ()
        return cls(
            [problem.id for problem in problems],
            [problem.question for problem in problems],
            [problem.answer for problem in problems],
            [problem.solution for problem in problems],
            {name: [problem.fields[name] for problem in problems] for name in names},
            [problem.context for problem in problems],
        )

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> ProblemColumns: ...
    def __getitem__(self, index: int | slice) -> Problem | ProblemColumns:
        if isinstance(index, slice):
            return ProblemColumns(
                self.ids[index],
                self.questions[index],
                self.answers[index],
                self.solutions[index],
                {name: values[index] for name, values in self.fields.items()},
                None if self.contexts is None else self.contexts[index],
            )
        return Problem(
            self.ids[index],
            [] if self.contexts is None else self.contexts[index],
            self.questions[index],
            self.answers[index],
            self.solutions[index],
            {name: values[index] for name, values in self.fields.items()},
        )

    def __iter__(self) -> Iterator[Problem]:
        return map(self.__getitem__, range(len(self)))

    def sizes(self) -> np.ndarray:
        """Return the characters of question, answer and solution of each problem, int64 [n]."""
        sizes = np.array(list(map(len, self.questions)), dtype=np.int64)
        for values in (self.answers, self.solutions):
            sizes += np.array([0 if value is None else len(value) for value in values], dtype=np.int64)
        return sizes


def plain_problems(source: FileSource, rows: RowRange, prefix: str) -> tuple[ProblemColumns, np.ndarray] | None:
    """Return the problems of a range and the numbers of their rows, from 1; ``prefix`` begins the ids.

    None if a row has to be looked at by itself: another schema than ``columns``, ``min_values``, nested columns, a
    value that is missing, blank, no text and no whole number, or a line that is no object.
    """
    if source.schema_ != "columns" or source.min_values:
        return None
    names = source.columns
    answer = None if source.verifier is None else names.answer
    wanted = {"id": names.id, "question": names.question, "answer": answer, "solution": names.solution}
    wanted |= {f"field {column}": column for column in source.template_columns}
    read = [column for column in dict.fromkeys(wanted.values()) if column is not None]
    columns = _parquet(rows, read) if rows.path.suffix == ".parquet" else _json_lines(rows, read)
    if columns is None:
        return None
    texts = {column: _texts(values) for column, values in columns.items()}
    if any(values is None for values in texts.values()):
        return None
    count = len(next(iter(columns.values())))
    numbers = range(rows.first_row, rows.first_row + count)

    def column_of(name: str) -> list[Any]:
        column = wanted[name]
        return [None] * count if column is None else texts[column]  # type: ignore[return-value]

    ids = [f"{prefix}/{id_}" for id_ in (numbers if names.id is None else column_of("id"))]
    fields = {column: column_of(f"field {column}") for column in source.template_columns}
    problems = ProblemColumns(ids, column_of("question"), column_of("answer"), column_of("solution"), fields)
    return problems, np.arange(numbers.start + 1, numbers.stop + 1)


def _parquet(rows: RowRange, read: list[str]) -> dict[str, list[Any]] | None:
    table = parquet_columns(rows, read)
    return None if table is None else {name: table.column(name).to_pylist() for name in read}


def _json_lines(rows: RowRange, read: list[str]) -> dict[str, list[Any]] | None:
    """Return the values of ``read`` of each line; None if one is no object, or lacks a column."""
    if rows.byte_range is None:
        return None
    objects = []
    try:
        for line in read_lines(rows).split(b"\n"):
            text = line.decode().rstrip(" \r\t")
            if text:
                value, end = _scan_object(text, 0)
                if end != len(text) or type(value) is not dict:
                    return None
                objects.append(value)
        return {column: [row[column] for row in objects] for column in read}
    except (ValueError, KeyError, StopIteration, RecursionError):
        return None


def _texts(values: list[Any]) -> list[str] | None:
    """Return values as ``_Row.text`` does; None if one is neither text with other characters than blanks nor whole."""
    kinds = set(map(type, values))
    if kinds - {str, int}:
        return None
    texts = values if kinds <= {str} else list(map(str, values))
    try:
        "".join(texts).encode()  # a lone surrogate, which JSON can hold, is no text
    except UnicodeEncodeError:
        return None
    return texts if all(map(str.strip, texts)) else None
