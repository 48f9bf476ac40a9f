"""Renders and tokenizes problems, many at a time: templates, chat template, end tokens. Templates: methods.md M7.

The code template is that of G-OPD (arXiv 2602.12125, appendix D). What a first start with millions of rows spends is
spent here, so values are columns (lists, arrays) and no objects of rows. No torch here.

n: problems of a batch.
"""

from __future__ import annotations

import datetime
import functools
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_s2d.config.data import FileSource
from megatron_s2d.config.environment import environment_text, tools_of
from megatron_s2d.config.reward import verifier_text
from megatron_s2d.config.teacher_view import TeacherViewConfig
from megatron_s2d.data.chat_frames import ChatFrame, frame_of
from megatron_s2d.data.columns_of_rows import ProblemColumns, text_array
from megatron_s2d.data.files import Problem
from megatron_s2d.data.prompt_table import schema
from megatron_s2d.data.table_tokens import TEXT_OF
from megatron_s2d.data.tasks import with_context
from megatron_s2d.data.text_columns import joined
from megatron_s2d.data.text_tokens import TextTokens
from megatron_s2d.data.tokenizer import has_conversations, render_all
from megatron_s2d.errors import UserError

if TYPE_CHECKING:
    import pyarrow

TEMPLATES = {
    "math": "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    "code": "{question}\nWrite Python code to solve the problem. Present the code in\n```python\nYour code\n```\n"
    "at the end.\nYou need to think first then write the Python code.",
    "plain": "{question}",
}
_PROBLEMS_AT_ONCE = 512  # that the chat template renders together


class PromptRenderer:
    """Makes prompts of the problems of a source.

    view: as a teacher reads them; ``tokenizer`` has its template. deferred: leave tokens to who reads a prompt, if the
    tokenizer is ``bounded``.
    """

    def __init__(
        self,
        source: FileSource,
        tokenizer: Any,
        date: datetime.date,
        view: TeacherViewConfig | None = None,
        *,
        deferred: bool = False,
    ) -> None:
        self._source, self._tokenizer, self._date = source, tokenizer, date
        self._view = TeacherViewConfig() if view is None else view
        self._tools = tools_of(source.environment)
        template = TEMPLATES.get(source.template, source.template)
        self._template = [(text, column) for text, column, _, _ in string.Formatter().parse(template)]
        self._tokens = TextTokens(tokenizer)
        self._deferred = deferred and self._tokens.bounded

    def __call__(self, problems: Sequence[Problem]) -> pyarrow.RecordBatch:
        """Return prompts as rows of ``schema`` [n]. Raises ``UserError`` for a problem that cannot be rendered."""
        import pyarrow

        columns = ProblemColumns.of(problems)
        texts = self._texts(columns)
        arrays: dict[str, Any] = {"id": columns.ids, "text": texts, "answer": columns.answers}
        if self._source.verifier is None:
            arrays["answer"] = pyarrow.nulls(len(columns), pyarrow.string())
        settings = {
            "domain": self._source.domain,
            "verifier": verifier_text(self._source.verifier),
            "environment": environment_text(self._source.environment),
        }
        arrays |= {
            name: pyarrow.repeat(pyarrow.scalar(value, pyarrow.string()), len(columns))
            for name, value in settings.items()
        }
        arrays |= (self._without_tokens if self._deferred else self._with_tokens)(columns, texts)
        return pyarrow.RecordBatch.from_arrays([arrays[name] for name in schema().names], schema=schema())

    def _with_tokens(self, columns: ProblemColumns, texts: pyarrow.StringArray) -> dict[str, Any]:
        import pyarrow

        prompts = self._tokens.prompts(texts)
        lengths = prompts.value_lengths().to_numpy()
        if not lengths.all():
            raise UserError(f"prompt {columns.ids[int(lengths.argmin())]} is empty")
        return {
            "token_ids": prompts,
            "solution_token_ids": self._tokens.solutions(columns.solutions),
            "solution": pyarrow.nulls(len(columns), pyarrow.string()),
            "key": pyarrow.array(self._tokens.keys(texts, prompts)),
        }

    def _without_tokens(self, columns: ProblemColumns, texts: pyarrow.StringArray) -> dict[str, Any]:
        import pyarrow

        empty = self._tokens.first_empty(texts)
        if empty is not None:
            raise UserError(f"prompt {columns.ids[empty]} is empty")
        if columns.solutions.null_count < len(columns):
            self._tokens.check_solutions()
        none = {name: pyarrow.nulls(len(columns), schema().field(name).type) for name in TEXT_OF}
        return none | {"solution": columns.solutions, "key": pyarrow.array(self._tokens.keys(texts))}

    def _texts(self, problems: ProblemColumns) -> pyarrow.StringArray:
        questions = self._filled(problems)
        view = self._view
        if view.context is not None:
            questions = text_array(
                [
                    with_context(view, _values_of_view(question, problem), problem.id)
                    for question, problem in zip(questions.to_pylist(), problems, strict=True)
                ]
            )
        if any(problems.contexts or ()):
            return self._rendered(problems.contexts, questions, problems.ids)
        if self._system_prompt is None and not self._tools and not has_conversations(self._tokenizer):
            return questions  # as ``render_all`` returns them
        return self._framed(questions, problems.ids)

    def _framed(self, questions: pyarrow.StringArray, ids: pyarrow.StringArray) -> pyarrow.StringArray:
        """Return the conversations of questions alone: in the frame of the chat template, where it has one."""
        import pyarrow

        if self._frame is None:
            return self._rendered(None, questions, ids)
        texts, others = self._frame.texts(questions), self._frame.others(questions)
        if not others[:1].any():
            first = self._rendered(None, questions[:1], ids[:1])
            assert texts[:1] == first, "the chat template and its frame differ"
        if not others.any():
            return texts
        positions = np.flatnonzero(others)
        rendered = self._rendered(None, questions.take(positions), ids.take(positions))
        order = np.arange(len(texts))
        order[positions] = len(texts) + np.arange(len(positions))
        return pyarrow.concat_arrays([texts, rendered]).take(pyarrow.array(order))

    @functools.cached_property
    def _frame(self) -> ChatFrame | None:
        def messages(question: str) -> list[dict[str, str]]:
            return self._messages([], question, "")

        thinking = self._view.enable_thinking
        return frame_of(self._tokenizer, self._date, messages, enable_thinking=thinking, tools=self._tools)

    @property
    def _system_prompt(self) -> str | None:
        return self._source.system_prompt if self._view.system_prompt is None else self._view.system_prompt

    def _rendered(
        self, contexts: list[list[dict[str, str]]] | None, questions: pyarrow.StringArray, ids: pyarrow.StringArray
    ) -> pyarrow.StringArray:
        texts: list[str] = []
        thinking = self._view.enable_thinking
        contexts = [[]] * len(ids) if contexts is None else contexts
        for start in range(0, len(ids), _PROBLEMS_AT_ONCE):
            part = slice(start, start + _PROBLEMS_AT_ONCE)
            conversations = [
                self._messages(context, question, id_)
                for context, question, id_ in zip(
                    contexts[part], questions[part].to_pylist(), ids[part].to_pylist(), strict=True
                )
            ]
            texts += render_all(conversations, self._tokenizer, self._date, enable_thinking=thinking, tools=self._tools)
        return text_array(texts)

    def _filled(self, problems: ProblemColumns) -> pyarrow.StringArray:
        """Put question and columns into the template; not ``str.format``, which reads attributes of values, too."""
        parts: list[Any] = []
        for text, column in self._template:
            parts += [text] if text else []
            if column is not None:
                parts.append(problems.questions if column == "question" else problems.fields[column])
        return joined(parts)

    def _messages(self, context: list[dict[str, str]], question: str, id_: str) -> list[dict[str, str]]:
        messages = [*context, {"role": "user", "content": question}]
        if self._source.system_prompt is not None and messages[0]["role"] == "system":
            raise UserError(f"prompt {id_} already has a system message; remove system_prompt")
        if self._system_prompt is not None:
            if messages[0]["role"] == "system":
                messages = messages[1:]
            messages.insert(0, {"role": "system", "content": self._system_prompt})
        return messages


def _values_of_view(prompt: str, problem: Problem) -> dict[str, str | None]:
    own = {"prompt": prompt, "question": problem.question, "answer": problem.answer, "solution": problem.solution}
    return {**problem.fields, **own}
