"""The responses that a run has saved, as the report shows them: of training, evaluations and validations. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_s2d.artifacts.files import read_jsonl
from megatron_s2d.artifacts.shapes import GradedResponse, ResponseRow, checked_rows
from megatron_s2d.report.results import RolloutExample
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.preflight import Preflight

_MAX_SAMPLES = 1200  # of a run
_FIELDS = ("response", "reward", "verifier_label", "finish_reason", "verifier_detail", "episode")


@dataclasses.dataclass(frozen=True)
class RunSamples:
    """A part of the responses of a run, evenly spaced in each file, and the number of all."""

    examples: tuple[RolloutExample, ...]
    total: int


def run_samples(jobs: Sequence[Job], preflight: Preflight) -> RunSamples:
    """Read the responses of ``jobs``; of every file the same number, fewer where many files have some."""
    files = [item for job in jobs if job.pass_rate_check is None for item in _files(job)]
    limit = max(4, _MAX_SAMPLES // max(1, len(files)))
    examples, total = [], 0
    prompts = _Prompts(preflight)
    for job, source, path in files:
        rows = checked_rows(read_jsonl(path), ResponseRow if source == "training" else GradedResponse, str(path))
        total += len(rows)
        chosen = [rows[index * len(rows) // limit] for index in range(limit)] if len(rows) > limit else rows
        examples += [_example(job.stage, source, row, prompts) for row in chosen]
    return RunSamples(tuple(examples), total)


def _files(job: Job) -> Iterator[tuple[Job, str, Path]]:
    """Yield the job, where its responses come from, and their file."""
    path = job.directory.path
    names = [("training", path / "rollouts.jsonl")] if job.is_stage else [("evaluation", path / "responses.jsonl")]
    names += [(f"validation: {file.stem}", file) for file in sorted(path.glob("validation/step_*/*.jsonl"))]
    yield from ((job, source, file) for source, file in names if file.exists())


class _Prompts:
    """The texts of prompts by the id of their problem, for responses that were saved without them."""

    def __init__(self, preflight: Preflight):
        self._tables = list(preflight.prompts.values())
        self._index: dict[str, tuple[int, int]] | None = None

    def text(self, problem_id: str) -> str:
        """Return the prompt; empty if no data set has the problem."""
        if self._index is None:
            self._index = {
                name: (number, row)
                for number, table in enumerate(self._tables)
                for row, name in enumerate(table.values("id"))
            }
        place = self._index.get(problem_id)
        return "" if place is None else self._tables[place[0]][place[1]].text


def _example(stage: str, source: str, row: Mapping[str, Any], prompts: _Prompts) -> RolloutExample:
    problem_id = str(row["problem_id"])
    return RolloutExample(
        stage,
        problem_id,
        row["prompt"] if "prompt" in row else prompts.text(problem_id),
        answer=row.get("answer"),
        tokens=row.get("tokens", ()),
        source=source,
        step=row.get("step"),
        **{name: row[name] for name in _FIELDS if name in row},
    )
