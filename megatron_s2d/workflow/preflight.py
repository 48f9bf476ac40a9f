"""Checks a workflow before anything runs: engine, models, data, labels, lengths and layout, all without a GPU.

The result also has the sizes from which ``estimate/`` computes memory and time. No torch here, except to read a Hugging
Face tokenizer or checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_s2d.config.forward_kl import ForwardKlConfig, TeacherCacheConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.needed_stages import (
    evaluated_stages,
    needed_stages,
    prompt_choices,
    prompt_model,
    tokenizer_choice,
)
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.precision import check_shapes
from megatron_s2d.config.routing_replay import check_routing_replay
from megatron_s2d.config.sft import SftConfig
from megatron_s2d.config.stage import TrainingStageConfig, validated_entries
from megatron_s2d.config.stages import Stage
from megatron_s2d.config.weights import ExpoConfig, LoadCheckpointConfig
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.label_ledger import LabelLedger
from megatron_s2d.data.model_tokenizers import ModelTokenizers
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.prompts import PromptSet, fitting_prompts, is_corpus, prompts_of, short_prompts
from megatron_s2d.errors import UserError
from megatron_s2d.estimate.memory import StageMemory
from megatron_s2d.estimate.stage_memory import StageShape, stage_memory, stage_shape
from megatron_s2d.models.families import check_layout
from megatron_s2d.rollout.sglang.api_key import read_api_key
from megatron_s2d.teachers.service.info import TeacherInfo
from megatron_s2d.verify import labels_as_text
from megatron_s2d.workflow.environment_checks import check_environments
from megatron_s2d.workflow.likely_mistakes import setting_warnings, vocabulary_warnings
from megatron_s2d.workflow.service_checks import describe_services, service_specs, service_warnings
from megatron_s2d.workflow.stage_checks import (
    check_adapter_of,
    check_domain_weights,
    check_domains,
    check_expo,
    check_graded,
    check_length,
    check_same_vocabulary,
)
from megatron_s2d.workflow.tokenizer_checks import check_tokenizers
from megatron_s2d.workflow.tracking_checks import check_trackers
from megatron_s2d.workflow.validation_checks import check_validation, validation_warnings
from megatron_s2d.workflow.view_checks import check_views


@dataclasses.dataclass(frozen=True)
class Preflight:
    """A checked workflow with its tokenizers, models, prompts and sizes."""

    config: WorkflowConfig
    tokenizers: ModelTokenizers
    stages: Sequence[str]  # those that the arms need, inputs first
    specs: Mapping[str, ModelSpec]  # entry of `models` -> architecture
    prompts: Mapping[str, PromptTable]  # entry or entry/half -> prompts, in the first rendering
    dropped: Mapping[str, int]  # entry -> prompts longer than max_prompt_length; also "entry in stages.NAME"
    duplicates: Mapping[str, int]  # entry -> rows dropped because they repeat an id
    totals: Mapping[str, int]  # job id -> batches of an evaluation or teacher cache
    shapes: Mapping[str, StageShape]  # stage -> its sizes over all data ranks
    notices: Sequence[str]  # what the user should know about tokenizers, templates and end tokens

    def memory(self, *, on_gpu: bool, transformer_engine: bool = True) -> dict[str, StageMemory]:
        """Return stage -> memory of the rank with the largest peak; see ``estimate.stage_memory``."""
        builds = {"on_gpu": on_gpu, "transformer_engine": transformer_engine}
        specs = self.specs | service_specs(self.services)
        return {name: stage_memory(self.config, name, specs, self.shapes[name], **builds) for name in self.stages}

    @functools.cached_property
    def services(self) -> Mapping[str, TeacherInfo | str]:
        """Served teachers: what their servers say of themselves, or why they do not answer now."""
        return describe_services(self.config, self.stages)

    @property
    def warnings(self) -> list[str]:
        """What the user should know of, one line each: dropped prompts, and ``likely_mistakes``."""
        too_long = [
            f"{count} prompts of {name} are longer than max_prompt_length and were dropped"
            for name, count in self.dropped.items()
            if count
        ]
        repeated = [
            f"{count} rows of {name} repeat an earlier id and were dropped"
            for name, count in self.duplicates.items()
            if count
        ]
        return [*too_long, *repeated, *self.likely_mistakes]

    @property
    def likely_mistakes(self) -> list[str]:
        """What can run but is often not meant: templates, end tokens, servers, labels, ``likely_mistakes.py``."""
        sizes = {name: len(self.tokenizers.of_model(name)) for name in self.specs}
        models = vocabulary_warnings(self.config, self.specs, sizes)
        return [
            *self.notices, *models, *self.server_warnings, *service_warnings(self.config, self.stages),
            *self.label_warnings, *setting_warnings(self.config),
            *validation_warnings(self.config, self.stages, self.ledger),
        ]  # fmt: skip

    @property
    def server_warnings(self) -> list[str]:
        """That servers on other machines are used without a key; empty if none are."""
        urls = self.config.rollout.sglang.unprotected_urls if uses_servers(self.config) else []
        if not urls:
            return []
        return [
            f"{', '.join(urls)}: whoever reaches these servers can use them and change their weights; start them with "
            "SGLang's --api-key and name the file with the key in rollout.sglang.api_key_file"
        ]

    @property
    def label_warnings(self) -> list[str]:
        """That labels which are graded are compared as text; empty if none are."""
        config = self.config
        graded = {entry for name in self.stages for entry in _graded_entries(config.stages[name])}
        graded |= {entry for name in self.stages for entry in validated_entries(config.stages[name])}
        graded |= {*config.evaluation.entries, *(check.prompts for check in config.pass_rate_checks)}
        texts = {entry: labels_as_text(prompts) for entry, prompts in self.prompts.items() if entry in graded}
        return [f"data '{entry}': {text}" for entry, text in texts.items() if text]

    @functools.cached_property
    def ledger(self) -> LabelLedger:
        """The labels that each stage uses."""
        return LabelLedger(self.config, self.prompts)


def check_workflow(config: WorkflowConfig, tokenizer_cache: Path) -> Preflight:
    """Load tokenizer and data and check every stage; raise a one-line ``UserError`` for the first problem."""
    check_trackers(config.tracking)
    _check_engine(config)
    _check_context_parallel(config)
    _check_virtual_pipeline(config)
    tokenizers, stages = ModelTokenizers(config, tokenizer_cache), needed_stages(config)
    used_models = {config.model_of(name) for name in stages}
    specs = {
        name: _resolve(config, name, len(tokenizers.of_model(name))) for name in config.models if name in used_models
    }
    check_routing_replay(config, stages, specs)
    for name in used_models:
        _check_weights(config, name, stages)
    notices = check_tokenizers(config, tokenizers, stages)
    check_environments(config, tokenizers, stages)
    renderings = [
        _load_prompts(config, stages, tokenizer, tokenizers.of_prompts()) for tokenizer in tokenizers.of_prompts()
    ]
    sets = renderings[0]
    prompts = {name: prompt_set.prompts for name, prompt_set in sets.items()}
    views = {name: _view(config, tokenizers, renderings, name) for name in stages}
    for name in stages:
        _check_stage(config, name, specs, views[name])
        check_validation(config, name, specs, views[name])
    notices += check_views(config, tokenizers, specs, views)
    evaluation = config.evaluation
    for entry in evaluation.entries:
        check_graded(prompts[entry], f"evaluation.prompts: '{entry}'")
    _check_distinct(evaluation.entries, prompts)
    for name in evaluated_stages(config):
        for entry in evaluation.entries:
            check_length(config, f"evaluation of {name}", name, specs, views[name][entry], evaluation.sampling)
    for index, check in enumerate(config.pass_rate_checks):
        check_graded(prompts[check.prompts], f"pass_rate_checks.{index}.prompts: '{check.prompts}'")
    shapes = {
        name: stage_shape(config, name, views[name], tokenizers.of_model(prompt_model(config, name))) for name in stages
    }
    dropped = {name: prompt_set.dropped_too_long for name, prompt_set in sets.items()} | _dropped_by_stages(
        config, stages, views
    )
    duplicates = {name: prompt_set.dropped_duplicates for name, prompt_set in sets.items()}
    totals = _totals(config, stages, prompts, views)
    preflight = Preflight(config, tokenizers, stages, specs, prompts, dropped, duplicates, totals, shapes, notices)
    preflight.ledger.check(stages)
    return preflight


def _check_engine(config: WorkflowConfig) -> None:
    """Check addresses and keys of servers; ``server_room.check_servers`` checks that others can be started here."""
    sglang = config.rollout.sglang
    for name in sglang.urls:
        if name not in config.models:
            raise UserError(f"rollout.sglang.urls: '{name}' is not among `models` ({', '.join(config.models)})")
    if not uses_servers(config):
        return
    if sglang.api_key_file is not None:
        read_api_key(sglang.api_key_file)
    if sglang.urls and config.max_parallel_stages > 1:
        raise UserError(
            f"max_parallel_stages is {config.max_parallel_stages}, but the servers of rollout.sglang.urls serve one "
            "model at a time: set max_parallel_stages to 1, or remove the urls to start servers for each stage"
        )


def uses_servers(config: WorkflowConfig) -> bool:
    """Return whether a stage samples from servers or has its teacher on them."""
    engines = [config.rollout.engine, *(getattr(stage, "teacher_engine", "") for stage in config.stages.values())]
    return "sglang" in engines


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


def _check_virtual_pipeline(config: WorkflowConfig) -> None:
    """Virtual pipeline stages need an engine other than the in-process one."""
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    if virtual > 1 and config.rollout.engine == "megatron":
        raise UserError(
            "the in-process engine does not generate with virtual pipeline stages: set rollout.engine to sglang, or "
            f"parallel.virtual_pipeline_model_parallel_size to 1 (it is {virtual})"
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
        from megatron_s2d.models.published import check_files  # loads torch

        try:
            check_files(path)
        except UserError as error:
            raise UserError(f"models.{name}: {error}") from None


def _load_prompts(
    config: WorkflowConfig, stages: Sequence[str], tokenizer: Any, others: Sequence[Any]
) -> dict[str, PromptSet]:
    """Load every entry (or half) that a stage, a pass-rate check or the evaluation reads; corpora have no prompts."""
    names = [*config.evaluation.entries, *(check.prompts for check in config.pass_rate_checks)]
    names += [entry for name in stages for entry in config.stages[name].entries]
    names += [entry for name in stages for entry in validated_entries(config.stages[name])]
    return {
        name: prompts_of(config, name, tokenizer, others)
        for name in dict.fromkeys(names)
        if not is_corpus(config.data[name.partition("/")[0]])
    }


def _dropped_by_stages(
    config: WorkflowConfig, stages: Sequence[str], views: Mapping[str, Mapping[str, PromptTable]]
) -> dict[str, int]:
    """Return "entry in stages.NAME" -> prompts beyond the stage's own ``max_prompt_length``, where there are any."""
    counts = {
        f"{entry} in stages.{name}": len(prompts) - len(short_prompts(config, name, entry, prompts))
        for name in stages
        for entry, prompts in views[name].items()
        if entry in config.stages[name].entries
    }
    return {where: count for where, count in counts.items() if count}


def _graded_entries(stage: Stage) -> Sequence[str]:
    """Return the entries whose responses the stage grades."""
    samples = isinstance(stage, (GrpoConfig, OpdConfig, TeacherCacheConfig))
    return stage.entries if samples and stage.grades else ()


def _view(
    config: WorkflowConfig, tokenizers: ModelTokenizers, renderings: Sequence[Mapping[str, PromptSet]], name: str
) -> dict[str, PromptTable]:
    """Return entry -> prompts as stage ``name`` renders them. renderings: in the order of ``of_prompts``."""
    rendering = renderings[0]
    if len(renderings) > 1:
        rendering = renderings[prompt_choices(config).index(tokenizer_choice(config, prompt_model(config, name)))]
    return {entry: prompt_set.prompts for entry, prompt_set in rendering.items()}


def _check_stage(
    config: WorkflowConfig, name: str, specs: Mapping[str, ModelSpec], prompts: Mapping[str, PromptTable]
) -> None:
    stage = config.stages[name]
    where = f"stages.{name}"
    if not isinstance(stage, TeacherCacheConfig):
        for relation, other in stage.inputs().items():
            if relation.partition(".")[0] in ("teacher", "reference", "cache", "tuned"):
                check_same_vocabulary(config, where, name, relation, other, specs)
    if isinstance(stage, (GrpoConfig, OpdConfig, TeacherCacheConfig)):
        for entry in stage.entries:
            read = fitting_prompts(config, name, entry, prompts[entry])
            check_length(config, where, name, specs, read, stage.sampling)
            if entry in _graded_entries(stage):
                check_graded(read, f"{where}.prompts: '{entry}'")
    if isinstance(stage, OpdConfig):
        check_domains(f"{where}.teacher", stage.teacher or stage.teacher_service, stage.entries, prompts)
        check_domain_weights(where, stage.domain_weights, stage.entries, prompts)
    if isinstance(stage, GrpoConfig) and stage.teacher_advantage is not None:
        advantage = stage.teacher_advantage
        teachers = advantage.teacher or advantage.teacher_service
        check_domains(f"{where}.teacher_advantage.teacher", teachers, stage.entries, prompts)
    if isinstance(stage, ExpoConfig):
        check_expo(config, where, stage)
    if isinstance(stage, TrainingStageConfig):
        check_adapter_of(config, where, stage, specs[config.model_of(name)])
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
        read = fitting_prompts(config, name, stage.data, prompts[stage.data])
        missing = read.select(~read.has_solution)
        if missing:
            raise UserError(
                f"{where}.data: {len(missing)} prompts of '{stage.data}' have no reference solution (for example "
                f"{missing[0].id}); name the `solution` column of the data"
            )
    if isinstance(stage, ForwardKlConfig):
        cache = config.stages[stage.cache]
        if cache.representation == "sampled_token":
            raise UserError(
                f"{where}.cache: '{stage.cache}' has representation sampled_token; forward KL needs distributions"
            )
    num_responses = getattr(stage, "global_batch_size", None)
    if isinstance(stage, GrpoConfig | OpdConfig):
        num_prompts = sum(len(fitting_prompts(config, name, entry, prompts[entry])) for entry in stage.entries)
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


def _check_distinct(entries: Sequence[str], prompts: Mapping[str, PromptTable]) -> None:
    """Refuse a problem in two entries: the rows of an evaluation are identified by problem."""
    entry_of: dict[str, str] = {}
    for entry in entries:
        for problem in prompts[entry].values("id"):
            if problem in entry_of:
                raise UserError(
                    f"evaluation.prompts: problem {problem} is in both '{entry_of[problem]}' and '{entry}'; "
                    "remove it from one of them"
                )
            entry_of[problem] = entry


def _totals(
    config: WorkflowConfig,
    stages: Sequence[str],
    prompts: Mapping[str, PromptTable],
    views: Mapping[str, Mapping[str, PromptTable]],
) -> dict[str, int]:
    """Return job id -> number of batches, for the progress of evaluations and teacher caches."""
    evaluation = config.evaluation
    totals = {}
    for name in stages:
        stage = config.stages[name]
        if isinstance(stage, TeacherCacheConfig):
            num_prompts = len(fitting_prompts(config, name, stage.prompts, views[name][stage.prompts]))
            totals[f"stages/{name}"] = math.ceil(num_prompts / stage.generation_batch_size)
    for name in evaluated_stages(config):
        batches = [math.ceil(len(prompts[entry]) / evaluation.eval_batch_size) for entry in evaluation.entries]
        totals[f"evaluations/{name}"] = sum(batches)
    for number, check in enumerate(config.pass_rate_checks):
        num_problems = min(check.num_prompts, len(prompts[check.prompts]))
        totals[f"pass_rate_checks/{number}-{check.stage}"] = math.ceil(num_problems / evaluation.eval_batch_size)
    return totals
