"""Reads YAML from untrusted files strictly: every ambiguity and every trap is one line with the file and the line.

PyYAML's safe loader runs no code, but it keeps the last of two equal keys, expands aliases without a bound, follows an
anchor into itself and passes infinities on. Documents are scanned and parsed by libyaml if PyYAML was built with it, in
a fifth of the time; one that it refuses is read again by PyYAML's own parser, whose words the message has.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import Resolver
from yaml.scanner import Scanner

from megatron_s2d.errors import UserError

MAX_BYTES = 10 * 2**20
MAX_DEPTH = 50
MAX_NODES = 200_000  # with aliases expanded


class _Problem(yaml.MarkedYAMLError):
    """A document that PyYAML accepts and this loader does not."""


class _Strict(Composer, SafeConstructor, Resolver):
    """Values of a parser's events; the parser is the class beside it."""

    def __init__(self) -> None:
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._depth = 0
        self._num_nodes = 0
        self._open_anchors: set[str] = set()
        self._sizes: dict[str, int] = {}  # anchor -> nodes

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[attr-defined]
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias:  # a narrowed type would reject the marks of the C parser
            if event.anchor in self._open_anchors:
                raise _Problem(None, None, f"the anchor '{event.anchor}' contains itself", event.start_mark)
            self._count(self._sizes.get(event.anchor, 1), event.start_mark)
            return super().compose_node(parent, index)
        if self._depth >= MAX_DEPTH:
            raise _Problem(None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        anchor, before = event.anchor, self._num_nodes
        self._count(1, event.start_mark)
        self._depth += 1
        if anchor is not None:
            self._open_anchors.add(anchor)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None:
            self._open_anchors.discard(anchor)
            self._sizes[anchor] = self._num_nodes - before
        return node

    def _count(self, nodes: int, mark: Any) -> None:
        self._num_nodes += nodes
        if self._num_nodes > MAX_NODES:
            raise _Problem(None, None, f"more than {MAX_NODES:,} values once aliases are expanded", mark)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            # By its value where it is a number: 16 and 0x10 are one key.
            is_number = key.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            name = str(self.construct_object(key)) if is_number else key.value
            if name in lines:
                problem = f"the key '{name}' appears in lines {lines[name]} and {line}; keep one of them"
                raise _Problem(None, None, problem, key.start_mark)
            lines[name] = line
        return node

    def construct_finite_float(self, node: yaml.ScalarNode) -> float:
        value = self.construct_yaml_float(node)
        if not math.isfinite(value):
            raise _Problem(None, None, f"{node.value} is not a finite number", node.start_mark)
        return value


_Strict.yaml_constructors = _Strict.yaml_constructors | {"tag:yaml.org,2002:float": _Strict.construct_finite_float}


class _PythonLoader(_Strict, Reader, Scanner, Parser):
    def __init__(self, text: str):
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        _Strict.__init__(self)


def _loaders() -> list[Callable[[str], Any]]:
    if not yaml.__with_libyaml__:
        return [_PythonLoader]
    parser: Any = importlib.import_module("yaml.cyaml").CParser

    class LibyamlLoader(_Strict, parser):  # type: ignore[misc]
        def __init__(self, text: str):
            parser.__init__(self, text)
            _Strict.__init__(self)

    return [LibyamlLoader, _PythonLoader]


_LOADERS = _loaders()


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of one YAML document; the message of a ``UserError`` starts with ``source``."""
    for make in _LOADERS[:-1]:
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            return make(text).get_single_data()
    try:
        return _LOADERS[-1](text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(
            f"{where}: {problem if isinstance(error, _Problem) else f'not valid YAML ({problem})'}"
        ) from None
    except (ValueError, RecursionError) as error:  # of a date such as 2026-13-45, of a number with too many digits
        raise UserError(f"{source}: not valid YAML ({error})") from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, or raise a ``UserError`` that names the file and the line."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES // 2**20} MiB, too large for a configuration")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a mapping of configuration keys, not a {type(document).__name__}")
    wrong = next((key for key in _keys(document) if type(key) not in (str, int)), None)
    if wrong is not None:
        raise UserError(f"{path}: the key {wrong!r} is not text; write it in quotes")
    return document


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *(key for item in value.values() for key in _keys(item))]
    if isinstance(value, list):
        return [key for item in value for key in _keys(item)]
    return []
