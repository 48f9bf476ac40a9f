"""How a teacher (or reference) reads a problem: its own chat template, system prompt, context. No torch here.

The response is the student's, token by token; only the prompt in front of it differs.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import Field

from megatron_s2d.config.base import Config

FIELDS = ("prompt", "question", "answer", "solution")
"""What ``context`` may name of every row, beside its columns: the message as the student reads it, and these."""

_PUBLIC = frozenset(("prompt", "question"))


class TeacherViewConfig(Config):
    """The prompt in front of the student's response as a teacher reads it; by default as the student does."""

    chat_template: Literal["student", "teacher"] | Path = Field(
        "student",
        description="student: the one that renders the student's prompts; teacher: that of the teacher's entry of "
        "`models`; or the file of a Jinja chat template",
    )
    enable_thinking: bool = Field(
        False, description="render the prompt for a response that begins with thoughts, with templates that ask for it"
    )
    system_prompt: str | None = Field(
        None, description="the system message, instead of the one of the data; null: that of the data"
    )
    context: str | None = Field(
        None,
        description="the user's message with fields of the row: {prompt} (the message as the student reads it), "
        "{question}, {answer}, {solution}, or any column of the file, such as {feedback}; write other braces twice. "
        "All but prompt and question are labels: the stage uses them. null: the message as the student reads it",
    )
    max_prompt_length: int | None = Field(
        None, ge=1, description="the stage leaves out problems whose prompt has more tokens here; null: no limit"
    )

    @pydantic.model_validator(mode="after")
    def _check_fields(self) -> TeacherViewConfig:
        if self.context is None:
            return self
        try:
            parts = list(string.Formatter().parse(self.context))
        except ValueError as error:
            raise ValueError(f"context: {error}; write braces that are no field twice: {{{{ and }}}}") from None
        for _, field, format_spec, conversion in parts:
            if field is not None and (not field.isidentifier() or format_spec or conversion):
                raise ValueError(
                    f"context: {{{field}}} is not a field of a row ({', '.join(FIELDS)}, or the name of a column); "
                    "write braces that are no field twice: {{ and }}"
                )
        return self

    @property
    def fields(self) -> frozenset[str]:
        """The fields of a row that ``context`` names."""
        parts = string.Formatter().parse(self.context or "")
        return frozenset(field for _, field, _, _ in parts if field is not None)

    @property
    def uses_labels(self) -> bool:
        """Whether the teacher reads labels."""
        return not self.fields <= _PUBLIC

    @property
    def columns(self) -> list[str]:
        """The columns of a file that ``context`` names, beside the fields that every row has."""
        return sorted(self.fields - set(FIELDS))


TeacherViews = TeacherViewConfig | dict[str, TeacherViewConfig]
"""One view for all domains, or domain -> view; other domains are read as the student reads them."""


def view_of(views: TeacherViews | None, domain: str | None) -> TeacherViewConfig | None:
    """Return the view of the problems of ``domain``; None: they are read as the student reads them."""
    return views.get(domain or "") if isinstance(views, Mapping) else views


def all_views(views: TeacherViews | None) -> list[TeacherViewConfig]:
    """Return the views of all domains."""
    if views is None:
        return []
    return list(views.values()) if isinstance(views, dict) else [views]
