"""The records of a run, ``Prompt`` and ``Sample``, and their JSON-lines form. No torch here.

All per-token arrays of a ``Sample`` have the length of prompt plus response, and entry ``t`` belongs to token ``t``
(entry 0 of a log-probability array is 0.0: nothing predicts the first token). The shift to labels happens once, in
``data/packing.py``. ``None`` means "not computed"; each field has one writer, named beside it, and is written once
(``dataclasses.replace`` makes the next record).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from megatron_s2d.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, tokenized. Written by ``data/prompts.py``."""

    id: str  # stable over runs: names the source and the row (for example "gsm8k/test/17")
    token_ids: np.ndarray  # [prompt_length] int64, through the chat template
    text: str  # the rendered prompt, for people
    domain: str  # routes to a teacher and is reported separately, for example "math"
    verifier: str | None  # key of megatron_s2d.verify.VERIFIERS; None: nothing to verify
    answer: str | None  # the label that the verifier checks against; None: unlabelled
    solution_token_ids: np.ndarray | None = None  # [solution_length] int64 reference solution, for supervised stages


@dataclasses.dataclass(frozen=True, slots=True)
class WeightVersionSpan:
    """Response tokens ``[start, stop)`` (indices into ``Sample.token_ids``) were sampled by weights ``version``."""

    start: int
    stop: int
    version: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with one response. ``length`` below is prompt plus response."""

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
    reward: float | None = None  # verifier
    verifier_label: str | None = None  # verifier: one word on how the reward came about, such as "correct", "no_answer"
    old_log_probs: np.ndarray | None = None  # [length] float32, trainer under the weights before the update
    teacher_log_probs: np.ndarray | None = None  # [length] float32, teacher scoring (of the sampled tokens)
    reference_log_probs: np.ndarray | None = None  # [length] float32, reference scoring
    advantages: np.ndarray | None = None  # [length] float32, objective

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first response token (all tokens without a response)."""
        hits = np.flatnonzero(self.response_mask)
        return int(hits[0]) if hits.size else len(self.token_ids)

    @property
    def response_length(self) -> int:
        """Number of response tokens."""
        return int(self.response_mask.sum())

    def require(self, field: str, step: str) -> np.ndarray | float | int:
        """Return the value of ``field``, or raise a ``UserError`` with the ``step`` that writes it."""
        value: np.ndarray | float | int | None = getattr(self, field)
        if value is None:
            raise UserError(f"sample {self.id} has no {field}: run {step} before this step")
        return value


def sample_to_json(sample: Sample) -> str:
    """Return one JSON line; float32 values survive the round trip bit for bit."""
    fields = {}
    for field in dataclasses.fields(sample):
        value = getattr(sample, field.name)
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
    if set(fields) != names:
        raise UserError(f"not a sample record: unexpected or missing fields {sorted(set(fields) ^ names)}")
    for name, value in fields.items():
        if isinstance(value, list) and name != "weight_versions":
            fields[name] = np.asarray(value, dtype=_DTYPES.get(name, np.float32))
    fields["weight_versions"] = tuple(WeightVersionSpan(*span) for span in fields["weight_versions"])
    return Sample(**fields)


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        return [sample_from_json(line) for line in file if line.strip()]
