"""Turns rows of files into problems: named columns, or the schemas of published data sets.

``data/row_ranges.py`` reads the rows. Templates, tokenization and the length filter are in ``data/prompts.py``;
``verify`` interprets labels.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_s2d.config.data import FileSource
from megatron_s2d.data.row_ranges import RowRange, parse_json, rows_in
from megatron_s2d.errors import UserError

# DAPO-Math-17K has an instruction around the question; the rest of its first line varies.
_DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
)
_DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:"'
# Eurus-2-RL-Data ends its questions with one of these; the place of the line breaks varies.
_EURUS_INSTRUCTION = re.compile(
    r"\s*(Write Python code to solve the problem\. Present the code in\s*```python\s*Your code\s*```\s*at the end\."
    r"|Present the answer in LaTex format: \\boxed\{Your answer\})\s*\Z"
)
_LEADING_ASSERT = re.compile(r"^\s*assert\b.*", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of a data set in the common form of all schemas."""

    id: str  # unique within the source
    context: list[dict[str, str]]  # messages (role, content) before the question; usually empty
    question: str
    answer: str | None  # None if the source has no verifier
    solution: str | None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # columns that the template names


@dataclasses.dataclass(frozen=True)
class _Row:
    """The columns of one row; ``a.b`` is field b of column a. Errors are ``UserError`` with the file and the row."""

    source: FileSource
    columns: Mapping[str, Any]
    path: Path
    number: int  # from 1

    def error(self, message: str) -> UserError:
        return UserError(f"{self.path}: row {self.number}: {message}")

    def find(self, column: str) -> Any:
        """Return the value, or None if it is missing."""
        if column in self.columns:
            return self.columns[column]
        value: Any = self.columns
        for part in column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def get(self, column: str) -> Any:
        """Return the value; raise ``UserError`` if it is missing or empty."""
        value = self.find(column)
        if value is None and column.partition(".")[0] not in self.columns:
            raise self.error(
                f"no column '{column}' for schema {self.source.schema_} (columns: {', '.join(self.columns)}); choose "
                "another `schema`, or set `columns`"
            )
        blank = isinstance(value, str) and not value.strip()
        if value is None or blank or (isinstance(value, float) and math.isnan(value)):
            raise self.error(f"'{column}' is empty")
        return value

    def text(self, column: str) -> str:
        """Return text unchanged, and a number without an exponent, which would read as a product with e."""
        value = self.get(column)
        if isinstance(value, bool):
            return str(value)
        if isinstance(value, (int, float, Decimal)):
            if not math.isfinite(value):
                raise self.error(f"'{column}' is {value}: only finite numbers are labels")
            return format(Decimal(str(value)), "f")
        if not isinstance(value, str):
            raise self.error(f"'{column}' must be text or a number, not {type(value).__name__}")
        return self.unicode(column, value)

    def unicode(self, column: str, value: str) -> str:
        """Return text unchanged; raise ``UserError`` for half of a surrogate pair, which JSON can hold."""
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(f"'{column}' is not valid Unicode (lone surrogate)") from None
        return value

    def id(self, column: str) -> str | None:
        """Return an id; None if it is missing, so that the row's number takes its place."""
        value = self.find(column)
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        return None if missing else self.text(column)

    def as_number(self, column: str) -> float:
        value = self.get(column)
        if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
            raise self.error(f"'{column}' must be a number, not {type(value).__name__}")
        if not math.isfinite(value):
            raise self.error(f"'{column}' is {value}, not a finite number")
        return float(value)

    def label(self, column: str) -> str | None:
        """Return the text that the verifier needs; None if the source has no verifier.

        Unit tests may also be lists and objects, as Parquet and JSON have them.
        """
        if self.source.verifier is None:
            return None
        value = self.get(column)
        takes_data = not isinstance(self.source.verifier, str) or self.source.verifier == "code"
        if takes_data and isinstance(value, (list, Mapping)):
            return json.dumps(value, default=str)
        return self.text(column)


def rows_of(
    source: FileSource, rows: RowRange, prefix: str, chosen: Collection[int] | None = None
) -> Iterator[tuple[_Row, Problem]]:
    """Yield the rows of a range that ``min_values`` keeps, with their problems; ``prefix`` begins the ids.

    chosen: numbers (from 1) of the rows to yield; None: all. Raises ``UserError`` for an unreadable file, a missing
    column and a value of the wrong type.
    """
    schema = _SCHEMAS[source.schema_]
    for number, columns in enumerate(rows_in(rows), rows.first_row):
        if chosen is not None and number + 1 not in chosen:
            continue
        row = _Row(source, columns, rows.path, number + 1)
        if any(row.as_number(column) < minimum for column, minimum in source.min_values.items()):
            continue
        id, *fields = schema(row)
        extra = {column: row.text(column) for column in source.template_columns}
        yield row, Problem(f"{prefix}/{number if id is None else id}", *fields, extra)


def _columns(row: _Row) -> tuple:
    names = row.source.columns
    answer, solution = names.answer, names.solution
    return (
        None if names.id is None else row.text(names.id),
        [],
        row.text(names.question),
        None if answer is None else row.label(answer),
        None if solution is None else row.text(solution),
    )


def _dapo(row: _Row) -> tuple:
    """Read the Parquet form (label in ``reward_model.ground_truth``) and the JSON-lines form (label in ``label``)."""
    *context, question = _messages(row, "prompt")
    if question["role"] != "user":
        raise row.error(f"the last message of 'prompt' is from the {question['role']}, not from the user")
    label = row.label("reward_model.ground_truth" if row.find("label") is None else "label")
    # Our templates replace the published instruction; template plain preserves it.
    plain = row.source.template == "plain"
    text = question["content"] if plain else _without_instruction(question["content"])
    return row.id("extra_info.index"), context, text, label, None


def _eurus(row: _Row) -> tuple:
    """Read the published form; our templates replace its system message and the instruction after the question."""
    *context, question = _messages(row, "prompt")
    if question["role"] != "user":
        raise row.error(f"the last message of 'prompt' is from the {question['role']}, not from the user")
    text, label = question["content"], row.label("reward_model.ground_truth")
    if row.source.template != "plain":
        context = [message for message in context if message["role"] != "system"]
        text = _EURUS_INSTRUCTION.sub("", text)
    return None, context, text, label, None


def _messages(row: _Row, column: str) -> list[dict[str, str]]:
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise row.error(f"'{column}' is not a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise row.error(f"a message of '{column}' lacks text for role or content")
    return [{key: row.unicode(column, message[key]) for key in ("role", "content")} for message in messages]


def _without_instruction(text: str) -> str:
    instruction, gap, question = text.partition("\n\n")
    if not gap or not instruction.startswith(_DAPO_PREFIX):
        return text
    text_before, suffix, text_after = question.rpartition(_DAPO_SUFFIX)
    return text_before if suffix and text_after.strip() in ("", ".") else question


def _deepmath(row: _Row) -> tuple:
    solution = None if row.find("r1_solution_1") is None else row.text("r1_solution_1")
    return None, [], row.text("question"), row.label("final_answer"), solution


def _gsm8k(row: _Row) -> tuple:
    solution = row.text("answer")
    if "####" not in solution:
        raise row.error("'answer' has no '####' before the result")
    return None, [], row.text("question"), solution.rpartition("####")[2].strip().replace(",", ""), solution


def _math500(row: _Row) -> tuple:
    return row.id("unique_id"), [], row.text("problem"), row.label("answer"), row.text("solution")


def _competition(row: _Row) -> tuple:
    return row.text("id"), [], row.text("problem"), row.label("answer"), None


def _humaneval(row: _Row) -> tuple:
    prompt = row.text("prompt")
    label = {
        "kind": "asserts",
        "setup": prompt + "\n    pass\n",  # the prompt: imports, helpers and the unfinished function
        "entry_point": row.text("entry_point"),
        "tests": row.text("test"),
    }
    return row.text("task_id"), [], prompt, json.dumps(label), _fenced(prompt + row.text("canonical_solution"))


def _mbpp_plus(row: _Row) -> tuple:
    """Take expected results from the reference solution, and the kind of comparison from the published asserts."""
    name, reference, inputs = row.text("entry_point"), row.text("canonical_solution"), []
    for column in ("base_input", "plus_input"):
        calls = row.get(column) if column == "base_input" else row.find(column) or []
        if not isinstance(calls, list):
            raise row.error(f"'{column}' is not a list of arguments")
        inputs += calls
    try:
        text = ast.literal_eval(row.text("prompt").strip())
        example, compare = _parse_assert(row.text("assertion"), name)
        _, compare_in_prompt = _parse_assert(text, name)
        tolerance = float(row.get("atol"))
    except (SyntaxError, ValueError, TypeError) as error:
        raise row.error(f"'prompt', 'assertion' or 'atol' does not follow MBPP+ ({error})") from None
    label = {
        "kind": "reference",
        "entry_point": name,
        "reference": reference,
        "inputs": inputs,
        "example": example,
        "compare": compare if compare_in_prompt == "equal" else compare_in_prompt,
        "tolerance": tolerance,
    }
    return row.text("task_id"), [], text.strip(), json.dumps(label), _fenced(reference)


def _livecodebench(row: _Row) -> tuple:
    """Read code_generation_lite; the verifier decompresses its private tests without unpickling them."""
    columns = ("public_test_cases", "private_test_cases", "metadata")
    label = None if row.source.verifier is None else json.dumps({column: row.get(column) for column in columns})
    return row.id("question_id"), [], row.text("question_content") + _starter(row), label, None


def _apps(row: _Row) -> tuple:
    """Read APPS and TACO, whose columns ``input_output`` and ``solutions`` are JSON as text."""
    solutions = parse_json((row.find("solutions") or "[]").encode(), f"{row.path}: row {row.number}: solutions")
    solution = _fenced(solutions[0]) if solutions else None
    return row.id("problem_id"), [], row.text("question") + _starter(row), row.label("input_output"), solution


def _starter(row: _Row) -> str:
    """Return what a question says about the form of its program."""
    code = row.find("starter_code") or ""
    if code.strip():
        return f"\n\nStart from this code:\n```python\n{code.strip()}\n```"
    return "\n\nRead from standard input and write to standard output."


def _parse_assert(text: str, name: str) -> tuple[str, str]:
    """Return the argument list and "equal", "set" or "truth" of the first ``assert ... name(arguments) ...``."""
    line = _LEADING_ASSERT.search(text)
    if line is None:
        raise ValueError("no assert")
    test = ast.parse(line[0].strip()).body[0].test
    calls = [node for node in ast.walk(test) if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name]
    if not calls:
        raise ValueError(f"assert without a call of {name}")
    arguments = ast.unparse(ast.Tuple(calls[0].args, ast.Load()))
    if isinstance(test, ast.UnaryOp) or test is calls[0]:
        return arguments, "truth"
    left = test.left if isinstance(test, ast.Compare) else test
    wrapped = isinstance(left, ast.Call) and getattr(left.func, "id", None) == "set"
    return arguments, "set" if wrapped else "equal"


def _fenced(program: str) -> str:
    return f"```python\n{program.strip(chr(10))}\n```"


_SCHEMAS = {
    "columns": _columns,
    "dapo": _dapo,
    "eurus": _eurus,
    "deepmath": _deepmath,
    "gsm8k": _gsm8k,
    "math500": _math500,
    "competition": _competition,
    "humaneval": _humaneval,
    "mbpp_plus": _mbpp_plus,
    "livecodebench": _livecodebench,
    "apps": _apps,
}
