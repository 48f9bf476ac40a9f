"""Chat templates that put a message between fixed texts: what millions of conversations need not be rendered for.

A template is a program. It is run once with a message that cannot be read: whatever looks at it ends the run, apart
from a few questions whose answers become conditions on the message (does it start with a text, has it blanks at its
ends). Where the run ends by itself, every message that fulfils the conditions stands where that one stood; all others
are rendered. Constructs in which a message could be looked at unnoticed are refused before. No torch here.

n: messages.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_s2d.data.text_columns import content_of, joined, with_parts

if TYPE_CHECKING:
    import pyarrow

# Changed by whatever quotes, escapes, trims or lowers text.
_PLACE = " \n\"'\\ <Aé&{{ The message that nobody reads }}%> \t"
_FUNCTIONS = ("namespace", "raise_exception", "range", "strftime_now")
_TESTS = ("boolean", "defined", "false", "iterable", "mapping", "none", "sequence", "string", "true", "undefined")
_FILTERS = ("first", "items", "last", "length", "list", "tojson", "trim")
_NODES = frozenset({
    "Add", "And", "Assign", "Break", "Call", "Compare", "CondExpr", "Const", "Continue", "Dict", "Div", "Filter",
    "FloorDiv", "For", "Getattr", "Getitem", "If", "Keyword", "List", "Mod", "Mul", "NSRef", "Name", "Neg", "Not",
    "Operand", "Or", "Output", "Pair", "Pos", "Slice", "Sub", "Template", "TemplateData", "Test", "Tuple",
})  # fmt: skip
_LARGEST_BYTES = 1 << 24  # of a message; longer ones are rendered, which says so if they are too long
_LOOKS = (
    "eq", "ne", "lt", "le", "gt", "ge", "hash", "len", "iter", "getitem", "contains", "mod", "rmod", "mul", "rmul",
    "format",
)  # fmt: skip
_BLANKS = ("strip", "lstrip", "rstrip")


@dataclasses.dataclass(frozen=True)
class ChatFrame:
    """The fixed texts around a message, and what a message must not have."""

    parts: tuple[str, ...]  # the message stands between each two
    starts: frozenset[str]  # with which it must not begin
    ends: frozenset[str]
    inside: frozenset[str]  # which it must not contain
    trimmed: bool  # whether it must not have blanks at its ends

    def texts(self, messages: pyarrow.StringArray) -> pyarrow.StringArray:
        """Return the rendered conversations [n]."""
        pieces: list[Any] = [self.parts[0]]
        for part in self.parts[1:]:
            pieces += [messages, part]
        return joined(pieces)

    def others(self, messages: pyarrow.StringArray) -> np.ndarray:
        """Return the mask [n] of the messages that have to be rendered."""
        import pyarrow.compute

        content, bounds = content_of(messages)
        lengths = np.diff(bounds)
        others = lengths > _LARGEST_BYTES
        if self.inside:
            others |= with_parts(messages, self.inside)
        for texts, find in ((self.starts, pyarrow.compute.starts_with), (self.ends, pyarrow.compute.ends_with)):
            for text in texts:
                others |= find(messages, text).to_numpy(zero_copy_only=False)
        if self.trimmed and len(content):
            last = len(content) - 1
            for ends in (content[np.minimum(bounds[:-1], last)], content[np.maximum(bounds[1:], 1) - 1]):
                others |= (ends <= 0x20) | (ends >= 0x7F)  # what may be a blank
        return others | (lengths == 0)


def frame_of(
    tokenizer: Any,
    date: datetime.date,
    messages: Callable[[str], list[dict[str, str]]],
    *,
    enable_thinking: bool,
    tools: list[dict[str, Any]] | None,
) -> ChatFrame | None:
    """Return the frame of conversations that differ in one message; None if the template may read it.

    messages: returns the conversation with a message. The other arguments: see ``render``.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or not _is_plain(template):
        return None
    asked = _Asked()
    try:
        (text,) = tokenizer.apply_chat_template(
            [messages(_unreadable(asked))],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
            **({} if tools is None else {"tools": tools}),
            strftime_now=datetime.datetime.combine(date, datetime.time()).strftime,
        )
    except Exception:  # it was looked at, or the template refuses the conversation, which rendering reports
        return None
    parts = tuple(str.split(text, _PLACE))
    if len(parts) < 2 or any("nobody reads" in part for part in parts):
        return None
    return ChatFrame(parts, frozenset(asked.starts), frozenset(asked.ends), frozenset(asked.inside), asked.trimmed)


@dataclasses.dataclass
class _Asked:
    """Questions of a template about a message; all are answered with no."""

    starts: set[str] = dataclasses.field(default_factory=set)
    ends: set[str] = dataclasses.field(default_factory=set)
    inside: set[str] = dataclasses.field(default_factory=set)
    trimmed: bool = False


class _LookedAt(Exception):
    """A template read what stands for a message."""


def _unreadable(asked: _Asked) -> str:
    """Return a text that templates can write and join to others; looking at it raises ``_LookedAt``."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise _LookedAt

    members: dict[str, Any] = {name: refuse for name in dir(str) if not name.startswith("__")}
    members |= dict.fromkeys((f"__{name}__" for name in _LOOKS), refuse)
    members |= {"__bool__": lambda self: True, "__str__": lambda self: self}  # no message is empty
    joined_text: type = type("_JoinedText", (str,), members)
    joined_text.__add__ = lambda self, other: joined_text(str.__add__(self, other))  # type: ignore[method-assign]
    joined_text.__radd__ = lambda self, other: joined_text(str.__add__(other, self))  # type: ignore[attr-defined]

    def no(answers: set[str]) -> Callable[..., bool]:
        def ask(self: str, text: Any, *more: Any) -> bool:
            for one in text if type(text) is tuple else (text,):
                if type(one) is not str or not one or more:
                    raise _LookedAt
                answers.add(one)
            return False

        return ask

    def trim(self: str, *characters: Any) -> str:
        if any(one is not None for one in characters):
            raise _LookedAt
        asked.trimmed = True
        return self

    message = type("_Message", (joined_text,), {
        "startswith": no(asked.starts), "endswith": no(asked.ends), "__contains__": no(asked.inside),
        **dict.fromkeys(_BLANKS, trim),
    })  # fmt: skip
    return message(_PLACE)


def _is_plain(template: str) -> bool:
    """Return whether a template has only constructs that look at a text through the text itself."""
    import jinja2.nodes
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        tree = environment.parse(template)
    except jinja2.TemplateError:
        return False
    nodes = [tree, *tree.find_all(jinja2.nodes.Node)]
    return all(_looks_openly(node, jinja2.nodes) for node in nodes)


def _looks_openly(node: Any, nodes: Any) -> bool:
    if type(node).__name__ not in _NODES:
        return False
    if isinstance(node, nodes.Compare):
        contained = any(operand.op in ("in", "notin") for operand in node.ops)
        return not contained or (isinstance(node.expr, nodes.Const) and len(node.ops) == 1)
    if isinstance(node, nodes.Test):
        return node.name in _TESTS
    if isinstance(node, nodes.Mod):
        return not isinstance(node.left, nodes.Const)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
        return node.node.name in _FUNCTIONS
    if isinstance(node, nodes.Filter | nodes.Call):
        known = node.name in _FILTERS if isinstance(node, nodes.Filter) else isinstance(node.node, nodes.Getattr)
        given = [*node.args, *(one.value for one in node.kwargs), node.dyn_args, node.dyn_kwargs]
        return known and all(one is None or isinstance(one, nodes.Const) for one in given)
    return True
