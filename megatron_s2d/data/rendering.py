"""Renders and tokenizes problems, many at a time: templates, chat template, end tokens. Templates: methods.md M7.

The code template is that of G-OPD (arXiv 2602.12125, appendix D). What a first start with millions of rows spends is
spent here, so values are columns (lists, arrays) and no objects of rows. No torch here.

n: problems of a batch.
"""

from __future__ import annotations

import datetime
import itertools
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_s2d.config.data import FileSource
from megatron_s2d.config.environment import environment_text, tools_of
from megatron_s2d.config.reward import verifier_text
from megatron_s2d.config.teacher_view import TeacherViewConfig
from megatron_s2d.data.columns_of_rows import ProblemColumns
from megatron_s2d.data.files import Problem
from megatron_s2d.data.prompt_table import list_array, prompt_keys, schema
from megatron_s2d.data.tasks import with_context
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
_PROBLEMS_AT_ONCE = 512  # that are rendered and tokenized together


class PromptRenderer:
    """Makes prompts of the problems of a source. view: as a teacher reads them; ``tokenizer`` has its template."""

    def __init__(
        self, source: FileSource, tokenizer: Any, date: datetime.date, view: TeacherViewConfig | None = None
    ) -> None:
        self._source, self._tokenizer, self._date = source, tokenizer, date
        self._view = TeacherViewConfig() if view is None else view
        self._tools = tools_of(source.environment)
        template = TEMPLATES.get(source.template, source.template)
        self._template = [(text, column) for text, column, _, _ in string.Formatter().parse(template)]

    def __call__(self, problems: Sequence[Problem]) -> pyarrow.RecordBatch:
        """Return prompts as rows of ``schema`` [n]. Raises ``UserError`` for a problem that cannot be rendered."""
        import pyarrow

        columns = problems if isinstance(problems, ProblemColumns) else ProblemColumns.of(problems)
        texts: list[str] = []
        prompts, solutions = Tokens(), Tokens()
        for start in range(0, len(columns), _PROBLEMS_AT_ONCE):
            part = columns[start : start + _PROBLEMS_AT_ONCE]
            rendered = self._texts(part)
            prompts.extend(self._prompt_tokens(part.ids, rendered))
            solutions.extend(self._solution_tokens(part.solutions))
            texts += rendered
        values: dict[str, Any] = {"id": columns.ids, "text": texts}
        values["answer"] = [None] * len(columns) if self._source.verifier is None else columns.answers
        settings = {
            "domain": self._source.domain,
            "verifier": verifier_text(self._source.verifier),
            "environment": environment_text(self._source.environment),
        }
        arrays = {name: pyarrow.array(value, pyarrow.string()) for name, value in values.items()}
        arrays |= {
            name: pyarrow.repeat(pyarrow.scalar(value, pyarrow.string()), len(columns))
            for name, value in settings.items()
        }
        arrays |= {"token_ids": prompts.array(), "solution_token_ids": solutions.array()}
        arrays["key"] = pyarrow.array(prompt_keys(prompts.values, prompts.lengths))
        return pyarrow.RecordBatch.from_arrays([arrays[name] for name in schema().names], schema=schema())

    # ------------------------------------------------------------------------------- text

    def _texts(self, problems: ProblemColumns) -> list[str]:
        questions = self._filled(problems)
        view, tools = self._view, self._tools
        if view.context is not None:
            questions = [
                with_context(view, _values_of_view(question, problem), problem.id)
                for question, problem in zip(questions, problems, strict=True)
            ]
        system_prompt = self._source.system_prompt if view.system_prompt is None else view.system_prompt
        if not (
            system_prompt is not None or tools or any(problems.contexts or ()) or has_conversations(self._tokenizer)
        ):
            return questions  # as ``render_all`` returns them
        contexts = problems.contexts or [[]] * len(problems)
        conversations = [
            self._messages(context, question, id_, system_prompt)
            for context, question, id_ in zip(contexts, questions, problems.ids, strict=True)
        ]
        return render_all(conversations, self._tokenizer, self._date, enable_thinking=view.enable_thinking, tools=tools)

    def _filled(self, problems: ProblemColumns) -> list[str]:
        """Put question and columns into the template; not ``str.format``, which reads attributes of values, too."""
        if self._template == [("", "question")]:
            return problems.questions
        parts: list[Sequence[str]] = []
        for text, column in self._template:
            parts.append([text] * len(problems))
            if column is not None:
                parts.append(problems.questions if column == "question" else problems.fields[column])
        return ["".join(pieces) for pieces in zip(*parts, strict=True)]

    def _messages(
        self, context: list[dict[str, str]], question: str, id_: str, system_prompt: str | None
    ) -> list[dict[str, str]]:
        messages = [*context, {"role": "user", "content": question}]
        if self._source.system_prompt is not None and messages[0]["role"] == "system":
            raise UserError(f"prompt {id_} already has a system message; remove system_prompt")
        if system_prompt is not None:
            if messages[0]["role"] == "system":
                messages = messages[1:]
            messages.insert(0, {"role": "system", "content": system_prompt})
        return messages

    # ------------------------------------------------------------------------------- tokens

    def _prompt_tokens(self, ids: Sequence[str], texts: list[str]) -> list[list[int] | None]:
        # A chat template writes the start token itself; plain text needs the tokenizer's special tokens.
        tokens = encode(self._tokenizer, texts, add_special_tokens=self._tokenizer.chat_template is None)
        end = self._tokenizer.eos_token_id
        for index, row in enumerate(tokens):
            if row and row[-1] == end != _last_id(texts[index], self._tokenizer):
                row.pop()  # some tokenizers end every text, and a prompt does not end
            if not row:
                raise UserError(f"prompt {ids[index]} is empty")
        return list(tokens)

    def _solution_tokens(self, solutions: Sequence[str | None]) -> list[list[int] | None]:
        """Return the ids of solutions with one end token, which a text may have already, with blanks after it."""
        present = [text for text in solutions if text is not None]
        if not present:
            return [None] * len(solutions)
        end = self._tokenizer.eos_token
        if end is None:
            raise UserError("the tokenizer has no end-of-sequence token to end solutions with; use another tokenizer")
        texts = [_without_end(text, end) if end in text else text for text in present]
        tokens = iter(encode(self._tokenizer, texts, add_special_tokens=False))
        end_id = self._tokenizer.eos_token_id
        return [None if text is None else [*next(tokens), end_id] for text in solutions]


class Tokens:
    """Lists of ids, one after the other."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._lengths: list[int] = []  # -1: null

    def extend(self, rows: list[list[int] | None]) -> None:
        """Append rows; None is null."""
        present = [row for row in rows if row is not None]
        lengths = list(map(len, present))
        total = sum(lengths)
        if len(present) < len(rows):
            lengths = [-1 if row is None else len(row) for row in rows]
        self._parts.append(np.fromiter(itertools.chain.from_iterable(present), np.int32, total))
        self._lengths += lengths

    @property
    def values(self) -> np.ndarray:
        """All ids, int32."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.int32)

    @property
    def lengths(self) -> np.ndarray:
        """Number of ids of each row, int64 [n]; -1: null."""
        return np.array(self._lengths, dtype=np.int64)

    def array(self) -> pyarrow.ListArray:
        """Return the rows as Arrow lists [n]."""
        return list_array(self.values, self.lengths)


def encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Return the ids of each text [n], as ``tokenizer(texts)`` does.

    Its own call takes most of its time for what nobody asked for here (offsets, masks, word ids), so after the first
    text, whose call also sets what a tokenizer's file says of truncation and padding, the Rust library is asked itself,
    if it is that library's tokenizer.
    """
    options = {"return_attention_mask": False, "return_token_type_ids": False}
    backend = _plain_backend(tokenizer)
    own: list[list[int]]
    if backend is None or len(texts) < 2:
        own = tokenizer(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]
        return own
    own = tokenizer(texts[:1], add_special_tokens=add_special_tokens, **options)["input_ids"]
    distinct = list(dict.fromkeys(texts))  # many solutions are one number
    encodings = backend.encode_batch_fast(distinct, add_special_tokens=add_special_tokens)
    assert encodings[0].ids == own[0], "the tokenizer's call and its library differ"
    if len(distinct) == len(texts):
        return [encoding.ids for encoding in encodings]
    tokens = dict(zip(distinct, encodings, strict=True))
    return [tokens[text].ids for text in texts]


def _plain_backend(tokenizer: Any) -> Any:
    """Return the tokenizer of the Rust library if the call of ``tokenizer`` is no other than transformers' own."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    own = issubclass(kind, PreTrainedTokenizerFast) and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    if not own or kind.__call__ is not PreTrainedTokenizerBase.__call__:
        return None
    return tokenizer.backend_tokenizer


def _values_of_view(prompt: str, problem: Problem) -> dict[str, str | None]:
    own = {"prompt": prompt, "question": problem.question, "answer": problem.answer, "solution": problem.solution}
    return {**problem.fields, **own}


def _last_id(text: str, tokenizer: Any) -> int | None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[-1] if ids else None


def _without_end(text: str, end: str) -> str:
    shorter = text.rstrip().removesuffix(end)
    return _without_end(shorter, end) if shorter != text.rstrip() else text
