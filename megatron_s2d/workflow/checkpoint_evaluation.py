"""The workflow of ``s2d eval --model``: one checkpoint, one file of labelled problems, no training. No torch here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_s2d.config.base import apply_overrides, parse
from megatron_s2d.config.hf_config import published_files
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.workflow.process_pool import num_gpus


@dataclasses.dataclass(frozen=True)
class CheckpointEvaluation:
    """Arguments of ``s2d eval --model``."""

    model: Path
    data: Path
    schema: str
    tokenizer: str | None  # None: of the model
    num_samples: int
    temperature: float
    max_response_length: int
    limit: int | None


def checkpoint_workflow(request: CheckpointEvaluation, overrides: Sequence[str] = ()) -> WorkflowConfig:
    """Return a workflow with the checkpoint as its only stage and arm. overrides: KEY=VALUE, as of ``s2d run --set``.

    Weights are float32 on a CPU and bfloat16 on a GPU.
    """
    if not request.model.is_dir():
        raise UserError(f"--model {request.model}: no such directory")
    name = _name(request.model)
    document = {
        "name": f"eval-{name}-{_name(request.data.with_suffix(''))}"[:100],
        "tokenizer": request.tokenizer or str(published_files(request.model)),
        "precision": "bfloat16" if num_gpus() else "float32",
        "models": {name: {"path": str(request.model)}},
        "data": {
            "problems": {"type": "file", "path": str(request.data), "schema": request.schema, "limit": request.limit}
        },
        "stages": {name: {"type": "load_checkpoint", "role": name, "model": name}},
        "arms": {name: name},
        "evaluation": {
            "prompts": "problems",
            "samples_per_prompt": request.num_samples,
            "sampling": {"temperature": request.temperature, "max_response_length": request.max_response_length},
        },
    }
    return parse(WorkflowConfig, apply_overrides(document, list(overrides)), "s2d eval")


def _name(path: Path) -> str:
    """Return the last part of a path as a name of stages and files."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).lstrip("._-")
    return text[:60] or "model"
