"""What all ranks know of every response of a step: a row of numbers, gathered over data-parallel ranks on the host.

A response is named by numbers (the index of its prompt, which all ranks have, its step and its repeat), so that ids do
not travel, and a row has ``ROW_BYTES``, at most 64.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_s2d.parallel.layout import Layout
from megatron_s2d.records import OPTIONAL_ARRAYS, AnySample, Prompt, RemoteSample, Sample
from megatron_s2d.rollout.engine import Request

LABEL_BYTES = 20  # of a verifier's label; longer ones are cut
_FINISH_REASONS = ("stop", "length", "abort", "data")
_ROW = np.dtype(
    [
        ("prompt", "<u4"),  # index, see PromptNumbers
        ("step", "<u4"),
        ("repeat", "<u2"),
        ("generation", "<u2"),  # index in the group
        ("length", "<u4"),
        ("response_length", "<u4"),
        ("temperature", "<f8"),
        ("reward", "<f8"),  # NaN: not graded
        ("arrays", "<u2"),  # bits of OPTIONAL_ARRAYS
        ("finish_reason", "u1"),
        ("num_turns", "u1"),  # of the model; 255 for more
        ("label", f"S{LABEL_BYTES}"),
    ]
)
ROW_BYTES = _ROW.itemsize


@dataclasses.dataclass(frozen=True)
class GroupKey:
    """Where a group comes from: its id and its seeds are functions of this."""

    prompt_id: str
    step: int  # that the group was submitted for
    repeat: int  # number of earlier groups of the same prompt in that step

    @property
    def group_id(self) -> str:
        """Id of the group, unique in a run."""
        return f"{self.prompt_id}@{self.step}.{self.repeat}"

    def sample_id(self, generation: int, num_generations: int) -> str:
        """Id of a response of the group, unique in a run."""
        return f"{self.prompt_id}#{self.repeat * num_generations + generation}@{self.step}"


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The requests for one prompt."""

    key: GroupKey
    requests: Sequence[Request]


class PromptNumbers(Protocol):
    """Numbers for prompts that every rank can look up: the index in a list that all ranks have."""

    def index(self, key: GroupKey) -> int:
        """Return the number of the prompt of ``key`` among those of its step."""
        ...

    def prompt(self, step: int, index: int) -> Prompt:
        """Return the prompt of that number."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ListedPrompts:
    """The numbers of a few prompts, the same at every step."""

    prompts: Sequence[Prompt]

    @functools.cached_property
    def _indices(self) -> dict[str, int]:
        return {prompt.id: index for index, prompt in enumerate(self.prompts)}

    def index(self, key: GroupKey) -> int:
        """See ``PromptNumbers``."""
        return self._indices[key.prompt_id]

    def prompt(self, step: int, index: int) -> Prompt:
        """See ``PromptNumbers``."""
        return self.prompts[index]


def flatten(groups: Sequence[Group]) -> list[Request]:
    """Return the requests of ``groups``, group by group."""
    return [request for group in groups for request in group.requests]


def gather_responses(
    groups: Sequence[Group], samples: Sequence[Sample], prompts: PromptNumbers, layout: Layout
) -> list[AnySample]:
    """Return the samples of all data-parallel ranks: this rank's own, and what it knows of the others.

    samples: of this rank, of whole groups; with rewards on the data-parallel leader. Groups are in turn of the ranks:
    the first of each, the second of each, and so on. Collective.
    """
    num_generations = max((len(group.requests) for group in groups), default=0)
    own_rows = _rows(groups, samples, prompts)
    own_rows = layout.host_replica.broadcast(own_rows.view(np.uint8), layout.leader_in_replica).view(_ROW)
    details = _details(samples, layout)
    num_generations = int(layout.host_dp.max(np.array([num_generations]))[0])
    gathered = gather_rows(layout, own_rows)
    own = [
        dataclasses.replace(sample, **_verdict(reward, label), verifier_detail=detail)
        for sample, reward, label, detail in zip(
            samples, *(gathered[layout.dp_rank][name].tolist() for name in ("reward", "label")), details, strict=True
        )
    ]
    ranks = np.repeat(np.arange(len(gathered)), [len(rows) for rows in gathered])
    rows = np.concatenate(gathered)
    order = np.lexsort((ranks, _turns(rows, ranks)))  # stable: in a group as on its rank
    result = _remote_samples(rows, ranks, prompts, num_generations)
    for index, sample in zip(np.flatnonzero(ranks == layout.dp_rank).tolist(), own, strict=True):
        result[index] = sample
    return [result[index] for index in order.tolist()]


def gather_rows(layout: Layout, rows: np.ndarray) -> list[np.ndarray]:
    """Return the rows of every data-parallel rank. Collective."""
    return layout.host_dp.all_gather(rows)


def gather_keys(keys: Sequence[GroupKey], prompts: PromptNumbers, layout: Layout) -> list[GroupKey]:
    """Return the keys of all data-parallel ranks, in the order of ranks. Collective."""
    numbers = np.array([(prompts.index(key), key.step, key.repeat) for key in keys], dtype=np.int64).reshape(-1)
    gathered = np.concatenate(layout.host_dp.all_gather(numbers)).reshape(-1, 3).tolist()
    return [GroupKey(prompts.prompt(step, index).id, step, repeat) for index, step, repeat in gathered]


def _rows(groups: Sequence[Group], samples: Sequence[Sample], prompts: PromptNumbers) -> np.ndarray:
    """Return the rows of ``samples``."""
    origins = {
        request.id: (group.key, generation) for group in groups for generation, request in enumerate(group.requests)
    }
    rows = np.zeros(len(samples), dtype=_ROW)
    for row, sample in zip(rows, samples, strict=True):
        key, generation = origins[sample.id]
        row["prompt"], row["step"], row["repeat"] = prompts.index(key), key.step, key.repeat
        row["generation"], row["length"] = generation, sample.length
        row["response_length"], row["temperature"] = sample.response_length, sample.temperature
        row["reward"] = np.nan if sample.reward is None else sample.reward
        row["arrays"] = sum(1 << bit for bit, name in enumerate(OPTIONAL_ARRAYS) if sample.has(name))
        row["num_turns"] = min(sample.num_turns, 255)
        row["finish_reason"] = _FINISH_REASONS.index(sample.finish_reason)
        row["label"] = (sample.verifier_label or "").encode()[:LABEL_BYTES]
    return rows


def _details(samples: Sequence[Sample], layout: Layout) -> list[str | None]:
    """Return what the verifier said on the leader of this replica; it stays in the replica."""
    text = json.dumps([sample.verifier_detail for sample in samples])
    data = layout.host_replica.broadcast(np.frombuffer(text.encode(), np.uint8).copy(), layout.leader_in_replica)
    details: list[str | None] = json.loads(data.tobytes())
    return details


def _turns(rows: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Return the number of each row's group, counted on its rank. rows, ranks: in the order of ranks."""
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    keys = np.stack([rows["prompt"], rows["step"], rows["repeat"], ranks]).astype(np.int64)
    changes: np.ndarray = np.concatenate([[0], (keys[:, 1:] != keys[:, :-1]).any(axis=0).cumsum()])
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ranks)) + 1])  # of the ranks that have rows
    return changes - np.repeat(changes[starts], np.diff([*starts, len(rows)]))


def _verdict(reward: float, label: bytes) -> dict[str, float | str | None]:
    if math.isnan(reward):
        return {"reward": None, "verifier_label": None}
    return {"reward": reward, "verifier_label": label.decode(errors="ignore")}


def _remote_samples(
    rows: np.ndarray, ranks: np.ndarray, prompts: PromptNumbers, num_generations: int
) -> list[AnySample]:
    """Return what ``rows`` say of each response. ranks: data-parallel rank that holds it."""
    groups: dict[tuple[int, int, int], tuple[Prompt, GroupKey]] = {}
    arrays: dict[int, frozenset[str]] = {}
    samples: list[AnySample] = []
    columns = (rows[name].tolist() for name in _ROW.names)  # one look at a row's field takes longer than all of them
    for prompt_index, step, repeat, *values, rank in zip(*columns, ranks.tolist(), strict=True):
        generation, length, response_length, temperature, reward, bits, finish_reason, num_turns, label = values
        if (prompt_index, step, repeat) not in groups:
            prompt = prompts.prompt(step, prompt_index)
            groups[prompt_index, step, repeat] = prompt, GroupKey(prompt.id, step, repeat)
        prompt, key = groups[prompt_index, step, repeat]
        if bits not in arrays:
            arrays[bits] = frozenset(name for bit, name in enumerate(OPTIONAL_ARRAYS) if bits >> bit & 1)
        samples.append(
            RemoteSample(
                id=key.sample_id(generation, num_generations),
                prompt_id=prompt.id,
                group_id=key.group_id,
                domain=prompt.domain,
                length=length,
                response_length=response_length,
                temperature=temperature,
                finish_reason=_FINISH_REASONS[finish_reason],
                dp_rank=rank,
                num_turns=num_turns,
                arrays=arrays[bits],
                **_verdict(reward, label),
            )
        )
    return samples
