"""The plan of a run as tables for a terminal: what runs and why, models, layout, memory. No torch here."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.preflight import Preflight


def print_plan(checked: Preflight, jobs: list[Job], run_dir: Path, console: Console) -> None:
    """Everything that was resolved, without running it."""
    config = checked.config
    parallel = config.parallel
    console.print(
        f"{config.name}: {len(checked.stages)} stages, {len(jobs) - len(checked.stages)} evaluations, in {run_dir}; "
        f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x context "
        f"{parallel.context_parallel_size} x data {parallel.data_parallel_size}, expert "
        f"{parallel.expert_model_parallel_size}: {parallel.world_size} ranks a stage, {config.num_workers} stages at a "
        f"time; {config.precision}; tokenizer {config.tokenizer} ({len(checked.tokenizer)} tokens)",
        markup=False,
        highlight=False,
    )
    models = Table(
        "model", "family", "layers", "hidden", "heads", "kv", "head dim", "vocabulary", "parameters", title="Models"
    )
    for name, spec in checked.specs.items():
        models.add_row(
            name,
            spec.family,
            str(spec.num_layers),
            str(spec.hidden_size),
            str(spec.num_attention_heads),
            str(spec.num_query_groups),
            str(spec.head_dim),
            str(spec.vocab_size),
            f"{spec.num_parameters:,}",
        )
    console.print(models)
    data = Table("prompts", "number", "longest", "too long", "repeated", title="Prompts")
    for name, prompts in checked.prompts.items():
        longest = max(len(prompt.token_ids) for prompt in prompts)
        data.add_row(name, str(len(prompts)), str(longest), str(checked.dropped[name]), str(checked.duplicates[name]))
    console.print(data)
    table = Table("job", "type", "model", "steps", "inputs", "does", title="Jobs")
    for job in jobs:
        stage = config.stages[job.stage]
        kind = stage.type if job.is_stage else "evaluation"
        steps = str(checked.totals.get(job.id, job.total))
        inputs = ", ".join(name.removeprefix("stages/") for name in job.inputs)
        does = job.action if job.action in ("run", "reuse") else f"{job.action}: {job.reason}"
        table.add_row(job.id, kind, config.model_of(job.stage), steps, inputs, does)
    console.print(table)
    memory = Table(
        "stage",
        "weights",
        "gradients",
        "optimizer",
        "frozen",
        "activations",
        "keys, values",
        "total",
        title="Estimated memory of one rank (not measured)",
    )
    for name, found in checked.memory.items():
        parts = (found.weights, found.gradients, found.optimizer, found.frozen, found.activations, found.cache)
        memory.add_row(name, *(human_bytes(value) for value in (*parts, found.total)))
    console.print(memory)


def human_bytes(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
