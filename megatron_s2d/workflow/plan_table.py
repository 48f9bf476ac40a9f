"""Prints the plan of a run as tables: models, prompts, jobs with the reason they run, labels. No torch here."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_s2d.config.needed_stages import tokenizer_choice
from megatron_s2d.config.stage import validation_of
from megatron_s2d.data.tokenizer import template_fingerprint, tokenizer_fingerprint
from megatron_s2d.formatting import printable
from megatron_s2d.workflow.plan import Job
from megatron_s2d.workflow.preflight import Preflight
from megatron_s2d.workflow.service_checks import service_lines


def print_plan(preflight: Preflight, jobs: list[Job], run_dir: Path, console: Console) -> None:
    """Print the resolved models, prompts, jobs, labels and fingerprints."""
    config = preflight.config
    parallel = config.parallel
    console.print(
        f"{config.name}: {len(preflight.stages)} stages, {len(jobs) - len(preflight.stages)} evaluations, in "
        f"{run_dir}; tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x "
        f"context {parallel.context_parallel_size} x data {parallel.data_parallel_size}, expert "
        f"{parallel.expert_model_parallel_size}: {parallel.world_size} ranks per stage, "
        f"{config.max_parallel_stages} stages at a time; {config.precision}; tokenizer {config.tokenizer} "
        f"({len(preflight.tokenizers.common)} tokens)",
        markup=False,
        highlight=False,
    )
    models = Table(
        "model", "family", "layers", "hidden", "heads", "kv", "head dim", "vocabulary", "parameters", title="Models"
    )
    for name, spec in preflight.specs.items():
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
    data = Table("prompts", "number", "longest", "too long", "repeated ids", title="Prompts")
    for name, prompts in preflight.prompts.items():
        longest = f"{'' if prompts.is_exact else '<= '}{prompts.longest}"
        data.add_row(name, str(len(prompts)), longest, str(preflight.dropped[name]), str(preflight.duplicates[name]))
    console.print(data)
    table = Table("job", "type", "model", "steps", "inputs", "action", title="Jobs")
    for job in jobs:
        stage = config.stages[job.stage]
        kind = stage.type if job.is_stage else "evaluation"
        steps = str(preflight.totals.get(job.id, job.total))
        inputs = ", ".join(name.removeprefix("stages/") for name in job.inputs)
        action = job.action if job.action in ("run", "reuse") else printable(f"{job.action}: {job.reason}")
        table.add_row(job.id, kind, config.model_of(job.stage), steps, inputs, action)
    console.print(table)
    if any(shape.validation is not None for shape in preflight.shapes.values()):
        console.print(_validations(preflight))
    console.print(_labels(preflight))
    for line in [*service_lines(config, preflight.services), *_fingerprint_lines(preflight)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print_warnings(preflight, console)


def print_warnings(preflight: Preflight, console: Console) -> None:
    """Print what is likely a mistake of the user, though it can run."""
    for warning in preflight.likely_mistakes:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def _validations(preflight: Preflight) -> Table:
    """Return the table of validations inside stages, with the number of responses that they cost."""
    table = Table("stage", "data", "every", "times", "responses", "tokens each", "decides", title="Validation")
    for name, shape in preflight.shapes.items():
        config = validation_of(preflight.config.stages[name])
        if config is None or shape.validation is None:
            continue
        data = ", ".join(f"{curve} ({entry})" for curve, entry in config.data.items())
        sizes = [min(len(preflight.prompts[entry]), config.num_prompts or 10**12) for entry in config.data.values()]
        responses = shape.validation.count * sum(sizes) * config.samples_per_prompt
        decides = [] if config.best is None else [f"best {config.best.metric}"]
        decides += [f"until {rule.rule}" for rule in config.until]
        limit = shape.validation.sampling.max_response_length
        counts = (f"{config.interval_steps} steps", f"{shape.validation.count}", f"{responses:,}", f"{limit:,}")
        table.add_row(name, data, *counts, ", ".join(decides) or "nothing")
    return table


def _labels(preflight: Preflight) -> Table:
    """Return the table of labels by stage, with the number of distinct labels of the run."""
    entries = preflight.ledger.entries(preflight.stages)
    used = preflight.ledger.num_labels_used(preflight.stages)
    table = Table("stage", "prompts", "number", "labels", "note", title=f"Labels: {used} distinct ones used")
    for entry in entries:
        labels = "used" if entry.labels_used else "not used"
        table.add_row(entry.stage, entry.prompts, str(entry.num_prompts), labels, entry.note)
    return table


def _fingerprint_lines(preflight: Preflight) -> list[str]:
    """Return digests that tell whether two runs use the same tokens and chat template."""
    config, common = preflight.config, preflight.tokenizers.common
    own = {name for name in preflight.specs if tokenizer_choice(config, name) != (config.tokenizer, None)}
    tokenizers = {"": common} | {f" of {name}": preflight.tokenizers.of_model(name) for name in sorted(own)}
    sizes = ", ".join(f"{name} {spec.vocab_size}" for name, spec in preflight.specs.items())
    return [
        line
        for suffix, tokenizer in tokenizers.items()
        for line in (
            f"tokenizer fingerprint{suffix}  {tokenizer_fingerprint(tokenizer)}",
            f"template fingerprint{suffix}   {template_fingerprint(tokenizer, config.template_date)}",
        )
    ] + [f"vocabulary: tokenizer {len(common)}, models {sizes}"]
