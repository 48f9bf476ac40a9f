"""Checks a workflow before anything runs: engine, models, data, labels, lengths and layout, all without a GPU.

The result also has the sizes from which ``estimate/`` computes memory and time. No torch here, except to read a Hugging
Face tokenizer or checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_s2d.config.forward_kl import ForwardKlConfig, TeacherCacheConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.precision import check_shapes
from megatron_s2d.config.sft import SftConfig
from megatron_s2d.config.training import SamplingConfig
from megatron_s2d.config.weights import ExpoConfig, LoadCheckpointConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.label_ledger import LabelLedger
from megatron_s2d.data.prompts import PromptSet, is_corpus, prompts_of
from megatron_s2d.data.tokenizer import load_tokenizer
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.memory import StageMemory
from megatron_s2d.estimate.stage_memory import StageShape, stage_memory, stage_shape
from megatron_s2d.models.families import check_layout
from megatron_s2d.records import Prompt
from megatron_s2d.verify import check_labels
from megatron_s2d.workflow.plan import evaluated_stages, needed_stages


@dataclasses.dataclass(frozen=True)
class Preflight:
    """A checked workflow with its tokenizer, models, prompts and sizes."""

    config: WorkflowConfig
    tokenizer: Any
    stages: Sequence[str]  # those that the arms need, inputs first
    specs: Mapping[str, ModelSpec]  # entry of `models` -> architecture
    prompts: Mapping[str, Sequence[Prompt]]  # entry or entry/half -> prompts
    dropped: Mapping[str, int]  # entry -> prompts longer than max_prompt_length
    duplicates: Mapping[str, int]  # entry -> rows dropped because they repeat an id
    totals: Mapping[str, int]  # job id -> batches of an evaluation or teacher cache
    shapes: Mapping[str, StageShape]  # stage -> its sizes over all data ranks

    def memory(self, *, on_gpu: bool) -> dict[str, StageMemory]:
        """Return stage -> memory of the rank with the largest peak."""
        return {
            name: stage_memory(self.config, name, self.specs, self.shapes[name], on_gpu=on_gpu) for name in self.stages
        }

    @property
    def ledger(self) -> LabelLedger:
        """The labels that each stage uses."""
        return LabelLedger(self.config, self.prompts)

    def ledger_json(self) -> str:
        """Return the ledger with the ids of all labelled prompts as JSON text."""
        entries = [dataclasses.asdict(entry) for entry in self.ledger.entries(self.stages)]
        for entry in entries:
            if entry["labels_used"]:
                entry["prompt_ids"] = [prompt.id for prompt in self.prompts[entry["prompts"]]]
        return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def check_workflow(config: WorkflowConfig, tokenizer_cache: Path) -> Preflight:
    """Load tokenizer and data and check every stage; raise a one-line ``UserError`` for the first problem."""
    _check_engine(config)
    _check_context_parallel(config)
    tokenizer = load_tokenizer(config.tokenizer, tokenizer_cache)
    stages = needed_stages(config)
    used_models = {config.model_of(name) for name in stages}
    specs = {name: _resolve(config, name, len(tokenizer)) for name in config.models if name in used_models}
    for name in used_models:
        _check_weights(config, name, stages)
    sets = _load_prompts(config, stages, tokenizer)
    prompts = {name: prompt_set.prompts for name, prompt_set in sets.items()}
    for name in stages:
        _check_stage(config, name, specs, prompts)
    evaluation = config.evaluation
    for entry in evaluation.entries:
        _check_graded(prompts[entry], f"evaluation.prompts: '{entry}'")
    _check_distinct(evaluation.entries, prompts)
    for name in evaluated_stages(config):
        for entry in evaluation.entries:
            _check_length(config, f"evaluation of {name}", name, specs, prompts[entry], evaluation.sampling)
    for index, check in enumerate(config.pass_rate_checks):
        _check_graded(prompts[check.prompts], f"pass_rate_checks.{index}.prompts: '{check.prompts}'")
    shapes = {name: stage_shape(config, name, prompts, tokenizer) for name in stages}
    dropped = {name: prompt_set.dropped_too_long for name, prompt_set in sets.items()}
    duplicates = {name: prompt_set.dropped_duplicates for name, prompt_set in sets.items()}
    totals = _totals(config, stages, prompts)
    preflight = Preflight(config, tokenizer, stages, specs, prompts, dropped, duplicates, totals, shapes)
    preflight.ledger.check(stages)
    return preflight


def _check_engine(config: WorkflowConfig) -> None:
    """Check that the servers which the workflow needs can be started or have addresses."""
    sglang = config.rollout.sglang
    for name in sglang.urls:
        if name not in config.models:
            raise UserError(f"rollout.sglang.urls: '{name}' is not among `models` ({', '.join(config.models)})")
    served = [name for name, stage in config.stages.items() if getattr(stage, "teacher_engine", "") == "sglang"]
    if config.rollout.engine != "sglang" and not served:
        return
    if sglang.urls and config.max_parallel_stages > 1:
        raise UserError(
            f"max_parallel_stages is {config.max_parallel_stages}, but the servers of rollout.sglang.urls serve one "
            "model at a time: set max_parallel_stages to 1, or remove the urls to start servers for each stage"
        )
    if set(sglang.urls) >= {config.model_of(name) for name in needed_stages(config)}:
        return
    if sglang.python is not None and shutil.which(sglang.python) is None:
        raise UserError(f"rollout.sglang.python: {sglang.python}: no such program")
    if sglang.python is None and importlib.util.find_spec("sglang") is None:
        raise UserError(
            "the workflow needs SGLang servers, but sglang is not installed: install megatron-s2d[sglang], set "
            "rollout.sglang.python to an interpreter that has it, or set rollout.sglang.urls to running servers"
        )


def _check_context_parallel(config: WorkflowConfig) -> None:
    """Context parallelism needs packed sequences, and an engine other than the in-process one."""
    for name in needed_stages(config):
        stage, layouts = config.stages[name], [config.parallel]
        layouts += [config.frozen_parallel(other) for other in stage.inputs().values()]
        size = max(layout.context_parallel_size for layout in layouts)
        if size > 1 and not stage.micro_batch.sequence_packing:
            raise UserError(
                f"stages.{name}: context_parallel_size {size} needs packed sequences: set "
                "micro_batch.sequence_packing to true"
            )
    if config.parallel.context_parallel_size > 1 and config.rollout.engine == "megatron":
        raise UserError(
            "the in-process engine does not support context parallelism: set rollout.engine to sglang, or "
            f"parallel.context_parallel_size to 1 (it is {config.parallel.context_parallel_size})"
        )


def _resolve(config: WorkflowConfig, name: str, vocab_size: int) -> ModelSpec:
    try:
        spec = config.models[name].resolve(vocab_size)
        frozen = [config.frozen_parallel(stage) for stage in config.stages if config.model_of(stage) == name]
        for layout in [config.parallel, *frozen]:
            check_layout(spec, layout)
        if config.fp8 is not None:
            for layout in [config.parallel, *(frozen if config.fp8.frozen else [])]:
                check_shapes(config.fp8, spec, layout)
    except UserError as error:
        raise UserError(f"models.{name}: {error}") from None
    return spec


def _check_weights(config: WorkflowConfig, name: str, stages: Sequence[str]) -> None:
    """Check files, tensor names and shapes of a checkpoint that a stage starts from, reading headers only."""
    path = config.models[name].path
    starts = [stage for stage in stages if getattr(config.stages[stage], "model", None) == name]
    if path is None:
        for stage in starts:
            if isinstance(config.stages[stage], LoadCheckpointConfig):
                raise UserError(f"stages.{stage}: model '{name}' has no `path` to load pretrained weights from")
    elif starts:
        from megatron_s2d.models.hf_checkpoint import HfCheckpoint  # loads torch

        try:
            HfCheckpoint(path)
        except UserError as error:
            raise UserError(f"models.{name}: {error}") from None


def _load_prompts(config: WorkflowConfig, stages: Sequence[str], tokenizer: Any) -> dict[str, PromptSet]:
    """Load every entry (or half) that a stage, a pass-rate check or the evaluation reads; corpora have no prompts."""
    names = [*config.evaluation.entries, *(check.prompts for check in config.pass_rate_checks)]
    names += [entry for name in stages for entry in config.stages[name].entries]
    return {
        name: prompts_of(config, name, tokenizer)
        for name in dict.fromkeys(names)
        if not is_corpus(config.data[name.partition("/")[0]])
    }


def _check_stage(
    config: WorkflowConfig, name: str, specs: Mapping[str, ModelSpec], prompts: Mapping[str, Sequence[Prompt]]
) -> None:
    stage = config.stages[name]
    where = f"stages.{name}"
    if not isinstance(stage, TeacherCacheConfig):
        for relation, other in stage.inputs().items():
            if relation.partition(".")[0] in ("teacher", "reference", "cache", "tuned"):
                _check_same_vocabulary(config, where, name, relation, other, specs)
    if isinstance(stage, (GrpoConfig, OpdConfig, TeacherCacheConfig)):
        for entry in stage.entries:
            _check_length(config, where, name, specs, prompts[entry], stage.sampling)
            if stage.uses_labels:
                _check_graded(prompts[entry], f"{where}.prompts: '{entry}'")
    if isinstance(stage, OpdConfig):
        _check_domains(where, stage, prompts)
    if isinstance(stage, ExpoConfig):
        _check_expo(config, where, stage)
    overlong_buffer = stage.overlong_buffer if isinstance(stage, GrpoConfig) else None
    if overlong_buffer is not None and overlong_buffer.len > stage.sampling.max_response_length:
        raise UserError(
            f"{where}.overlong_buffer.len: {overlong_buffer.len} is larger than sampling.max_response_length "
            f"{stage.sampling.max_response_length}"
        )
    needs_norm_length = isinstance(stage, SftConfig) and stage.loss_agg_mode == "seq_mean_token_sum_norm"
    if needs_norm_length and stage.norm_length is None and stage.data is not None and stage.data not in prompts:
        raise UserError(
            f"{where}.norm_length: loss_agg_mode seq_mean_token_sum_norm divides by the longest response, but the "
            f"corpus '{stage.data}' has no end: give norm_length"
        )
    if isinstance(stage, SftConfig) and stage.data in prompts:
        missing = [prompt.id for prompt in prompts[stage.data] if prompt.solution_token_ids is None]
        if missing:
            raise UserError(
                f"{where}.data: {len(missing)} prompts of '{stage.data}' have no reference solution (for example "
                f"{missing[0]}); name the `solution` column of the data"
            )
    if isinstance(stage, ForwardKlConfig):
        cache = config.stages[stage.cache]
        if cache.representation == "sampled_token":
            raise UserError(
                f"{where}.cache: '{stage.cache}' has representation sampled_token; forward KL needs distributions"
            )
    num_responses = getattr(stage, "global_batch_size", None)
    if isinstance(stage, GrpoConfig | OpdConfig):
        num_prompts = sum(len(prompts[entry]) for entry in stage.entries)
        if stage.train_batch_size > num_prompts:
            raise UserError(
                f"{where}.train_batch_size: {stage.train_batch_size} prompts a step, but its data has {num_prompts}: "
                "a step would repeat prompts; lower it or add data"
            )
        num_responses = stage.train_batch_size * stage.num_generations // stage.num_mini_batches
    if num_responses is not None and num_responses < config.parallel.data_parallel_size:
        raise UserError(
            f"{where}: a mini-batch of {num_responses} responses is smaller than data_parallel_size "
            f"{config.parallel.data_parallel_size}; enlarge the batch"
        )


def _check_domains(where: str, stage: OpdConfig, prompts: Mapping[str, Sequence[Prompt]]) -> None:
    if isinstance(stage.teacher, str):
        return
    domains = {prompt.domain for entry in stage.entries for prompt in prompts[entry]}
    for domain in sorted(domains - set(stage.teacher)):
        raise UserError(
            f"{where}.teacher: no teacher for the domain '{domain}' (domains with one: {', '.join(stage.teacher)}); "
            "add one, or correct the `domain` of the data"
        )


def _check_expo(config: WorkflowConfig, where: str, stage: ExpoConfig) -> None:
    base = config.models[config.model_of(stage.base)]
    for name in stage.tuned:
        if config.models[config.model_of(name)] != base:
            raise UserError(
                f"{where}.tuned: '{name}' and '{stage.base}' have different models, so their weights cannot be combined"
            )


def _check_same_vocabulary(
    config: WorkflowConfig, where: str, name: str, relation: str, other: str, specs: Mapping[str, ModelSpec]
) -> None:
    model, other_model = config.model_of(name), config.model_of(other)
    if specs[model].vocab_size != specs[other_model].vocab_size:
        raise UserError(
            f"{where}.{relation}: model '{other_model}' has a vocabulary of {specs[other_model].vocab_size} and "
            f"'{model}' one of {specs[model].vocab_size}: teacher and student must share one"
        )


def _check_length(
    config: WorkflowConfig,
    where: str,
    stage: str,
    specs: Mapping[str, ModelSpec],
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
) -> None:
    model = config.model_of(stage)
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    length, limit = len(longest.token_ids) + sampling.max_response_length, specs[model].max_position_embeddings
    if length > limit:
        raise UserError(
            f"{where}: prompt {longest.id} ({len(longest.token_ids)} tokens) and max_response_length "
            f"{sampling.max_response_length} exceed the {limit} positions of model '{model}'; reduce "
            "lengths.max_prompt_length or sampling.max_response_length"
        )


def _check_graded(prompts: Sequence[Prompt], where: str) -> None:
    try:
        check_labels(prompts)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_distinct(entries: Sequence[str], prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Refuse a problem in two entries: the rows of an evaluation are identified by problem."""
    entry_of: dict[str, str] = {}
    for entry in entries:
        for prompt in prompts[entry]:
            if prompt.id in entry_of:
                raise UserError(
                    f"evaluation.prompts: problem {prompt.id} is in both '{entry_of[prompt.id]}' and '{entry}'; "
                    "remove it from one of them"
                )
            entry_of[prompt.id] = entry


def _totals(config: WorkflowConfig, stages: Sequence[str], prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, int]:
    """Return job id -> number of batches, for the progress of evaluations and teacher caches."""
    evaluation = config.evaluation
    totals = {}
    for name in stages:
        stage = config.stages[name]
        if isinstance(stage, TeacherCacheConfig):
            totals[f"stages/{name}"] = math.ceil(len(prompts[stage.prompts]) / stage.generation_batch_size)
    for name in evaluated_stages(config):
        batches = [math.ceil(len(prompts[entry]) / evaluation.eval_batch_size) for entry in evaluation.entries]
        totals[f"evaluations/{name}"] = sum(batches)
    for number, check in enumerate(config.pass_rate_checks):
        num_problems = min(check.num_prompts, len(prompts[check.prompts]))
        totals[f"pass_rate_checks/{number}-{check.stage}"] = math.ceil(num_problems / evaluation.eval_batch_size)
    return totals
