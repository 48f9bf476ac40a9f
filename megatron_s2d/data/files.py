"""Problems from JSON-lines and Parquet files: named columns, and the layouts of published data sets.

Left out: templates, tokenizing and the length filter (``data/prompts.py``), and what a label means (``verify``).
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_s2d.config.base import UserError
from megatron_s2d.config.data import FileSource

_ROWS_AT_A_TIME = 1000
_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
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
    messages: list[dict[str, str]] | None  # given as a conversation; None: only the question is given
    question: str
    answer: str | None
    solution: str | None


class _Reader:
    """Columns of one row; a column that is missing or empty is a ``UserError`` that names the file and the row."""

    def __init__(self, row: Mapping[str, Any], path: Path, number: int, schema: str) -> None:
        self.row, self.path, self.number, self.schema = row, path, number, schema

    def get(self, column: str) -> Any:
        if column not in self.row:
            raise UserError(
                f"{self.path}: no column '{column}' for schema {self.schema} (columns: {', '.join(self.row)}); choose "
                "another `schema`, or name the `columns`"
            )
        if self.row[column] is None:
            raise UserError(f"{self.path}: row {self.number + 1}: '{column}' is empty")
        return self.row[column]

    def text(self, column: str | None) -> str | None:
        return None if column is None else str(self.get(column))


def read_problems(source: FileSource) -> tuple[list[Problem], int]:
    """The problems of all files of ``source`` in order, and how many rows were dropped because their id came before.

    Raises ``UserError`` for a missing, empty or unreadable file, a missing column, and (unless
    ``on_duplicate_id: drop``) an id that comes twice.
    """
    found: dict[str, Problem] = {}
    duplicates = 0
    for path in source.paths:
        for number, row in enumerate(_rows(path, source.schema_)):
            if len(found) == source.limit:
                return list(found.values()), duplicates
            problem = _problem(source, row, path, number)
            if problem.id not in found:
                found[problem.id] = problem
            elif source.on_duplicate_id == "drop":
                duplicates += 1
            else:
                raise UserError(
                    f"{path}: row {number + 1}: the id '{problem.id}' comes twice; make ids unique, or keep the first "
                    "of each with on_duplicate_id: drop"
                )
    return list(found.values()), duplicates


def _rows(path: Path, schema: str) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in _KINDS:
        raise UserError(f"{path}: give a .jsonl, .json or .parquet file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    # The arguments of MBPP+ have a type of their own in every row, which a table cannot hold.
    return _json_lines(path) if schema == "mbpp_plus" and path.suffix == ".jsonl" else _table_rows(path)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number + 1}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number + 1}: expected an object, found {type(row).__name__}")
            yield row


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, read by ``datasets`` without a network or a cache that outlives the call."""
    import datasets

    datasets.disable_progress_bars()
    kind = _KINDS[path.suffix]
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.load_dataset(
                kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # datasets wraps whatever its readers raise
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(f"{path}: cannot be read as {kind} ({reason})") from error
    if not len(table):
        raise UserError(f"{path}: no rows")
    for batch in table.with_format("arrow").iter(_ROWS_AT_A_TIME):
        yield from batch.to_pylist()


def _problem(source: FileSource, row: Mapping[str, Any], path: Path, number: int) -> Problem:
    layout = _LAYOUTS[source.schema_]
    id, messages, question, answer, solution = layout(source, _Reader(row, path, number, source.schema_))
    return Problem(f"{path.stem}/{number if id is None else id}", messages, question, answer, solution)


def _columns(source: FileSource, row: _Reader) -> tuple:
    names = source.columns
    return row.text(names.id), None, row.text(names.question), row.text(names.answer), row.text(names.solution)


def _dapo(source: FileSource, row: _Reader) -> tuple:
    """Parquet (``reward_model.ground_truth``) and JSON lines (``label``)."""
    label = row.get("label") if "label" in row.row else row.get("reward_model")["ground_truth"]
    messages = [dict(message) for message in row.get("prompt")]
    if not messages:
        raise UserError(f"{row.path}: row {row.number + 1}: 'prompt' has no messages")
    question = messages[-1]["content"]
    extra = row.row.get("extra_info") or {}
    # With a template of ours the question goes without its own instruction; template plain leaves it as published.
    given = messages if source.template == "plain" else None
    return extra.get("index"), given, _without_instruction(question), str(label), None


def _without_instruction(text: str) -> str:
    instruction, gap, question = text.partition("\n\n")
    if not gap or not instruction.startswith(_DAPO_BEFORE):
        return text
    before, mark, after = question.rpartition(_DAPO_AFTER)
    return before if mark and after.strip() in ("", ".") else question


def _deepmath(source: FileSource, row: _Reader) -> tuple:
    return None, None, row.text("question"), row.text("final_answer"), row.row.get("r1_solution_1")


def _gsm8k(source: FileSource, row: _Reader) -> tuple:
    solution = row.text("answer")
    if "####" not in solution:
        raise UserError(f"{row.path}: row {row.number + 1}: 'answer' has no '####' before the result")
    return None, None, row.text("question"), solution.rpartition("####")[2].strip().replace(",", ""), solution


def _math500(source: FileSource, row: _Reader) -> tuple:
    return row.row.get("unique_id"), None, row.text("problem"), row.text("answer"), row.text("solution")


def _competition(source: FileSource, row: _Reader) -> tuple:
    return row.text("id"), None, row.text("problem"), row.text("answer"), None


def _humaneval(source: FileSource, row: _Reader) -> tuple:
    prompt = row.text("prompt")
    label = {
        "kind": "asserts",
        "setup": prompt + "\n    pass\n",  # imports and helpers stand before the unfinished function
        "entry_point": row.text("entry_point"),
        "tests": row.text("test"),
    }
    return row.text("task_id"), None, prompt, json.dumps(label), _fenced(prompt + row.text("canonical_solution"))


def _mbpp_plus(source: FileSource, row: _Reader) -> tuple:
    """Expected results are those of the reference solution; the published asserts say how results are compared."""
    name, text = row.text("entry_point"), ast.literal_eval(row.text("prompt").strip())
    example, compare = _assert_form(_LEADING_ASSERT.search(row.text("assertion"))[0], name)
    _, compare_in_prompt = _assert_form(_LEADING_ASSERT.search(text)[0], name)
    label = {
        "kind": "reference",
        "entry_point": name,
        "reference": row.text("canonical_solution"),
        "inputs": row.get("base_input") + (row.row.get("plus_input") or []),
        "example": example,
        "compare": compare if compare_in_prompt == "equal" else compare_in_prompt,
        "tolerance": row.get("atol"),
    }
    return row.text("task_id"), None, text.strip(), json.dumps(label), _fenced(row.text("canonical_solution"))


def _assert_form(line: str, name: str) -> tuple[str, str]:
    """(source of the argument list, "equal", "set" or "truth") of ``assert ... name(arguments) ...``."""
    test = ast.parse(line.strip()).body[0].test
    call = next(
        node for node in ast.walk(test) if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name
    )
    arguments = ast.unparse(ast.Tuple(call.args, ast.Load()))
    if isinstance(test, ast.UnaryOp) or test is call:
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
