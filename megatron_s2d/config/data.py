"""Data sources: a generated arithmetic task, JSON and Parquet files, or data sets of a hub. No torch here."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config, Name
from megatron_s2d.config.environment import CalculatorEnvironment, EnvironmentConfig, EnvironmentSetting
from megatron_s2d.config.reward import Verifier, runs_unit_tests

_CODE_SCHEMAS = ("humaneval", "mbpp_plus", "livecodebench", "apps")
Schema = Literal[
    "columns", "dapo", "eurus", "deepmath", "gsm8k", "math500", "competition", "humaneval", "mbpp_plus",
    "livecodebench", "apps",
]  # fmt: skip
TemplateName = Literal["math", "code", "plain"]


class TaskSource(Config):
    """Arithmetic modulo a prime, worked step by step (``data/tasks.py``)."""

    type: Literal["task"] = "task"
    task: Literal["modular_arithmetic"] = "modular_arithmetic"
    split: Literal["pool", "heldout", "eval", "corpus"] = Field(
        description="disjoint sets of problems: pool, heldout and eval are labelled prompts, corpus is the noisy text "
        "of base training"
    )
    num_prompts: int = Field(1024, ge=1, description="number of problems (a corpus is unlimited and ignores it)")
    seed: int = Field(0, ge=0, description="seed of the problems, not of the run")
    modulus: int = Field(17, ge=3, le=997)
    num_operations: int = Field(4, ge=1, le=16)
    operators: tuple[Literal["+", "-", "*"], ...] = Field(
        ("+", "-", "*"),
        min_length=1,
        description="operators that a problem may have; problems keep the numbers that they have among all",
    )
    domain: Name = Field("arithmetic", description="selects the teacher, and is reported separately")
    verifier: Verifier = Field(
        "modular_arithmetic", description="verifier of the answers, or a reward (docs/rewards.md)"
    )
    environment: EnvironmentSetting | None = Field(
        None, description="calculator, retry, or a class of yours (docs/environments.md); null: one turn"
    )
    world_seed: int = Field(0, ge=0, description="seed of the corpus's misconceptions")
    misconception_fraction: float = Field(0.25, ge=0, le=1, description="share of facts with one fixed wrong result")
    misconception_rate: float = Field(0.65, ge=0, le=1, description="how often the corpus states that wrong result")
    error_rate: float = Field(
        0.12, ge=0, le=1, description="how often the corpus states another fact with a random result"
    )
    direct_fraction: float = Field(
        0.25, ge=0, le=1, description="share of documents with the answer but without the steps"
    )
    call_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the documents with steps that write each as a call of the calculator (`12 + 5 = 0`)",
    )

    @pydantic.model_validator(mode="after")
    def _check_environment(self) -> TaskSource:
        if getattr(self.environment, "type", None) == "python":
            raise ValueError("environment python needs a chat model; the task has the calculator")
        return self

    @property
    def resolved_environment(self) -> EnvironmentConfig | None:
        """The environment, with the task's modulus for a calculator without one."""
        if isinstance(self.environment, CalculatorEnvironment) and self.environment.modulus is None:
            return self.environment.model_copy(update={"modulus": self.modulus})
        return self.environment


class Columns(Config):
    """Names of the columns of a file; null: the file has no such column; ``a.b`` is field b of column a."""

    id: str | None = None
    question: str = "question"
    answer: str | None = "answer"
    solution: str | None = None


class RowSource(Config):
    """What is common to all sources of rows: how they are read, rendered, graded and selected."""

    schema_: Schema = Field(
        "columns",
        alias="schema",
        description="columns (with the names in `columns`), or a published format: dapo (DAPO-Math-17K), eurus "
        "(Eurus-2-RL-Data), deepmath (DeepMath-103K), gsm8k, math500, competition (AIME, HMMT), humaneval, mbpp_plus, "
        "livecodebench, apps (also TACO)",
    )
    columns: Columns = Columns()
    domain: Name = Field("math", description="selects the teacher, and is reported separately")
    verifier: Verifier | None = Field(
        "math",
        description="verifier of the answers: math, code, a reward function module:function, the URL of a judge, or "
        "their settings (docs/rewards.md); null: prompts without labels",
    )
    environment: EnvironmentSetting | None = Field(
        None,
        description="what answers the model between its turns: python (a tool), retry, or a class of yours "
        "(docs/environments.md); null: one turn",
    )
    template: TemplateName | str = Field(
        "math",
        description="prompt template around the question (methods.md M7): math, code, plain, or a text with {question} "
        "and columns of the row, such as 'Context: {passage} Question: {question}'; {{ and }} are braces",
    )
    system_prompt: str | None = None
    min_values: dict[str, float] = Field(
        default_factory=dict, description="column -> smallest value of a row to keep, such as {difficulty: 6}"
    )
    skip: int = Field(
        0, ge=0, description="rows to leave out at the beginning, for example those that another entry evaluates on"
    )
    limit: int | None = Field(None, ge=1, description="largest number of rows to keep: the first, or see limit_seed")
    limit_seed: int | None = Field(
        None, ge=0, description="seed of a random sample of `limit` rows, instead of the first ones"
    )
    on_duplicate_id: Literal["drop", "error"] = Field(
        "error", description="rows with the id of an earlier row; the published DAPO-Math-17K repeats its rows"
    )
    on_long_prompt: Literal["drop", "error"] = Field(
        "drop", description="prompts longer than lengths.max_prompt_length"
    )

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True)
    _context_columns: tuple[str, ...] = pydantic.PrivateAttr(())  # no setting: see ``with_context_columns``

    @pydantic.model_validator(mode="after")
    def _check_limit_seed(self) -> RowSource:
        if self.limit_seed is not None and self.limit is None:
            raise ValueError("limit_seed is the seed of a sample of `limit` rows: set limit, or remove limit_seed")
        return self

    @pydantic.model_validator(mode="after")
    def _check_environment(self) -> RowSource:
        kind = getattr(self.environment, "type", None)
        if kind == "calculator":
            raise ValueError("environment calculator is of the embedded task; python runs programs of a chat model")
        if kind == "retry" and self.verifier is None:
            raise ValueError("environment retry grades every attempt: set verifier")
        return self

    @pydantic.model_validator(mode="after")
    def _check_code_layouts(self) -> RowSource:
        is_other = isinstance(self.verifier, str) and not runs_unit_tests(self.verifier)
        if self.schema_ in _CODE_SCHEMAS and is_other:
            raise ValueError(f"schema {self.schema_} has unit tests as labels: set verifier: code (or null)")
        return self

    @pydantic.field_validator("template")
    @classmethod
    def _check_template(cls, value: str) -> str:
        if value in get_args(TemplateName):
            return value
        try:
            parts = list(string.Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"{error}; write {{{{ and }}}} for braces") from None
        columns = [column for _, column, _, _ in parts if column is not None]
        if not columns:
            known = ", ".join(get_args(TemplateName))
            raise ValueError(f"{value!r} is none of {known}, and has no place such as {{question}}")
        for _, column, specification, conversion in parts:
            if column is not None and (not column or specification or conversion):
                raise ValueError("a place is {column}, the name of a column without anything else")
        return value

    @property
    def template_columns(self) -> list[str]:
        """Columns that a template of one's own, or the context of a teacher's view, names beside the question."""
        columns: list[str | None] = []
        if self.template not in get_args(TemplateName):
            columns = [column for _, column, _, _ in string.Formatter().parse(self.template)]
        names = dict.fromkeys([*columns, *self._context_columns])
        return [column for column in names if column is not None and column != "question"]

    def with_context_columns(self, columns: Sequence[str]) -> Self:
        """Return the source with columns that the context of a teacher's view reads, too."""
        source = self.model_copy()
        source._context_columns = tuple(columns)
        return source

    @property
    def resolved_environment(self) -> EnvironmentConfig | None:
        """See ``TaskSource``."""
        return self.environment


class _Files(Config):
    """A base, so that these fields come first."""

    type: Literal["file"] = "file"
    path: Path | Annotated[list[Path], Field(min_length=1)] = Field(
        description="one or several .jsonl, .json, .parquet or .arrow files, or folders of them, such as those of "
        "datasets' save_to_disk"
    )


class FileSource(RowSource, _Files):
    """Prompts from JSON-lines, JSON or Parquet files."""

    @property
    def paths(self) -> list[Path]:
        """All files, in order; a folder stands for its .arrow files, else its .parquet, else its .jsonl files."""
        paths = self.path if isinstance(self.path, list) else [self.path]
        return [file for path in paths for file in _files_of(path)]


def _files_of(path: Path) -> list[Path]:
    for pattern in ("*.arrow", "*.parquet", "*.jsonl") if path.is_dir() else ():
        if files := sorted(path.glob(pattern)):
            return files
    return [path]


class _HubDataSet(Config):
    """As ``_Files``."""

    type: Literal["hub"] = "hub"
    dataset: str = Field(min_length=1, description="owner/name on the hub, or a local folder that `datasets` can load")
    name: str | None = Field(None, description="configuration of the data set, such as main; null: its only one")
    split: str = Field("train", pattern=r"^[\w.-]+$", description="a whole split; skip and limit select rows of it")
    revision: str | None = Field(
        None, description="full hash of a commit (a run without one says the newest); a folder needs none"
    )
    stream_rows: int | None = Field(
        None,
        ge=1,
        description="read only this many rows, the first of the split, over the network; null: download the split",
    )


class HubSource(RowSource, _HubDataSet):
    """Prompts from a data set of the Hugging Face hub, loaded by ``datasets.load_dataset``."""


DataSource = Annotated[TaskSource | FileSource | HubSource, Field(discriminator="type")]
