"""Reads problems from JSON, JSON-lines and Parquet files: named columns, or the schemas of published data sets.

Templates, tokenization and the length filter are in ``data/prompts.py``; ``verify`` interprets labels.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_s2d.config.data import FileSource
from megatron_s2d.errors import UserError

_ROWS_PER_BATCH = 1000
_SUFFIXES = (".jsonl", ".json", ".parquet")
# DAPO-Math-17K has an instruction around the question; the rest of its first line varies.
_DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
)
_DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:"'
_LEADING_ASSERT = re.compile(r"^\s*assert\b.*", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of a data set in the common form of all schemas."""

    id: str  # unique within the source
    context: list[dict[str, str]]  # messages (role, content) before the question; usually empty
    question: str
    answer: str | None  # None if the source has no verifier
    solution: str | None


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
            return format(Decimal(str(value)), "f")
        if not isinstance(value, str):
            raise self.error(f"'{column}' must be text or a number, not {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(f"'{column}' is not valid Unicode (lone surrogate)") from None
        return value

    def as_number(self, column: str) -> float:
        value = self.get(column)
        if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
            raise self.error(f"'{column}' must be a number, not {type(value).__name__}")
        return float(value)

    def label(self, column: str) -> str | None:
        """Return the text that the verifier needs; None if the source has no verifier."""
        return None if self.source.verifier is None else self.text(column)


def read_problems(source: FileSource) -> tuple[list[Problem], int]:
    """Return the problems of all files of ``source`` in order, and the number of dropped rows with a repeated id.

    Raises ``UserError`` for a missing, empty or unreadable file, a missing column, a value of the wrong type, and
    (unless ``on_duplicate_id: drop``) a repeated id.
    """
    problems: dict[str, Problem] = {}
    num_duplicates = 0
    schema = _SCHEMAS[source.schema_]
    for path, prefix in zip(source.paths, _id_prefixes(source.paths), strict=True):
        for number, columns in enumerate(_rows(path)):
            if len(problems) == source.limit:
                return list(problems.values()), num_duplicates
            row = _Row(source, columns, path, number + 1)
            if any(row.as_number(column) < minimum for column, minimum in source.min_values.items()):
                continue
            id, *fields = schema(row)
            problem = Problem(f"{prefix}/{number if id is None else id}", *fields)
            if problem.id not in problems:
                problems[problem.id] = problem
            elif source.on_duplicate_id == "drop":
                num_duplicates += 1
            else:
                raise row.error(
                    f"duplicate id '{problem.id}'; make ids unique, or set on_duplicate_id: drop to use the first row "
                    "of each id"
                )
    return list(problems.values()), num_duplicates


def _id_prefixes(paths: Sequence[Path]) -> list[str]:
    """Return the prefixes of ids: the names of the files, with as many folders as make them unique."""
    depths = range(1, max(len(path.parts) for path in paths) + 1)
    for bare, depth in [*((True, depth) for depth in depths), *((False, depth) for depth in depths)]:
        names = ["/".join((path.with_suffix("") if bare else path).parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{max(paths, key=paths.count)}: the file appears twice in `path`")


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: not a .jsonl, .json or .parquet file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: no rows")
    return itertools.chain([first], rows)


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a file with one object per line, or with a list of objects.

    Not through an Arrow table: with one type per column, 2 next to 1.5 becomes 2.0, integers beyond 64 bits become
    floats, and the arguments of MBPP+ do not fit.
    """
    with open(path, "rb") as file:
        is_list = path.suffix == ".json" and file.read(4096).lstrip().startswith(b"[")
        file.seek(0)
        if is_list:
            for number, row in enumerate(_json(file.read(), str(path)), 1):
                yield _mapping(row, f"{path}: row {number}")
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                location = f"{path}: line {number}"
                yield _mapping(_json(line, location), location)


def _json(content: bytes, location: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not valid JSON ({error})") from None


def _mapping(row: Any, location: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{location}: expected an object, got {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file, read by ``datasets`` without network access and without a persistent cache."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.load_dataset(
                "parquet", data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # datasets wraps the exceptions of its readers
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(f"{path}: cannot be read as parquet ({reason})") from error
    try:
        for batch in table.with_format("arrow").iter(_ROWS_PER_BATCH):
            yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: text is not UTF-8 ({error})") from None


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
    return row.find("extra_info.index"), context, text, label, None


def _messages(row: _Row, column: str) -> list[dict[str, str]]:
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise row.error(f"'{column}' is not a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise row.error(f"a message of '{column}' lacks text for role or content")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


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
    return row.find("unique_id"), [], row.text("problem"), row.label("answer"), row.text("solution")


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
    "deepmath": _deepmath,
    "gsm8k": _gsm8k,
    "math500": _math500,
    "competition": _competition,
    "humaneval": _humaneval,
    "mbpp_plus": _mbpp_plus,
}
