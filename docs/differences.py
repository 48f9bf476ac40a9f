"""Lists in docs/papers.md everything in which the tiny files of the papers differ from the full-size ones.

python docs/differences.py        # rewrites the part of docs/papers.md between the two markers

Both files of a pair are resolved as `s2d run` resolves them, defaults and `extends` included, and compared key by key.
Rows with the same change are joined. A stage of another type (trained from scratch instead of loaded) has one row with
all that its file sets.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_s2d.config.base import Config, dump
from megatron_s2d.config.workflow import WorkflowConfig, load_workflow

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/papers.md"
BEGIN, END = "<!-- python docs/differences.py writes this list -->\n", "<!-- end of the list -->\n"
TITLES = {"s2d": "Sparse to dense", "g-opd": "G-OPD", "sg-opd": "SG-OPD"}
_SKIPPED = ("name", "description", "stages", "models", "data", "table")  # those after `description` have their own rows
_ABSENT = object()

Change = tuple[str, str, str]  # key, value at full size, tiny value


def main() -> None:
    """Rewrite the list."""
    DOCUMENT.write_text(with_list(DOCUMENT.read_text(encoding="utf-8"), differences()), encoding="utf-8")


def with_list(document: str, text: str) -> str:
    """Return ``document`` with ``text`` between the markers."""
    before, _, rest = document.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"{DOCUMENT} has no markers {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + text + END + after


def differences() -> str:
    """Return the list of all papers as Markdown."""
    parts = []
    for folder in sorted(path for path in (ROOT / "configs/tiny").iterdir() if path.is_dir()):
        pairs = {
            path.name: (load_workflow(ROOT / "configs/papers" / folder.name / path.name), load_workflow(path))
            for path in sorted(folder.glob("*.yaml"))
            if (ROOT / "configs/papers" / folder.name / path.name).exists()
        }
        parts.append(f"\n### {TITLES.get(folder.name, folder.name)}: full size and tiny\n\n{_paper(pairs)}\n")
    return "".join(parts)


def _paper(pairs: Mapping[str, tuple[WorkflowConfig, WorkflowConfig]]) -> str:
    """Return the table of one paper, whose file names map to (full size, tiny)."""
    files: dict[Change, list[str]] = collections.defaultdict(list)
    stages: dict[Change, dict[str, None]] = collections.defaultdict(dict)  # an ordered set of names
    with_key: dict[str, dict[str, None]] = collections.defaultdict(dict)  # type.key -> stages that have it
    for name, (full, tiny) in pairs.items():
        for change in _workflow_changes(full, tiny):
            files[change].append(name)
        for stage in [*full.stages, *(stage for stage in tiny.stages if stage not in full.stages)]:
            left, right = full.stages.get(stage), tiny.stages.get(stage)
            for change in _stage_changes(left, right):
                stages[change][stage] = None
            if left is not None and right is not None:
                for key in _flat(dump(left)):
                    with_key[f"{left.type}.{key}"][stage] = None
    rows = ["| key | full size | tiny | where |", "|---|---|---|---|"]
    for (key, left, right), names in files.items():
        where = "all files" if len(names) == len(pairs) else ", ".join(names)
        rows.append(f"| `{key}` | {left} | {right} | {where} |")
    for key, left, right in sorted(stages):
        names = stages[key, left, right]
        everywhere = with_key[key].keys() == names.keys() and len(names) > 1
        where = f"all {len(names)}" if everywhere else ", ".join(names)
        rows.append(f"| `{key}` | {left} | {right} | {where} |")
    return "\n".join(rows)


def _workflow_changes(full: WorkflowConfig, tiny: WorkflowConfig) -> Iterator[Change]:
    """Yield the changes outside of stages: of models and data entry by entry, of everything else key by key."""
    for section in ("models", "data"):
        left, right = getattr(full, section), getattr(tiny, section)
        used = [entry for entry in left if entry in right]
        yield from (_change(f"{section}.{entry}", _written(left[entry]), _written(right[entry])) for entry in used
                    if left[entry] != right[entry])  # fmt: skip
        yield from (_change(f"{section}.{entry}", _ABSENT, _written(right[entry])) for entry in right
                    if entry not in left)  # fmt: skip
        unused = [entry for entry in left if entry not in right]
        yield from (_change(f"{section}.{entry}", _written(left[entry]), _ABSENT) for entry in unused)
    if full.table is not None and tiny.table is not None:
        labels = [[column.label for column in config.table.columns] for config in (full, tiny)]
        if labels[0] != labels[1]:
            yield _change("table.columns", *labels)
    left, right = (_flat({key: value for key, value in dump(config).items() if key not in _SKIPPED})
                   for config in (full, tiny))  # fmt: skip
    yield from _flat_changes(left, right, "")


def _stage_changes(full: Any, tiny: Any) -> Iterator[Change]:
    """Yield the changes of one stage; its keys begin with its type at full size."""
    if full is None or tiny is None or full.type != tiny.type:
        yield _change("type", *(_ABSENT if stage is None else _written(stage) for stage in (full, tiny)))
        return
    yield from _flat_changes(_flat(dump(full)), _flat(dump(tiny)), f"{full.type}.")


def _flat_changes(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str) -> Iterator[Change]:
    for key in [*left, *(key for key in right if key not in left)]:
        a, b = left.get(key, _ABSENT), right.get(key, _ABSENT)
        if a != b:
            yield _change(prefix + key, a, b)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> leaf; lists and empty mappings are leaves."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _written(config: Config) -> dict[str, Any]:
    """Return the keys that files set, without the role, which names a stage in contrasts."""
    return {
        key: value
        for key, value in config.model_dump(mode="json", exclude_unset=True, by_alias=True).items()
        if key != "role"
    }


def _change(key: str, left: Any, right: Any) -> Change:
    return key, _text(left), _text(right)


def _text(value: Any) -> str:
    """Return a value as YAML on one line."""
    if value is _ABSENT:
        return "–"
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.strip().removesuffix("...").strip().replace("|", "\\|")


if __name__ == "__main__":
    main()
