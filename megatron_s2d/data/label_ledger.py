"""The label ledger: which labelled prompts each stage uses; refuses to use a held-out label twice. No torch here.

A stage uses a label if a verifier compares responses with it (GRPO, SG-OPD) or if the stage trains on the reference
solution (SFT). Stages that only sample from prompts (teacher cache, OPD) use no label. Prompts are compared by their
tokens, so the same problem under two ids counts as one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """The prompts that a stage reads, and whether it uses their labels."""

    stage: str
    prompts: str  # entry of `data`, with its half
    num_prompts: int  # distinct prompts
    labels_used: bool  # rewards or reference solutions, not prompts alone
    note: str = ""


def prompt_key(prompt: Prompt) -> str:
    """Return the digest of a prompt's tokens."""
    return hashlib.sha256(prompt.token_ids.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class LabelLedger:
    """The labels that the stages of a workflow use.

    ``prompts`` maps every entry (or entry/half) that a stage or the evaluation reads to its prompts.
    """

    config: WorkflowConfig
    prompts: Mapping[str, Sequence[Prompt]]

    def keys(self, entry: str) -> set[str]:
        """Return the digests of the prompts of an entry."""
        return {prompt_key(prompt) for prompt in self.prompts[entry]}

    def labelled_entries(self, stage_name: str) -> list[str]:
        """Return the entries whose labels a stage uses (generated corpora are not labelled data)."""
        stage = self.config.stages[stage_name]
        return [entry for entry in stage.entries if stage.uses_labels and entry in self.prompts]

    def check(self, stages: Sequence[str]) -> None:
        """Refuse training on evaluation problems, and stages that use labels of an earlier stage of their chain."""
        evaluation_keys = {key for entry in self.config.evaluation.entries for key in self.keys(entry)}
        for name in stages:
            for entry in self.labelled_entries(name):
                keys = self.keys(entry)
                shared = keys & evaluation_keys
                if shared:
                    raise UserError(
                        f"stages.{name}: {len(shared)} prompts of '{entry}' are evaluation problems "
                        f"({self._example(entry, shared)}); remove them from one of the two"
                    )
                self._check_reuse(name, entry, keys)

    def _check_reuse(self, name: str, entry: str, keys: set[str]) -> None:
        if getattr(self.config.stages[name], "label_reuse", "allow") == "allow":
            return
        for earlier, shared in self._earlier_uses(name, keys):
            raise UserError(
                f"stages.{name}.prompts: stage '{earlier}' already used the labels of {len(shared)} prompts of "
                f"'{entry}' ({self._example(entry, shared)}), so they are not held out; use the other half, or set "
                "label_reuse: allow for a replay control"
            )

    def _earlier_uses(self, name: str, keys: set[str]) -> Iterator[tuple[str, set[str]]]:
        """Yield (stage, prompts of ``keys`` whose labels it used) for the stages that lead to ``name``."""
        for earlier in self.config.chain(name)[:-1]:
            for entry in self.labelled_entries(earlier):
                shared = keys & self.keys(entry)
                if shared:
                    yield earlier, shared

    def _example(self, entry: str, keys: set[str]) -> str:
        return "for example " + min(prompt.id for prompt in self.prompts[entry] if prompt_key(prompt) in keys)

    def entries(self, stages: Sequence[str]) -> tuple[LedgerEntry, ...]:
        """Return the rows of the report: one for each prompt set of a stage."""
        rows = []
        for name in stages:
            stage = self.config.stages[name]
            for entry in stage.entries:
                if entry not in self.prompts:
                    continue
                keys = self.keys(entry)
                earlier = {other for other, _ in self._earlier_uses(name, keys)} if stage.uses_labels else set()
                note = f"labels used before by {', '.join(sorted(earlier))}, as configured" if earlier else ""
                rows.append(LedgerEntry(name, entry, len(keys), stage.uses_labels, note))
        return tuple(rows)
