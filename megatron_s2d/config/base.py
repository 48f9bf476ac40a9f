"""Base of all configuration models, reading of YAML files, and error messages for invalid ones. No torch here."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any

import pydantic

from megatron_s2d.config.bounds import refuse_implausible_numbers
from megatron_s2d.config.yaml_file import parse_yaml
from megatron_s2d.errors import UserError

# Names of stages, arms, models and data entries become names of folders and files.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Name = Annotated[str, pydantic.StringConstraints(pattern=NAME_PATTERN)]


Location = tuple[int | str, ...]  # of an error in a document, as pydantic reports it


class Config(pydantic.BaseModel):
    """Base of every configuration object: frozen, typed, and without unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def apply_overrides(document: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of ``document`` with each ``a.b=value`` applied; the value is read as YAML."""
    result: dict[str, Any] = _copy(document)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise UserError(f"--set {override}: expected KEY=VALUE, for example --set seed=2")
        *parents, last = path.split(".")
        node = result
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {override}: {key} has no keys below it")
        node[last] = parse_yaml(text, f"--set {override}") if text else None
    return result


def parse[C: Config](model: type[C], document: dict[str, Any], source: str) -> C:
    """Validate ``document`` against ``model``; report the first problem in one line: file, key, closest valid key."""
    refuse_implausible_numbers(document, source)
    try:
        config = model.model_validate(document)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
        # An unknown key is often a slip of one that is then missing: it names that one.
        first = next((item for item in problems if item["type"] == "extra_forbidden"), problems[0])
        is_missing = first["type"] == "missing"  # then the last part is a key that is not in the file
        key = ".".join(
            str(part) for part in first["loc"] if not _is_union_tag(part, document, first["loc"], is_missing)
        )
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown key{_suggest(model, first['loc'])}"
        elif first["type"] == "string_pattern_mismatch" and first["ctx"]["pattern"] == NAME_PATTERN:
            message = (
                f"{first['input']!r} cannot name files: use letters, digits, '.', '_' and '-', a letter or digit "
                "first, at most 100 characters"
            )
        elif first["type"] == "union_tag_invalid":
            expected = re.findall(r"'([^']+)'", str(first["ctx"]["expected_tags"]))
            message = f"unknown type {first['ctx']['tag']!r}{_closest(str(first['ctx']['tag']), expected)}"
        elif first["type"] == "literal_error":
            expected = re.findall(r"'([^']+)'", str(first["ctx"]["expected"]))
            message += f" (got {first['input']!r}){_closest(str(first['input']), expected, '')}"
        elif first["type"] != "value_error" and first["type"] != "missing":
            message += f" (got {first['input']!r})"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{source}: {key + ': ' if key else ''}{message}{more}") from None
    _refuse_booleans_as_numbers(document, config, "", source)
    refuse_implausible_numbers(config.model_dump(), source)  # again: text such as 1e40 is a number by now
    return config


def dump(config: Config) -> dict[str, Any]:
    """Return the resolved configuration as plain JSON types, defaults included."""
    return config.model_dump(mode="json")


def _refuse_booleans_as_numbers(document: Any, config: Any, key: str, source: str) -> None:
    """``true`` where the validated ``config`` holds a number: pydantic reads it as 1."""
    if isinstance(document, dict):
        for name, item in document.items():
            inner = config.get(name) if isinstance(config, dict) else getattr(config, str(name), None)
            _refuse_booleans_as_numbers(item, inner, f"{key}.{name}" if key else str(name), source)
    elif isinstance(document, list) and isinstance(config, (list, tuple)):
        for index, (item, inner) in enumerate(zip(document, config, strict=False)):
            _refuse_booleans_as_numbers(item, inner, f"{key}.{index}", source)
    elif isinstance(document, bool) and isinstance(config, (int, float)) and not isinstance(config, bool):
        raise UserError(f"{source}: {key}: expected a number, got {str(document).lower()}")


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _is_union_tag(part: Any, document: Any, location: Location, is_missing: bool) -> bool:
    """Return whether ``part`` of an error location is the tag of a union rather than a key in the user's file."""
    node = document
    for step in location:
        if step is part:
            if isinstance(node, dict):
                return part not in node and not (is_missing and step is location[-1])
            return not isinstance(part, int)
        in_list = isinstance(node, list) and isinstance(step, int) and step < len(node)
        if in_list or (isinstance(node, dict) and step in node):
            node = node[step]
    return False


def _suggest(model: type[Config], location: Location) -> str:
    """Return `` (did you mean 'x'?)`` for the key at ``location``, from the fields that are valid there."""
    candidates = _fields_at(model, location[:-1])
    close = difflib.get_close_matches(str(location[-1]), candidates, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (valid keys: {', '.join(sorted(candidates))})" if candidates else ""


_OTHER_NAMES = {
    "bf16": "bfloat16", "fp32": "float32", "fp16": "bfloat16",
    "distill": "opd", "gkd": "opd", "rl": "grpo", "ppo": "grpo", "vllm": "sglang",
}  # fmt: skip


def _closest(value: str, expected: list[str], otherwise: str | None = None) -> str:
    """Return `` (did you mean 'x'?)`` for a value, from the valid ones; else all of them, or ``otherwise``."""
    other = _OTHER_NAMES.get(value.lower(), "")
    close = [other] if other in expected else difflib.get_close_matches(value, expected, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (one of {', '.join(expected)})" if otherwise is None else otherwise


def _fields_at(annotation: Any, location: Location) -> list[str]:
    """Return the field names valid below ``annotation`` at ``location``, of all members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        if not location:
            return list(annotation.model_fields)
        field = annotation.model_fields.get(str(location[0]))
        if field is not None:
            return _fields_at(field.annotation, location[1:])
        return _fields_at(annotation, location[1:])
    arguments = getattr(annotation, "__args__", ())
    if not arguments:
        return []
    origin = getattr(annotation, "__origin__", None)
    if origin is dict:
        return _fields_at(arguments[1], location[1:])
    if origin in (list, tuple):
        return _fields_at(arguments[0], location[1:])
    members = arguments
    if location:
        tagged = [m for m in members if _tag_of(m) == location[0]]
        if tagged:
            return _fields_at(tagged[0], location[1:])
    names: list[str] = []
    for member in members:
        names += [name for name in _fields_at(member, location) if name not in names]
    return names


def _tag_of(member: Any) -> str | None:
    field = getattr(member, "model_fields", {}).get("type")
    return None if field is None else str(field.default)
