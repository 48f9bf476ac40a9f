"""Writes the reference of all configuration keys, docs/configuration.md, from the classes of ``megatron_s2d/config``.

python docs/reference.py        # a test compares the page with the classes
"""

from __future__ import annotations

import json
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
from pydantic_core import PydanticUndefined

from megatron_s2d.config.base import Config
from megatron_s2d.config.simulation import SimulationConfig
from megatron_s2d.config.sweep import SweepConfig
from megatron_s2d.config.teacher_service import ServeTeacherConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.launchers.config import LaunchConfig

PAGE = Path(__file__).with_name("configuration.md")
ROOTS = {
    WorkflowConfig: "A workflow (`s2d run`)",
    SweepConfig: "A sweep (`s2d sweep`)",
    SimulationConfig: "A simulation (`s2d simulate`)",
    LaunchConfig: "A cluster (`s2d launch --cluster`)",
    ServeTeacherConfig: "A teacher's server (`s2d serve-teacher`)",
}
HEADER = """# All configuration keys

Written by `docs/reference.py` from the classes in `megatron_s2d/config/`; a test compares the two. One table a class,
in the order in which the files name them; "required" marks keys without a default. Unknown keys are errors that name
the closest valid one. How to write a workflow: [workflow](workflow.md).
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """Return the page."""
    parts, seen = [HEADER], set()
    for root, title in ROOTS.items():
        parts.append(f"## {title}\n")
        for model in classes_below(root):
            if model not in seen:
                seen.add(model)
                parts.append(table(model))
    return "\n".join(parts)


def classes_below(root: type[Config]) -> list[type[Config]]:
    """Return ``root`` and the classes that its keys hold, depth first, each once."""
    found: list[type[Config]] = []
    waiting = [root]
    while waiting:
        model = waiting.pop(0)
        if model in found:
            continue
        found.append(model)
        inner = [other for field in model.model_fields.values() for other in _classes_in(field.annotation)]
        waiting = [*dict.fromkeys(inner), *waiting]
    return found


def _classes_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if isinstance(annotation, typing.TypeAliasType):
        return _classes_in(annotation.__value__)
    return [other for part in get_args(annotation) for other in _classes_in(part)]


def table(model: type[Config]) -> str:
    """Return the section of one class."""
    first = (model.__doc__ or "").strip().partition("\n\n")[0]
    lines = [f"### {model.__name__}", "", " ".join(first.split()), "", "| key | type | default | meaning |"]
    lines.append("|---|---|---|---|")
    for name, field in model.model_fields.items():
        cells = [f"`{field.alias or name}`", type_text(field.annotation), default_text(field), field.description or ""]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join([*lines, ""])


def type_text(annotation: Any) -> str:
    """Return a type as readers of YAML know it."""
    if isinstance(annotation, typing.TypeAliasType):
        return type_text(annotation.__value__)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(part) for part in arguments))
    if origin is dict:
        return f"mapping to {type_text(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {type_text(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "NoneType": "null"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name.lower())


def default_text(field: pydantic.fields.FieldInfo) -> str:
    """Return the default as YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, Config):
        return "see there"
    text = pydantic.TypeAdapter(Any).dump_json(value).decode()
    return f"`{text}`" if len(text) <= 60 else f"`{json.dumps(json.loads(text))[:57]}...`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    main()
