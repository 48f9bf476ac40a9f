"""Tool calls in a model's text: the formats of Qwen3 and Llama 3. Model output is untrusted; nothing is evaluated."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

_QWEN3 = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_LLAMA3_ENDS = re.compile(r"<\|(?:eot_id|eom_id|end_of_text)\|>\s*$")
_MAX_CALLS = 8  # of one turn


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, or what is wrong with it."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None


def qwen3_calls(text: str) -> list[ToolCall]:
    """Return the calls between ``<tool_call>`` and ``</tool_call>``: JSON with ``name`` and ``arguments``."""
    calls = [_call(body, "arguments") for body in _QWEN3.findall(text)]
    if not calls and "<tool_call>" in text:
        return [ToolCall("", {}, "the call has no </tool_call>")]
    return calls[:_MAX_CALLS]


def llama3_calls(text: str) -> list[ToolCall]:
    """Return the call that the text is, after ``<|python_tag|>`` if it has that: JSON with ``name`` and ``parameters``.

    Any other text is an answer; one with the tag is a call that cannot be read. Several calls are separated by ``;``.
    """
    body = _LLAMA3_ENDS.sub("", text.strip()).strip()
    body, tagged = body.removeprefix("<|python_tag|>").strip(), body.startswith("<|python_tag|>")
    if not tagged and not (body.startswith("{") and '"name"' in body):
        return []
    decoder, calls = json.JSONDecoder(), []
    while body and len(calls) < _MAX_CALLS:
        try:
            value, end = decoder.raw_decode(body)
        except (ValueError, RecursionError):
            return [ToolCall("", {}, "the call is not JSON")]
        calls.append(_checked(value, "parameters"))
        body = body[end:].lstrip(" \n;")
    return calls


def _call(body: str, key: str) -> ToolCall:
    try:
        return _checked(json.loads(body), key)
    except (ValueError, RecursionError):
        return ToolCall("", {}, "the call is not JSON")


def _checked(value: Any, key: str) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return ToolCall("", {}, f"the call needs a name and {key}")
    arguments = value.get(key, {})
    if not isinstance(arguments, dict):
        return ToolCall(value["name"], {}, f"{key} must be an object")
    return ToolCall(value["name"], arguments)


TOOL_PARSERS: dict[str, Callable[[str], list[ToolCall]]] = {"qwen3": qwen3_calls, "llama3": llama3_calls}
