"""Samples as a teacher reads them: its own prompt, then the student's response (docs/teachers.md).

Token t of a response is the same token in both; what is computed for it is matched by its index in the response, so
prompts may have any lengths. Whatever carries values back takes the difference of the two lengths, which every rank
knows of every sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.errors import UserError
from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import OPTIONAL_ARRAYS, AnySample, Prompt, Sample


@dataclasses.dataclass(frozen=True, eq=False)
class PromptViews:
    """The prompts as teachers read them, by domain (``None``: of all domains); others are read as they are."""

    tables: Mapping[str | None, PromptTable]

    def has(self, domain: str | None) -> bool:
        """Return whether problems of ``domain`` are read in a view; None: any."""
        return bool(self.tables) if domain is None else domain in self.tables or None in self.tables

    def samples(self, samples: Sequence[AnySample], holders: Layout) -> list[AnySample]:
        """Return ``samples``, which the data-parallel ranks of ``holders`` hold, as the teacher reads them.

        Collective over those ranks, which tell each other the lengths. Per-token arrays of the student are left out.
        """
        with holders.host_dp.same_outcome():
            own = [sample for sample in samples if isinstance(sample, Sample)]
            prompts = self._found({sample.prompt_id: sample.domain for sample in own})
        viewed = [
            behind(prompts[sample.prompt_id].token_ids, sample)
            if isinstance(sample, Sample) and sample.prompt_id in prompts
            else sample
            for sample in samples
        ]
        lengths = holders.host_dp.sum(
            np.array([sample.length if isinstance(sample, Sample) else 0 for sample in viewed], dtype=np.int64)
        )
        return [
            sample if isinstance(sample, Sample) else dataclasses.replace(sample, length=length, arrays=frozenset())
            for sample, length in zip(viewed, lengths.tolist(), strict=True)
        ]

    def read_own(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return samples of this rank as the teacher reads them; not collective."""
        prompts = self._found({sample.prompt_id: sample.domain for sample in samples if self.has(sample.domain)})
        return [
            behind(prompts[sample.prompt_id].token_ids, sample) if sample.prompt_id in prompts else sample
            for sample in samples
        ]

    def prompts(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return ``prompts`` as the teacher reads them."""
        found = self._found({prompt.id: prompt.domain for prompt in prompts})
        return [found.get(prompt.id, prompt) for prompt in prompts]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, or of tables of texts what none is longer than."""
        return max((table.longest for table in self.tables.values()), default=0)

    def longest_beyond(self, limit: int) -> int:
        """Return the tokens of the longest prompt if it has more than ``limit``, else 0."""
        return max((int(table.longer_than(limit)[1].max(initial=0)) for table in self.tables.values()), default=0)

    def _found(self, domains: Mapping[str, str]) -> dict[str, Prompt]:
        """Return id -> the prompt in the view, for those that have one. domains: by id."""
        found: dict[str, Prompt] = {}
        for domain, table in self.tables.items():
            ids = [id_ for id_, of_prompt in domains.items() if domain in (None, of_prompt)]
            try:
                found |= table.find(ids)
            except KeyError as error:
                raise UserError(f"prompt {error.args[0]} has no view: it is not among the stage's prompts") from None
        return found


def as_student_reads(
    samples: Sequence[AnySample], prompts: Sequence[Prompt], read: Sequence[Prompt]
) -> list[AnySample]:
    """Return samples that a teacher generated for the prompts ``read`` behind the ``prompts`` that the student reads.

    read: one for each of ``prompts``.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    shifts = {
        prompt.id: len(prompt.token_ids) - len(other.token_ids) for prompt, other in zip(prompts, read, strict=True)
    }
    return [
        behind(by_id[sample.prompt_id].token_ids, sample)
        if isinstance(sample, Sample)
        else dataclasses.replace(sample, length=sample.length + shifts[sample.prompt_id], arrays=frozenset())
        for sample in samples
    ]


def behind(prompt_ids: np.ndarray, sample: Sample) -> Sample:
    """Return the response of ``sample`` behind the prompt ``prompt_ids`` [length], without arrays by token."""
    start = sample.prompt_length
    without: dict[str, Any] = dict.fromkeys(OPTIONAL_ARRAYS)
    return dataclasses.replace(
        sample,
        token_ids=np.concatenate([prompt_ids, sample.token_ids[start:]]),
        response_mask=np.concatenate([np.zeros(len(prompt_ids), dtype=bool), sample.response_mask[start:]]),
        **without,
    )


def from_view(values: np.ndarray, sample: Sample) -> np.ndarray:
    """Return ``values`` [tokens of the view, ...] at the response tokens of ``sample`` [length, ...]; 0 elsewhere."""
    num_tokens = sample.length - sample.prompt_length
    result = np.zeros((sample.length, *values.shape[1:]), dtype=values.dtype)
    result[sample.prompt_length :] = values[len(values) - num_tokens :]
    return result


def score_in_view(
    samples: Sequence[AnySample],
    domain: str | None,
    views: PromptViews | None,
    holders: Layout,
    score: Callable[[list[AnySample]], list[np.ndarray | None]],
) -> list[np.ndarray | None]:
    """Return ``score`` of the samples of ``domain`` as the teacher reads them, [length] each as the student does.

    holders: as in ``PromptViews.samples``, collective over its ranks.
    """
    if views is None or not views.has(domain):
        return score(list(samples))
    scores = score(views.samples(samples, holders))
    return [
        from_view(values, sample) if isinstance(sample, Sample) and values is not None else None
        for sample, values in zip(samples, scores, strict=True)
    ]
