"""Problems as columns: what reads millions of rows without an object for each. No torch here.

``plain_problems`` reads the usual rows (schema ``columns``, text and whole numbers) of Parquet and JSON lines; all
others, and every row with a mistake, are read one by one by ``data/files.py``, which says what is wrong with them.

n: problems.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from megatron_s2d.config.data import FileSource
from megatron_s2d.data.files import Problem
from megatron_s2d.data.row_ranges import RowRange, parquet_columns, read_lines
from megatron_s2d.data.text_columns import byte_lengths, joined, some_blank

if TYPE_CHECKING:
    import pyarrow

_scan_object = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # of json.loads, without its checks of a call


class ProblemColumns(Sequence[Problem]):
    """Problems [n] whose fields are columns of text [n].

    contexts: None if no problem has messages before its question. answers, solutions: null where a problem has none.
    """

    def __init__(
        self,
        ids: pyarrow.StringArray,
        questions: pyarrow.StringArray,
        answers: pyarrow.StringArray,
        solutions: pyarrow.StringArray,
        fields: Mapping[str, pyarrow.StringArray],
        contexts: list[list[dict[str, str]]] | None = None,
    ) -> None:
        self.ids, self.questions, self.answers, self.solutions = ids, questions, answers, solutions
        self.fields, self.contexts = fields, contexts

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> ProblemColumns:
        """Return the columns of problems, which all have the same ``fields``."""
        if isinstance(problems, ProblemColumns):
            return problems
        names = problems[0].fields if problems else ()
        return cls(
            text_array([problem.id for problem in problems]),
            text_array([problem.question for problem in problems]),
            text_array([problem.answer for problem in problems]),
            text_array([problem.solution for problem in problems]),
            {name: text_array([problem.fields[name] for problem in problems]) for name in names},
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
        (problem,) = self[range(len(self))[index] :][:1]
        return problem

    def __iter__(self) -> Iterator[Problem]:
        columns = (self.ids, self.questions, self.answers, self.solutions, *self.fields.values())
        contexts = [[] for _ in range(len(self))] if self.contexts is None else self.contexts
        for context, id_, question, answer, solution, *fields in zip(
            contexts, *(column.to_pylist() for column in columns), strict=True
        ):
            yield Problem(id_, context, question, answer, solution, dict(zip(self.fields, fields, strict=True)))

    def sizes(self) -> np.ndarray:
        """Return the bytes of question, answer and solution of each problem, int64 [n]."""
        return sum(map(byte_lengths, (self.questions, self.answers, self.solutions)), np.zeros(len(self), np.int64))


def text_array(values: Sequence[str | None]) -> pyarrow.StringArray:
    """Return texts as a column."""
    import pyarrow

    return pyarrow.array(values, pyarrow.string())


def plain_problems(source: FileSource, rows: RowRange, prefix: str) -> tuple[ProblemColumns, np.ndarray] | None:
    """Return the problems of a range and the numbers of their rows, from 1; ``prefix`` begins the ids.

    None if a row has to be looked at by itself: another schema than ``columns``, ``min_values``, nested columns, a
    value that is missing, blank, no text and no whole number, or a line that is no object.
    """
    import pyarrow

    if source.schema_ != "columns" or source.min_values:
        return None
    names = source.columns
    answer = None if source.verifier is None else names.answer
    wanted = {"id": names.id, "question": names.question, "answer": answer, "solution": names.solution}
    wanted |= {f"field {column}": column for column in source.template_columns}
    read = [column for column in dict.fromkeys(wanted.values()) if column is not None]
    texts = _parquet(rows, read) if rows.path.suffix == ".parquet" else _json_lines(rows, read)
    if texts is None:
        return None
    count = len(next(iter(texts.values())))
    numbers = np.arange(rows.first_row, rows.first_row + count)
    empty = pyarrow.nulls(count, pyarrow.string())
    columns = {name: empty if column is None else texts[column] for name, column in wanted.items()}
    ids = pyarrow.array(numbers).cast(pyarrow.string()) if names.id is None else columns["id"]
    fields = {column: columns[f"field {column}"] for column in source.template_columns}
    problems = ProblemColumns(
        joined([f"{prefix}/", ids]), columns["question"], columns["answer"], columns["solution"], fields
    )
    return problems, numbers + 1


def _parquet(rows: RowRange, read: list[str]) -> dict[str, pyarrow.StringArray] | None:
    """Return the columns ``read`` as text; None if one of their values is no text with other characters than blanks
    and no whole number.
    """
    table = parquet_columns(rows, read)
    if table is None:
        return None
    texts: dict[str, pyarrow.StringArray] = {}
    for name in read:
        column = _as_text(table.column(name))
        if column is None:
            return None
        texts[name] = column
    return texts


def _as_text(column: pyarrow.ChunkedArray) -> pyarrow.StringArray | None:
    import pyarrow
    from pyarrow import types

    if column.null_count:
        return None
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (types.is_string(column.type) or types.is_large_string(column.type) or types.is_integer(column.type)):
        return None
    try:
        text = column.cast(pyarrow.string()).combine_chunks()
        text.validate(full=True)  # a file may hold any bytes
    except pyarrow.ArrowInvalid:
        return None
    return None if some_blank(text) else text


def _json_lines(rows: RowRange, read: list[str]) -> dict[str, pyarrow.StringArray] | None:
    """Return the values of ``read`` of each line; None if one is no object, lacks a column, or as for Parquet."""
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
        texts = {column: _texts([row[column] for row in objects]) for column in read}
    except (ValueError, KeyError, StopIteration, RecursionError):
        return None
    return None if any(column is None for column in texts.values()) else texts


def _texts(values: list[Any]) -> pyarrow.StringArray | None:
    """Return values as ``_Row.text`` does; None if one is neither text with other characters than blanks nor whole."""
    kinds = set(map(type, values))
    if kinds - {str, int}:
        return None
    texts = text_array(values if kinds <= {str} else list(map(str, values)))  # UnicodeEncodeError: a lone surrogate
    return None if some_blank(texts) else texts
