"""Problems from JSON-lines and Parquet files: named columns, and the layouts of published data sets.

Left out: templates, tokenizing and the length filter (``data/prompts.py``), and what a label means (``verify``).
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

_ROWS_AT_A_TIME = 1000
_SUFFIXES = (".jsonl", ".json", ".parquet")
# DAPO-Math-17K comes with its own instruction around the question; the wording of the rest of the first line varies.
_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
)
_DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:"'
_LEADING_ASSERT = re.compile(r"^\s*assert\b.*", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row as every layout describes it."""

    id: str  # unique within the source
    context: list[dict[str, str]]  # the messages (role, content) before the question; mostly none
    question: str
    answer: str | None  # None where the source has no verifier
    solution: str | None


@dataclasses.dataclass(frozen=True)
class _Row:
    """The columns of one row; ``a.b`` is field b of column a. Each raises ``UserError`` that says where."""

    source: FileSource
    columns: Mapping[str, Any]
    path: Path
    number: int  # from 1

    def error(self, message: str) -> UserError:
        return UserError(f"{self.path}: row {self.number}: {message}")

    def find(self, column: str) -> Any:
        """The value, None where there is none."""
        if column in self.columns:
            return self.columns[column]
        value: Any = self.columns
        for part in column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def get(self, column: str) -> Any:
        value = self.find(column)
        if value is None and column.partition(".")[0] not in self.columns:
            raise self.error(
                f"no column '{column}' for schema {self.source.schema_} (columns: {', '.join(self.columns)}); choose "
                "another `schema`, or name the `columns`"
            )
        blank = isinstance(value, str) and not value.strip()
        if value is None or blank or (isinstance(value, float) and math.isnan(value)):
            raise self.error(f"'{column}' is empty")
        return value

    def text(self, column: str) -> str:
        """Text as it is; a number without an exponent, which would read as a product with e."""
        value = self.get(column)
        if isinstance(value, bool):
            return str(value)
        if isinstance(value, (int, float, Decimal)):
            return format(Decimal(str(value)), "f")
        if not isinstance(value, str):
            raise self.error(f"'{column}' is neither text nor a number but a {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(f"'{column}' is not valid Unicode text (half of a surrogate pair)") from None
        return value

    def number_in(self, column: str) -> float:
        value = self.get(column)
        if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
            raise self.error(f"'{column}' is not a number but a {type(value).__name__}")
        return float(value)

    def label(self, column: str) -> str | None:
        """The text that a verifier needs; None where there is no verifier."""
        return None if self.source.verifier is None else self.text(column)


def read_problems(source: FileSource) -> tuple[list[Problem], int]:
    """The problems of all files of ``source`` in order, and how many rows were dropped because their id came before.

    Raises ``UserError`` for a missing, empty or unreadable file, a missing column, a value of another type, and (unless
    ``on_duplicate_id: drop``) an id that comes twice.
    """
    found: dict[str, Problem] = {}
    duplicates = 0
    layout = _LAYOUTS[source.schema_]
    for path, name in zip(source.paths, _names(source.paths), strict=True):
        for number, columns in enumerate(_rows(path)):
            if len(found) == source.limit:
                return list(found.values()), duplicates
            row = _Row(source, columns, path, number + 1)
            if any(row.number_in(column) < least for column, least in source.min_values.items()):
                continue
            id, *rest = layout(row)
            problem = Problem(f"{name}/{number if id is None else id}", *rest)
            if problem.id not in found:
                found[problem.id] = problem
            elif source.on_duplicate_id == "drop":
                duplicates += 1
            else:
                raise row.error(
                    f"the id '{problem.id}' comes twice; make ids unique, or keep the first of each with "
                    "on_duplicate_id: drop"
                )
    return list(found.values()), duplicates


def _names(paths: Sequence[Path]) -> list[str]:
    """What ids begin with: the names of the files, with as many folders as tell them apart."""
    depths = range(1, max(len(path.parts) for path in paths) + 1)
    for bare, depth in [*((True, depth) for depth in depths), *((False, depth) for depth in depths)]:
        names = ["/".join((path.with_suffix("") if bare else path).parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{max(paths, key=paths.count)}: the file is given twice in `path`")


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: give a .jsonl, .json or .parquet file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: no rows")
    return itertools.chain([first], rows)


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a file: one a line, or a list of them.

    Not through a table: its columns have one type each, which would make 2.0 of a 2 above a 1.5, a float of an integer
    beyond 64 bits, and cannot hold the arguments of MBPP+.
    """
    with open(path, "rb") as file:
        is_list = path.suffix == ".json" and file.read(4096).lstrip().startswith(b"[")
        file.seek(0)
        if is_list:
            for place, row in enumerate(_json(file.read(), str(path))):
                yield _mapping(row, f"{path}: row {place + 1}")
            return
        for place, line in enumerate(file):
            if line.strip():
                where = f"{path}: line {place + 1}"
                yield _mapping(_json(line, where), where)


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None


def _mapping(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, read by ``datasets`` without a network or a cache that outlives the call."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.load_dataset(
                "parquet", data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # datasets wraps whatever its readers raise
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(f"{path}: cannot be read as parquet ({reason})") from error
    try:
        for batch in table.with_format("arrow").iter(_ROWS_AT_A_TIME):
            yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a text is not UTF-8 ({error})") from None


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
    """Parquet (``reward_model.ground_truth``) and JSON lines (``label``)."""
    *context, question = _messages(row, "prompt")
    if question["role"] != "user":
        raise row.error(f"'prompt' ends with a message of the {question['role']}, not of the user")
    label = row.label("reward_model.ground_truth" if row.find("label") is None else "label")
    # With a template of ours the question goes without its own instruction; template plain leaves it as published.
    plain = row.source.template == "plain"
    text = question["content"] if plain else _without_instruction(question["content"])
    return row.find("extra_info.index"), context, text, label, None


def _messages(row: _Row, column: str) -> list[dict[str, str]]:
    found = row.get(column)
    if not isinstance(found, list) or not found:
        raise row.error(f"'{column}' is not a list of messages")
    for message in found:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise row.error(f"a message of '{column}' has no text for role or content")
    return [{"role": message["role"], "content": message["content"]} for message in found]


def _without_instruction(text: str) -> str:
    instruction, gap, question = text.partition("\n\n")
    if not gap or not instruction.startswith(_DAPO_BEFORE):
        return text
    before, mark, after = question.rpartition(_DAPO_AFTER)
    return before if mark and after.strip() in ("", ".") else question


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
        "setup": prompt + "\n    pass\n",  # imports and helpers stand before the unfinished function
        "entry_point": row.text("entry_point"),
        "tests": row.text("test"),
    }
    return row.text("task_id"), [], prompt, json.dumps(label), _fenced(prompt + row.text("canonical_solution"))


def _mbpp_plus(row: _Row) -> tuple:
    """Expected results are those of the reference solution; the published asserts say how results are compared."""
    name, reference, inputs = row.text("entry_point"), row.text("canonical_solution"), []
    for column in ("base_input", "plus_input"):
        found = row.get(column) if column == "base_input" else row.find(column) or []
        if not isinstance(found, list):
            raise row.error(f"'{column}' is not a list of arguments")
        inputs += found
    try:
        text = ast.literal_eval(row.text("prompt").strip())
        example, compare = _assert_form(row.text("assertion"), name)
        _, compare_in_prompt = _assert_form(text, name)
        tolerance = float(row.get("atol"))
    except (SyntaxError, ValueError, TypeError) as error:
        raise row.error(f"'prompt', 'assertion' and 'atol' are not as MBPP+ has them ({error})") from None
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


def _assert_form(text: str, name: str) -> tuple[str, str]:
    """(source of the argument list, "equal", "set" or "truth") of the first ``assert ... name(arguments) ...``."""
    line = _LEADING_ASSERT.search(text)
    if line is None:
        raise ValueError("no line with an assert")
    test = ast.parse(line[0].strip()).body[0].test
    calls = [node for node in ast.walk(test) if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name]
    if not calls:
        raise ValueError(f"an assert without a call of {name}")
    arguments = ast.unparse(ast.Tuple(calls[0].args, ast.Load()))
    if isinstance(test, ast.UnaryOp) or test is calls[0]:
        return arguments, "truth"
    left = test.left if isinstance(test, ast.Compare) else test
    wrapped = isinstance(left, ast.Call) and getattr(left.func, "id", None) == "set"
    return arguments, "set" if wrapped else "equal"


def _fenced(program: str) -> str:
    return f"```python\n{program.strip(chr(10))}\n```"


_LAYOUTS = {
    "columns": _columns,
    "dapo": _dapo,
    "deepmath": _deepmath,
    "gsm8k": _gsm8k,
    "math500": _math500,
    "competition": _competition,
    "humaneval": _humaneval,
    "mbpp_plus": _mbpp_plus,
}
