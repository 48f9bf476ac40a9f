"""The records of a run, ``Prompt`` and ``Sample``, and their JSON-lines form. No torch here.

A sample stays on the data-parallel rank that made it; the others know it as a ``RemoteSample``.

All per-token arrays of a ``Sample`` have the length of prompt plus response, and entry ``t`` belongs to token ``t``
(entry 0 of a log-probability array is 0.0: nothing predicts the first token). The shift to labels happens once, in
``data/packing.py``. ``None`` means "not computed"; each field has one writer, named beside it, and is written once
(``dataclasses.replace`` makes the next record).

``routed_experts`` is the exception: row ``t`` holds the experts that token ``t`` passed through when token ``t + 1``
was sampled, with the weights that sampled that one (the rows of the prompt: with those of the first response token).
The last token passed through none. They are experts of the model that sampled, and mean nothing to another one.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_s2d.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, tokenized. Written by ``data/prompts.py``."""

    id: str  # stable over runs: names the source and the row (for example "gsm8k/test/17")
    token_ids: np.ndarray  # [prompt_length] int64, through the chat template
    text: str  # the rendered prompt, for people
    domain: str  # routes to a teacher and is reported separately, for example "math"
    verifier: str | None  # what config.reward.read_verifier reads: a name, or settings; None: nothing to verify
    answer: str | None  # the label that the verifier checks against; None: unlabelled
    solution_token_ids: np.ndarray | None = None  # [solution_length] int64 reference solution, for supervised stages
    environment: str | None = None  # what config.environment.read_environment reads; None: one turn and its verifier


@dataclasses.dataclass(frozen=True, slots=True)
class WeightVersionSpan:
    """Response tokens ``[start, stop)`` (indices into ``Sample.token_ids``) were sampled by weights ``version``."""

    start: int
    stop: int
    version: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with one response, or with an episode: turns of the model and observations, in the order of reading.

    ``length`` below is prompt plus all that follows. Response tokens are those that the model sampled; observations of
    an environment between two turns are not among them (``response_mask``).
    """

    id: str  # engine or data source: unique in a run, "<prompt id>#<index>@<step>"
    prompt_id: str
    group_id: str  # "<prompt id>@<step>.<repeat>": samples of one group share a prompt and are compared by GRPO
    domain: str
    seed: int  # of the sampler; 0 where nothing was sampled
    token_ids: np.ndarray  # [length] int64
    response_mask: np.ndarray  # [length] bool; True where a token was generated and may enter a loss
    temperature: float  # that the response was sampled at
    finish_reason: str  # "stop", "length", "abort" or "data"
    rollout_log_probs: np.ndarray | None = None  # [length] float32, engine: of the sampled tokens at `temperature`
    weight_versions: tuple[WeightVersionSpan, ...] = ()  # engine
    routed_experts: np.ndarray | None = (
        None  # [length - 1, layers, experts per token] uint8 or int16, engine (see below)
    )
    reward: float | None = None  # verifier
    verifier_label: str | None = None  # verifier: "correct", or one word on why not, such as "no_answer"
    verifier_detail: str | None = None  # verifier: what a function or a judge said about the response
    turn_rewards: tuple[float, ...] | None = None  # environment: of each turn, in `reward`; None: all are 0
    old_log_probs: np.ndarray | None = None  # [length] float32, trainer under the weights before the update
    teacher_log_probs: np.ndarray | None = None  # [length] float32, teacher scoring (of the sampled tokens)
    reference_log_probs: np.ndarray | None = None  # [length] float32, reference scoring
    advantages: np.ndarray | None = None  # [length] float32, objective

    @property
    def length(self) -> int:
        """Number of prompt and response tokens."""
        return len(self.token_ids)

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first response token (all tokens without a response)."""
        hits = np.flatnonzero(self.response_mask)
        return int(hits[0]) if hits.size else len(self.token_ids)

    @property
    def response_length(self) -> int:
        """Number of response tokens."""
        return int(self.response_mask.sum())

    @property
    def num_turns(self) -> int:
        """Number of turns of the model: 1 without an environment."""
        return len(self.turn_starts)

    @property
    def turn_starts(self) -> np.ndarray:
        """Index of the first token of each turn of the model: [turns] int64."""
        mask = self.response_mask
        return np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))

    def require(self, field: str, step: str) -> np.ndarray | float | int:
        """Return the value of ``field``, or raise a ``UserError`` with the ``step`` that writes it."""
        value: np.ndarray | float | int | None = getattr(self, field)
        if value is None:
            raise UserError(f"sample {self.id} has no {field}: run {step} before this step")
        return value

    def has(self, array: str) -> bool:
        """Return whether the per-token array ``array`` was computed."""
        return getattr(self, array) is not None


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteSample:
    """What every rank knows of a sample that another data-parallel rank holds. Fields as in ``Sample``.

    The samples of an update are a list of ``Sample`` and ``RemoteSample`` in the same order on every rank.
    """

    id: str
    prompt_id: str
    group_id: str
    domain: str
    length: int  # tokens of prompt and response
    response_length: int
    temperature: float
    finish_reason: str
    dp_rank: int  # that holds the sample
    reward: float | None = None
    verifier_label: str | None = None
    num_turns: int = 1
    arrays: frozenset[str] = frozenset()  # its optional per-token arrays that were computed

    @classmethod
    def of(cls, sample: Sample, dp_rank: int) -> RemoteSample:
        """Return what other ranks know of ``sample``, which ``dp_rank`` holds."""
        return cls(
            id=sample.id,
            prompt_id=sample.prompt_id,
            group_id=sample.group_id,
            domain=sample.domain,
            length=sample.length,
            response_length=sample.response_length,
            temperature=sample.temperature,
            finish_reason=sample.finish_reason,
            dp_rank=dp_rank,
            reward=sample.reward,
            verifier_label=sample.verifier_label,
            num_turns=sample.num_turns,
            arrays=frozenset(name for name in OPTIONAL_ARRAYS if sample.has(name)),
        )

    def require(self, field: str, step: str) -> float | str:
        """See ``Sample.require``."""
        value: float | str | None = getattr(self, field)
        if value is None:
            raise UserError(f"sample {self.id} has no {field}: run {step} before this step")
        return value

    def has(self, array: str) -> bool:
        """See ``Sample.has``."""
        return array in self.arrays


type AnySample = Sample | RemoteSample

# The per-token arrays of a sample that are computed after, or beside, its tokens.
OPTIONAL_ARRAYS = tuple(
    field.name for field in dataclasses.fields(Sample) if field.type == "np.ndarray | None" and field.default is None
)


def own_samples(samples: Sequence[AnySample]) -> list[Sample]:
    """Return the samples that this data-parallel rank holds."""
    return [sample for sample in samples if isinstance(sample, Sample)]


def with_array(samples: Sequence[AnySample], name: str, values: Sequence[np.ndarray | None]) -> list[AnySample]:
    """Return ``samples`` with the per-token array ``name``; the values of remote samples are not read."""
    result: list[AnySample] = []
    for sample, value in zip(samples, values, strict=True):
        if isinstance(sample, Sample):
            change: dict[str, Any] = {name: value}
            result.append(dataclasses.replace(sample, **change))
        else:
            result.append(dataclasses.replace(sample, arrays=sample.arrays | {name}))
    return result


def without_array(sample: AnySample, name: str) -> AnySample:
    """Return ``sample`` without the per-token array ``name``."""
    if isinstance(sample, Sample):
        change: dict[str, Any] = {name: None}
        return dataclasses.replace(sample, **change)
    return dataclasses.replace(sample, arrays=sample.arrays - {name})


def sample_to_json(sample: Sample) -> str:
    """Return one JSON line; float32 values survive the round trip bit for bit."""
    fields = {}
    for field in dataclasses.fields(sample):
        value = getattr(sample, field.name)
        if field.name == "routed_experts":
            if value is not None:
                fields[field.name] = [str(value.dtype), value.shape, base64.b64encode(value.tobytes()).decode()]
            continue
        if isinstance(value, np.ndarray):
            value = value.astype(int).tolist() if value.dtype == bool else value.tolist()
        elif field.name == "weight_versions":
            value = [[span.start, span.stop, span.version] for span in value]
        fields[field.name] = value
    return json.dumps(fields, ensure_ascii=False)


_DTYPES = {"token_ids": np.int64, "response_mask": np.bool_}


def sample_from_json(line: str) -> Sample:
    """Invert ``sample_to_json``; raise ``UserError`` for unknown or missing fields."""
    fields = json.loads(line)
    names = {field.name for field in dataclasses.fields(Sample)}
    routes = fields.pop("routed_experts", None)
    for later in ("verifier_detail", "turn_rewards"):  # not in records from before functions, judges, environments
        fields.setdefault(later, None)
    if set(fields) != names - {"routed_experts"}:
        raise UserError(f"not a sample record: unexpected or missing fields {sorted(set(fields) ^ names)}")
    for name, value in fields.items():
        if isinstance(value, list) and name not in ("weight_versions", "turn_rewards"):
            fields[name] = np.asarray(value, dtype=_DTYPES.get(name, np.float32))
    if routes is not None:
        dtype, shape, content = routes
        fields["routed_experts"] = np.frombuffer(base64.b64decode(content), dtype).reshape(shape)
    fields["weight_versions"] = tuple(WeightVersionSpan(*span) for span in fields["weight_versions"])
    if fields["turn_rewards"] is not None:
        fields["turn_rewards"] = tuple(fields["turn_rewards"])
    return Sample(**fields)


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        return [sample_from_json(line) for line in file if line.strip()]
