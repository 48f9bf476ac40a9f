"""Settings that can run but are often not meant, as lines of ``--dry-run`` and before a run. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import psutil

from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.needed_stages import needed_stages
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.memory import StageMemory
from megatron_s2d.formatting import format_bytes
from megatron_s2d.report.contrasts import arm_of, check_matched

_UNUSED_IDS = 0.05  # share of a model's vocabulary that tokenizers leave free: padding to a multiple of 64 or 128


def setting_warnings(config: WorkflowConfig) -> Iterator[str]:
    """Yield contrasts that the report will refuse, greedy decoding where samples should differ, unused stages."""
    yield from _refused_contrasts(config)
    yield from _greedy_samples(config)
    needed = set(needed_stages(config))
    unused = [name for name in config.stages if name not in needed]
    if unused:
        yield (
            f"stages: no arm, evaluation or pass-rate check needs {', '.join(unused)}: "
            f"{'it does' if len(unused) == 1 else 'they do'} not run; name {'it' if len(unused) == 1 else 'them'} in "
            "`arms` or `also_evaluate`, or remove the keys"
        )


def _refused_contrasts(config: WorkflowConfig) -> Iterator[str]:
    arms = {name: arm_of(config, name) for name in config.arms} if config.contrasts else {}
    for contrast in config.contrasts:
        try:
            check_matched(contrast, arms)
        except UserError as error:
            yield str(error)


def _greedy_samples(config: WorkflowConfig) -> Iterator[str]:
    for name in needed_stages(config):
        stage = config.stages[name]
        if isinstance(stage, GrpoConfig) and stage.num_generations > 1 and stage.sampling.temperature == 0:
            yield (
                f"stages.{name}.sampling.temperature: 0 makes all {stage.num_generations} responses to a prompt equal, "
                "so every advantage is 0 and nothing is learned; set it to 1"
            )
    counts = config.evaluation.samples_per_prompt
    most = max(counts.values()) if isinstance(counts, dict) else counts
    if most > 1 and config.evaluation.sampling.temperature == 0:
        yield (
            f"evaluation.sampling.temperature: 0 makes all {most} samples of a problem equal: avg@{most} is that of "
            "one sample; set samples_per_prompt to 1, or the temperature to what you deploy with"
        )


def vocabulary_warnings(
    config: WorkflowConfig, specs: Mapping[str, ModelSpec], sizes: Mapping[str, int]
) -> Iterator[str]:
    """Yield models from a ``path`` with far more ids than their tokenizer has, which is likely another family's.

    sizes: entry of ``models`` -> tokens of its tokenizer.
    """
    for name, spec in specs.items():
        free = spec.vocab_size - sizes[name]
        if config.models[name].path is not None and free > _UNUSED_IDS * spec.vocab_size:
            yield (
                f"models.{name}: the model has {spec.vocab_size} ids and its tokenizer "
                f"{config.models[name].tokenizer or config.tokenizer} only {sizes[name]}: is it this model's own?"
            )


def memory_warnings(config: WorkflowConfig, memory: Mapping[str, StageMemory]) -> Iterator[str]:
    """Yield a line if CPU ranks of a stage need more memory than this machine has. memory: of one rank."""
    total = psutil.virtual_memory().total
    ranks = config.parallel.world_size * config.max_parallel_stages
    large = {name: item for name, item in memory.items() if item.total * ranks > total}
    if large:
        name, item = max(large.items(), key=lambda entry: entry[1].total)
        others = f" ({len(large) - 1} other stages do not fit either)" if len(large) > 1 else ""
        yield (
            f"stages.{name}: {ranks} CPU ranks need about {format_bytes(item.total * ranks)}, most of it in the "
            f"phase {item.peak_phase}, and this machine has {format_bytes(total)}{others}; docs/preflight.md says what "
            "to lower"
        )
