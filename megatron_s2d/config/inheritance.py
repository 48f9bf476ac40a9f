"""How workflow files build on others (``defaults``) and stages on stages (``extends``). No torch here."""

from __future__ import annotations

from typing import Any

from megatron_s2d.errors import UserError


def merge_documents(base: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; null removes a key. ``arms``, and entries of ``models`` or ``data``, are replaced."""
    replaced = {
        key: document[key] if key == "arms" else base.get(key, {}) | document[key]
        for key in ("arms", "models", "data")
        if isinstance(document.get(key), dict)
    }
    return _merge(base, {key: value for key, value in document.items() if key not in replaced}) | replaced


def expand_stage(name: str, stages: dict[str, Any], source: str, seen: tuple[str, ...]) -> Any:
    """Return the stage merged into what it inherits through ``extends: other``; null removes a key."""
    stage = stages[name]
    if not isinstance(stage, dict) or "extends" not in stage:
        return stage
    other = stage["extends"]
    if other not in stages:
        raise UserError(f"{source}: stages.{name}.extends: there is no stage '{other}' (stages: {', '.join(stages)})")
    if other in seen or other == name:
        raise UserError(f"{source}: stages.{name}.extends: '{other}' inherits from '{name}'")
    inherited = expand_stage(other, stages, source, (*seen, name))
    return _merge(inherited, {key: value for key, value in stage.items() if key != "extends"})


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
