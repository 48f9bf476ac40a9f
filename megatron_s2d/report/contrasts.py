"""Contrasts: differences between the configurations of two arms, and the check that all of them are declared.

The rule is methods.md M7. Arms are compared role by role, as plain settings. No torch here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_s2d.config.base import dump
from megatron_s2d.config.stage import changes_weights
from megatron_s2d.config.workflow import ContrastConfig, WorkflowConfig
from megatron_s2d.errors import UserError

Arm = Sequence[Mapping[str, Any]]
"""Resolved configurations of all stages that lead to an endpoint, its teacher's included, each with a ``role``."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One dotted key, ``role.key.key``, in which two arms differ; the role alone where one arm lacks the stage."""

    key: str
    text: str  # for people: the key with both values

    def __str__(self) -> str:
        return self.text


def arm_of(config: WorkflowConfig, name: str) -> list[dict[str, Any]]:
    """Return the stages of the arm ``name`` of a workflow, inputs first; stages they refer to are named by role."""
    arm = []
    for stage_name in config.chain(config.arms[name]):
        stage = config.stages[stage_name]
        settings = dump(stage)
        if not changes_weights(stage):
            settings.pop("validation", None)
        for relation, other in stage.inputs().items():
            field, _, key = relation.partition(".")  # "teacher.math" is a key of the mapping, "tuned.0" of the list
            owner = settings if field in settings else settings["teacher_advantage"]
            if key:
                owner[field][int(key) if key.isdigit() else key] = config.stages[other].role
            else:
                owner[field] = config.stages[other].role
        arm.append(settings)
    return arm


def arm_differences(arm_a: Arm, arm_b: Arm) -> list[Difference]:
    """List where two arms differ, role by role: missing stages, different values, a different order of stages.

    Stages refer to other stages by role (``opd.teacher: teacher_grpo``), as ``arm_of`` returns them, because a stage's
    name may be used in one arm only.
    """
    a, b = _by_role(arm_a), _by_role(arm_b)
    differences = []
    for role in [*a, *(role for role in b if role not in a)]:
        if role not in a or role not in b:
            differences.append(
                Difference(role, f"{role}: only {'the second' if role not in a else 'the first'} arm has it")
            )
            continue
        flat_a, flat_b = _flatten(a[role], role), _flatten(b[role], role)
        for key in [*flat_a, *(key for key in flat_b if key not in flat_a)]:
            left, right = flat_a.get(key, _ABSENT), flat_b.get(key, _ABSENT)
            if left != right:
                differences.append(Difference(key, f"{key}: {_show(left)} against {_show(right)}"))
    shared_a, shared_b = [role for role in a if role in b], [role for role in b if role in a]
    if shared_a != shared_b:
        differences.append(Difference("order", f"order: {' -> '.join(shared_a)} against {' -> '.join(shared_b)}"))
    return differences


def check_matched(contrast: ContrastConfig, arms: Mapping[str, Arm]) -> list[Difference]:
    """Return the declared differences of a contrast's arms; a ``UserError`` names every undeclared one.

    ``contrast.differs`` holds shell patterns over dotted keys (``*`` also crosses dots). Arms without a difference are
    refused too: their contrast would show noise.
    """
    title = f"contrast {contrast.a} against {contrast.b} ({contrast.factor})"
    for name in (contrast.a, contrast.b):
        if name not in arms:
            raise UserError(f"{title}: there is no arm '{name}' (arms: {', '.join(arms)})")
    differences = arm_differences(arms[contrast.a], arms[contrast.b])
    if not differences:
        raise UserError(f"{title}: refused, the two arms are configured alike; name two arms that differ")
    unexpected = [
        difference.text
        for difference in differences
        if not any(fnmatch.fnmatchcase(difference.key, pattern) for pattern in contrast.differs)
    ]
    if unexpected:
        raise UserError(
            f"{title}: refused, the arms also differ in {'; '.join(unexpected)}. "
            "Make them equal, or declare the keys in the contrast's `differs`"
        )
    return differences


class _Absent:
    """A key that one side lacks: different from every value, also from null."""


_ABSENT = _Absent()


def _by_role(arm: Arm) -> dict[str, dict[str, Any]]:
    stages: dict[str, dict[str, Any]] = {}
    for stage in arm:
        role = stage.get("role")
        if not isinstance(role, str) or not role:
            raise UserError("a stage of an arm has no role; set stages.<name>.role")
        if role in stages:
            raise UserError(f"two stages of one arm have the role '{role}'; give each a role of its own")
        stages[role] = {key: value for key, value in stage.items() if key != "role"}
    return stages


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
    """Dotted key -> leaf; an empty mapping is a leaf, a list is compared as a whole."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}")
    return flat


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False, default=str)
