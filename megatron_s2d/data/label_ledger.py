"""The label ledger: which labelled prompts each stage uses; refuses to use a held-out label twice. No torch here.

A stage uses a label if a verifier compares responses with it (GRPO, SG-OPD), if the stage trains on the reference
solution (SFT), or if a teacher reads it (``teacher_view``). Stages that only sample from prompts (teacher cache, OPD)
use no label. Prompts are compared by their
tokens, so the same problem under two ids counts as one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.config.stage import PromptFilterConfig, validated_entries, validation_of
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.prompts import fitting_prompts
from megatron_s2d.errors import UserError

_LISTED_IDS = 100_000  # of an entry, in the file of the ledger


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """The prompts that a stage reads, and whether it uses their labels."""

    stage: str
    prompts: str  # entry of `data`, with its half
    num_prompts: int  # distinct prompts
    labels_used: bool  # rewards or reference solutions, not prompts alone
    note: str = ""


@dataclasses.dataclass(frozen=True)
class LabelLedger:
    """The labels that the stages of a workflow use.

    ``prompts`` maps every entry (or entry/half) that a stage or the evaluation reads to its prompts.
    """

    config: WorkflowConfig
    prompts: Mapping[str, PromptTable]
    _keys: dict[tuple[str, int | None, PromptFilterConfig | None], np.ndarray] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def keys(self, entry: str, stage_name: str | None = None) -> np.ndarray:
        """Return the distinct ``prompt_key`` of an entry, sorted; with ``stage_name``, of what the stage reads."""
        stage = None if stage_name is None else self.config.stages[stage_name]
        limit, prompt_filter = (getattr(stage, name, None) for name in ("max_prompt_length", "prompt_filter"))
        if (entry, limit, prompt_filter) not in self._keys:  # many stages read the same prompts
            self._keys[entry, limit, prompt_filter] = _distinct(self.read_by(stage_name, entry).keys)
        return self._keys[entry, limit, prompt_filter]

    def num_labels_used(self, stages: Sequence[str]) -> int:
        """Return how many distinct prompts have labels that one of ``stages`` uses."""
        read = {}  # by identity: stages that read the same prompts share their keys
        for name in stages:
            for entry in self.labelled_entries(name):
                read[id(self.keys(entry, name))] = self.keys(entry, name)
            for entry in self.selecting_entries(name):
                read[id(self.keys(entry))] = self.keys(entry)
        return len(_distinct(np.concatenate(list(read.values())))) if read else 0

    def read_by(self, stage_name: str | None, entry: str) -> PromptTable:
        """Return the prompts of ``entry`` that the stage reads (``fitting_prompts``); all for None, the evaluation."""
        prompts = self.prompts[entry]
        return prompts if stage_name is None else fitting_prompts(self.config, stage_name, entry, prompts)

    def labelled_entries(self, stage_name: str) -> list[str]:
        """Return the entries whose labels a stage uses (generated corpora are not labelled data)."""
        stage = self.config.stages[stage_name]
        return [entry for entry in stage.entries if stage.uses_labels and entry in self.prompts]

    def selecting_entries(self, stage_name: str) -> list[str]:
        """Return the entries whose labels decide, in a validation, about the weights that a stage leaves."""
        validation = validation_of(self.config.stages[stage_name])
        return validation.entries if validation is not None and validation.selects else []

    def check(self, stages: Sequence[str]) -> None:
        """Refuse training on evaluation problems, and stages that use labels of an earlier stage of their chain."""
        evaluation_keys = _distinct(np.concatenate([self.keys(entry) for entry in self.config.evaluation.entries]))
        for name in stages:
            for entry in self.labelled_entries(name):
                keys = self.keys(entry, name)
                shared = _in_both(keys, evaluation_keys)
                if len(shared):
                    raise UserError(
                        f"stages.{name}: {len(shared)} prompts of '{entry}' are evaluation problems "
                        f"({self._example(entry, shared)}); remove them from one of the two"
                    )
                self._check_reuse(name, entry, keys)
            for entry in self.selecting_entries(name):
                if len(shared := _in_both(self.keys(entry), evaluation_keys)):
                    raise UserError(
                        f"stages.{name}.validation: {len(shared)} prompts of '{entry}' are evaluation problems "
                        f"({self._example(entry, shared)}), and its `best` or `until` would select weights with their "
                        "labels: validate on other prompts, or remove `best` and those rules"
                    )

    def _check_reuse(self, name: str, entry: str, keys: np.ndarray) -> None:
        if getattr(self.config.stages[name], "label_reuse", "allow") == "allow":
            return
        for earlier, shared in self._earlier_uses(name, keys):
            raise UserError(
                f"stages.{name}.prompts: stage '{earlier}' already used the labels of {len(shared)} prompts of "
                f"'{entry}' ({self._example(entry, shared)}), so they are not held out; use the other half, or set "
                "label_reuse: allow for a replay control"
            )

    def _earlier_uses(self, name: str, keys: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (stage, prompts of ``keys`` whose labels it used) for the stages that lead to ``name``."""
        for earlier in self.config.chain(name)[:-1]:
            for entry in self.labelled_entries(earlier):
                shared = _in_both(keys, self.keys(entry, earlier))
                if len(shared):
                    yield earlier, shared

    def trained_before(self, name: str, entry: str) -> dict[str, int]:
        """Return the stages up to ``name`` that train on labels of ``entry``, with the number of its prompts."""
        counts: dict[str, int] = {}
        for stage in self.config.chain(name):
            shared = [len(_in_both(self.keys(entry), self.keys(used, stage))) for used in self.labelled_entries(stage)]
            if any(shared):
                counts[stage] = max(shared)
        return counts

    def _example(self, entry: str, keys: np.ndarray) -> str:
        prompts = self.prompts[entry]
        return f"for example {prompts.select(np.isin(prompts.keys, keys)).first_id()}"

    def entries(self, stages: Sequence[str]) -> tuple[LedgerEntry, ...]:
        """Return the rows of the report: one for each prompt set of a stage."""
        rows = []
        for name in stages:
            stage = self.config.stages[name]
            for entry in stage.entries:
                if entry not in self.prompts:
                    continue
                keys = self.keys(entry, name)
                earlier = {other for other, _ in self._earlier_uses(name, keys)} if stage.uses_labels else set()
                note = f"labels used before by {', '.join(sorted(earlier))}, as configured" if earlier else ""
                rows.append(LedgerEntry(name, entry, len(keys), stage.uses_labels, note))
            selects = bool(self.selecting_entries(name))
            note = f"validation: {'selects the weights' if selects else 'shown only'}"
            rows += [
                LedgerEntry(name, entry, len(self.keys(entry)), selects, note) for entry in validated_entries(stage)
            ]
        return tuple(rows)

    def to_json(self, stages: Sequence[str]) -> str:
        """Return the entries as JSON text, with the ids of all labelled prompts, or with their digest for very many."""
        rows = [dataclasses.asdict(entry) for entry in self.entries(stages)]
        for row in rows:
            if row["labels_used"]:
                is_trained = row["prompts"] in self.config.stages[row["stage"]].entries
                row |= _listed_ids(self.read_by(row["stage"] if is_trained else None, row["prompts"]))
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def _listed_ids(prompts: PromptTable) -> dict[str, Any]:
    if len(prompts) <= _LISTED_IDS:
        return {"prompt_ids": prompts.values("id")}
    digest = hashlib.sha256()
    for start in range(0, len(prompts), _LISTED_IDS):
        digest.update("".join(f"{name}\n" for name in prompts[start : start + _LISTED_IDS].values("id")).encode())
    return {"prompt_ids": None, "prompt_ids_sha256": digest.hexdigest()}


def _distinct(keys: np.ndarray) -> np.ndarray:
    """Return sorted values without repetitions; ``np.unique`` hashes them, ten times slower and larger."""
    values = np.sort(keys)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values


def _in_both(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return what two sorted arrays without repetitions share; the shorter one is looked up in the longer one."""
    if keys is others:
        return keys
    short, long = sorted((keys, others), key=len)
    places = np.minimum(np.searchsorted(long, short), len(long) - 1)
    return short[long[places] == short] if len(long) else short
