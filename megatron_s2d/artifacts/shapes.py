"""Shapes of the JSON files of a run directory, checked when they are read: people edit, merge and truncate them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic

from megatron_s2d.errors import UserError


class Shape(pydantic.BaseModel):
    """Base of the shapes: no conversions, further keys are allowed."""

    model_config = pydantic.ConfigDict(strict=True, extra="allow")


class Lineage(Shape):
    """``lineage.json`` of a stage."""

    inputs: dict[str, str]  # job id -> key
    seeds: dict[str, Any]
    code: dict[str, Any]
    libraries: dict[str, Any]
    resumed: list[Any]
    started: str
    finished: str | None


class Finished(Shape):
    """``finished.json`` of a stage."""

    seconds: pydantic.FiniteFloat
    key: str = ""
    outputs: dict[str, str] = {}  # file or folder -> digest
    peak_memory: pydantic.FiniteFloat | None = None


class MetricsRow(Shape):
    """A row of ``metrics.jsonl``: numbers by name, null where a value is not finite."""

    __pydantic_extra__: dict[str, float | None]

    step: int


class ValidationSet(Shape):
    """Means over the problems of one data set of a validation, and their standard errors."""

    pass_rate: pydantic.FiniteFloat
    pass_rate_std_err: pydantic.FiniteFloat | None  # None for a single problem
    reward: pydantic.FiniteFloat
    reward_std_err: pydantic.FiniteFloat | None
    response_length: pydantic.FiniteFloat
    truncated_fraction: pydantic.FiniteFloat
    num_prompts: int
    samples_per_prompt: int


class ValidationRow(Shape):
    """A row of ``validation.jsonl``: a validation inside a stage."""

    step: int  # 0: before training
    data: dict[str, ValidationSet]  # by the name of the curve
    kl: pydantic.FiniteFloat | None  # to the teacher, over the steps since the last validation
    best: bool  # whether it was the best one then; false if none is chosen
    ended: str | None  # the rule that ended the stage
    seconds: pydantic.FiniteFloat


class ResponseToken(Shape):
    """A token of a row of ``rollouts.jsonl``."""

    text: str
    advantage: float | None = None
    log_ratio: float | None = None
    student_log_prob: float | None = None
    teacher_log_prob: float | None = None


class ResponseRow(Shape):
    """A row of ``rollouts.jsonl``."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    step: int
    problem_id: str
    prompt: str
    response: str
    episode: list[dict[str, str]] | None = None  # role and text of each part of a conversation; None: a single response
    answer: str | None
    reward: pydantic.FiniteFloat | None
    verifier_label: str
    verifier_detail: str | None = None
    finish_reason: str
    tokens: list[ResponseToken] = []


class GradedResponse(Shape):
    """A row of ``responses.jsonl`` of an evaluation, or of a file of ``validation/step_*``."""

    step: int
    problem_id: str
    sample: int
    response: str
    reward: pydantic.FiniteFloat | None
    verifier_label: str
    verifier_detail: str | None = None
    finish_reason: str


class EvaluationRow(Shape):
    """A row of ``evaluation.jsonl``: a problem with one entry for each of its samples."""

    problem_id: str
    domain: str
    rewards: list[pydantic.FiniteFloat]
    correct: list[bool] | None = None  # which rewards count as correct; None: those of 1
    response_lengths: list[pydantic.FiniteFloat]
    finish_reasons: list[str]
    verifier_labels: list[str] | None = None  # verdicts; None in files from before the field existed


class Results(Shape):
    """The part of ``results.json`` that is read again."""

    wall_seconds: pydantic.FiniteFloat


class RunConfig(Shape):
    """The part of a run's ``config.json`` that is read without the rest."""

    arms: dict[str, str]


def checked(value: Any, shape: type[Shape], location: str) -> Any:
    """Return ``value`` unchanged; raise ``UserError`` with the place of the first difference from ``shape``."""
    try:
        shape.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise UserError(f"{location}: damaged file, {key + ': ' if key else ''}{message}") from None
    return value


def checked_rows(rows: Sequence[Any], shape: type[Shape], path: str) -> list[Any]:
    """Return the rows of a JSON-lines file unchanged; raise ``UserError`` as ``checked`` does, with the line."""
    return [checked(row, shape, f"{path}:{number}") for number, row in enumerate(rows, 1)]
