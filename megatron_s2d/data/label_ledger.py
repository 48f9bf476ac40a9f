"""Which labelled prompts every stage uses, and the refusal to use a held-out label twice. No torch here.

A label is used where a verifier judges responses to its prompt (GRPO, SG-OPD) or where its reference solution is
trained on (supervised). Prompts are compared by their tokens, so the same problem under two names counts as one. Stages that
only sample from prompts (teacher cache, OPD) use no label.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.records import Prompt
from megatron_s2d.report.results import LedgerEntry


def prompt_key(prompt: Prompt) -> str:
    """Digest of a prompt's tokens."""
    return hashlib.sha256(prompt.token_ids.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Ledger:
    """``prompts``: entry (or entry/half) -> prompts, for every name that a stage or the evaluation uses."""

    config: WorkflowConfig
    prompts: Mapping[str, Sequence[Prompt]]

    def keys(self, name: str) -> set[str]:
        """Digests of the prompts of an entry."""
        return {prompt_key(prompt) for prompt in self.prompts[name]}

    def labels_of(self, stage_name: str) -> list[str]:
        """The entries whose labels a stage uses (generated corpora are not labelled data)."""
        stage = self.config.stages[stage_name]
        return [entry for entry in stage.entries if stage.uses_labels and entry in self.prompts]

    def check(self, stages: Sequence[str]) -> None:
        """Refuse evaluation problems in training data, and a stage whose labels an earlier stage of its chain used."""
        evaluation = {key for entry in self.config.evaluation.entries for key in self.keys(entry)}
        for name in stages:
            for entry in self.labels_of(name):
                own = self.keys(entry)
                shared = own & evaluation
                if shared:
                    raise UserError(
                        f"stages.{name}: {len(shared)} of the prompts of '{entry}' are evaluation problems "
                        f"({self._example(entry, shared)}); take them out of one of the two"
                    )
                self._check_reuse(name, entry, own)

    def _check_reuse(self, name: str, entry: str, own: set[str]) -> None:
        if getattr(self.config.stages[name], "label_reuse", "allow") == "allow":
            return
        for earlier, shared in self._earlier_uses(name, own):
            raise UserError(
                f"stages.{name}.prompts: the labels of {len(shared)} prompts of '{entry}' were used before, by stage "
                f"'{earlier}' ({self._example(entry, shared)}): they are not held out. Use the other half, or set "
                "label_reuse: allow for a replay control"
            )

    def _earlier_uses(self, name: str, own: set[str]) -> Iterator[tuple[str, set[str]]]:
        """(stage, prompts of ``own`` whose labels it used) for the stages that lead to ``name``."""
        for earlier in self.config.chain(name)[:-1]:
            for used in self.labels_of(earlier):
                shared = own & self.keys(used)
                if shared:
                    yield earlier, shared

    def _example(self, entry: str, keys: set[str]) -> str:
        return "for example " + min(prompt.id for prompt in self.prompts[entry] if prompt_key(prompt) in keys)

    def entries(self, stages: Sequence[str]) -> tuple[LedgerEntry, ...]:
        """What the report shows: one entry a stage that reads prompts."""
        found = []
        for name in stages:
            stage = self.config.stages[name]
            for entry in stage.entries:
                if entry not in self.prompts:
                    continue
                own = self.keys(entry)
                before = {earlier for earlier, _ in self._earlier_uses(name, own)} if stage.uses_labels else set()
                note = f"labels used before by {', '.join(sorted(before))}, as configured" if before else ""
                found.append(LedgerEntry(name, entry, len(own), stage.uses_labels, note))
        return tuple(found)
