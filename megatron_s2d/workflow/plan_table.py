"""The plan of a run as tables for a terminal: what runs and why, models, prompts, labels. No torch here."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_s2d.data.tokenizer import template_fingerprint, tokenizer_fingerprint
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
        f"{parallel.expert_model_parallel_size}: {parallel.world_size} ranks a stage, {config.max_parallel_stages} stages at a "
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
    console.print(_labels(checked))
    for line in _fingerprints(checked):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _labels(checked: Preflight) -> Table:
    """Which stage uses which labels, and what all of them cost together."""
    entries = checked.ledger.entries(checked.stages)
    used = {key for entry in entries if entry.labels_used for key in checked.ledger.keys(entry.prompts)}
    table = Table("stage", "prompts", "number", "labels", "note", title=f"Labels: {len(used)} distinct ones are used")
    for entry in entries:
        labels = "used" if entry.labels_used else "not used"
        table.add_row(entry.stage, entry.prompts, str(entry.num_prompts), labels, entry.note)
    return table


def _fingerprints(checked: Preflight) -> list[str]:
    """Digests by which two runs see whether their tokens mean the same."""
    tokenizer = checked.tokenizer
    sizes = ", ".join(f"{name} {spec.vocab_size}" for name, spec in checked.specs.items())
    return [
        f"tokenizer fingerprint  {tokenizer_fingerprint(tokenizer)}",
        f"template fingerprint   {template_fingerprint(tokenizer)}",
        f"vocabulary: tokenizer {len(tokenizer)}, models {sizes}",
    ]
