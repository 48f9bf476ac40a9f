"""Observations of a chat model: the text between the end of a turn and the beginning of the next, as token ids.

The chat template renders a conversation that ends with the observation; what follows the model's turn is split at the
observation's content. The frame around it is tokenized once, the content by itself and as plain text: a tool's output
or a verifier's message that contains ``<|im_end|>`` cannot end a message. The model's own tokens are not touched.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from megatron_s2d.data.tokenizer import render
from megatron_s2d.errors import UserError

_TURN, _CONTENT = "S2Dturn", "S2Dobservation"
_QUOTES = 'a "quote"'


class ChatObservations:
    """Renders observations of one role for a model that ends its turns with one of ``stop_token_ids``."""

    def __init__(
        self,
        tokenizer: Any,
        date: datetime.date,
        role: Literal["tool", "user"],
        stop_token_ids: Sequence[int],
        tools: list[dict[str, Any]] | None = None,
        max_tokens: int = 512,
    ):
        """max_tokens: of the content, which is cut. Raises ``UserError`` for a template without such messages."""
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        ends = [tokenizer.convert_ids_to_tokens(index) for index in stop_token_ids]
        after = _after_turn(tokenizer, date, role, _CONTENT, tools)
        end = next((end for end in ends if after.startswith(end)), None)
        if end is None:
            raise UserError(
                f"the chat template ends the model's turn with {after[:20]!r}, which is none of its stop tokens "
                f"({', '.join(ends)}): use the template of this model"
            )
        frame = after.removeprefix(end)
        if frame.count(_CONTENT) != 1:
            raise UserError(f"the chat template does not show messages of the role {role}: use another environment")
        before, behind = frame.split(_CONTENT)
        quoted = _after_turn(tokenizer, date, role, _QUOTES, tools)
        self._is_json = json.dumps(_QUOTES)[1:-1] in quoted
        self._before, self._behind = self._ids(before), self._ids(behind)

    def render(self, content: str) -> np.ndarray:
        """Return the observation [o] int64: frame and ``content``, cut to ``max_tokens`` in its middle."""
        text = json.dumps(content, ensure_ascii=False)[1:-1] if self._is_json else content
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) > self._max_tokens:
            first = self._max_tokens // 2
            ids = [*ids[:first], *ids[len(ids) - (self._max_tokens - first) :]]
        return np.array([*self._before, *ids, *self._behind], dtype=np.int64)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


class PlainObservations:
    """Observations of a model whose prompts are plain text, such as those of the embedded task: the text alone."""

    def __init__(self, tokenizer: Any, max_tokens: int):
        self._tokenizer, self._max_tokens = tokenizer, max_tokens

    def render(self, content: str) -> np.ndarray:
        """Return the observation [o] int64."""
        ids = self._tokenizer(content, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not ids or self._tokenizer.pad_token_id in ids:
            raise UserError(f"environment.message: the tokenizer has no tokens for {content!r}: use words that it has")
        return np.array(ids[: self._max_tokens], dtype=np.int64)


def _after_turn(
    tokenizer: Any, date: datetime.date, role: str, content: str, tools: list[dict[str, Any]] | None
) -> str:
    """Return what the template writes after the content of a turn, up to the beginning of the next turn."""
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": _TURN},
        {"role": role, "content": content},
    ]
    text = render(messages, tokenizer, date, tools=tools)
    _, found, after = text.rpartition(_TURN)
    if not found:
        raise UserError(f"the chat template does not show a turn before a message of the role {role}")
    return after
