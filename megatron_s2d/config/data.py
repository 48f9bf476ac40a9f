"""Data sources: a generated arithmetic task, or JSON and Parquet files. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config, Name

Schema = Literal["columns", "dapo", "deepmath", "gsm8k", "math500", "competition", "humaneval", "mbpp_plus"]
Template = Literal["math", "code", "plain"]


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
    world_seed: int = Field(0, ge=0, description="seed of the corpus's misconceptions")
    misconception_fraction: float = Field(0.25, ge=0, le=1, description="share of facts with one fixed wrong result")
    misconception_rate: float = Field(0.65, ge=0, le=1, description="how often the corpus states that wrong result")
    error_rate: float = Field(
        0.12, ge=0, le=1, description="how often the corpus states another fact with a random result"
    )
    direct_fraction: float = Field(
        0.25, ge=0, le=1, description="share of documents with the answer but without the steps"
    )


class Columns(Config):
    """Names of the columns of a file; null: the file has no such column; ``a.b`` is field b of column a."""

    id: str | None = None
    question: str = "question"
    answer: str | None = "answer"
    solution: str | None = None


class FileSource(Config):
    """Prompts from JSON-lines, JSON or Parquet files."""

    type: Literal["file"] = "file"
    path: Path | Annotated[list[Path], Field(min_length=1)] = Field(
        description="one or several .jsonl, .json or .parquet files"
    )
    schema_: Schema = Field(
        "columns",
        alias="schema",
        description="columns (with the names in `columns`), or a published format: dapo (DAPO-Math-17K), deepmath "
        "(DeepMath-103K), gsm8k, math500, competition (AIME, HMMT), humaneval, mbpp_plus",
    )
    columns: Columns = Columns()
    domain: Name = Field("math", description="selects the teacher, and is reported separately")
    verifier: str | None = Field("math", description="verifier of the answers; null: prompts without labels")
    template: Template = Field("math", description="prompt template around the question (methods.md M7)")
    system_prompt: str | None = None
    min_values: dict[str, float] = Field(
        default_factory=dict, description="column -> smallest value of a row to keep, such as {difficulty: 6}"
    )
    limit: int | None = Field(None, ge=1, description="number of rows to keep, from the first")
    on_duplicate_id: Literal["drop", "error"] = Field(
        "error", description="rows with the id of an earlier row; the published DAPO-Math-17K repeats its rows"
    )
    on_long_prompt: Literal["drop", "error"] = Field(
        "drop", description="prompts longer than lengths.max_prompt_length"
    )

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True)

    @pydantic.model_validator(mode="after")
    def _check_code_layouts(self) -> FileSource:
        if self.schema_ in ("humaneval", "mbpp_plus") and self.verifier not in ("code", None):
            raise ValueError(f"schema {self.schema_} has unit tests as labels: set verifier: code (or null)")
        return self

    @property
    def paths(self) -> list[Path]:
        """All files, in order."""
        return list(self.path) if isinstance(self.path, list) else [self.path]


DataSource = Annotated[TaskSource | FileSource, Field(discriminator="type")]
