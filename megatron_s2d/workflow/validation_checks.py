"""Checks of the validation inside stages: labels, lengths, engine, and what is likely a mistake. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_s2d.config.forward_kl import ForwardKlConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.sft import SftConfig
from megatron_s2d.config.stage import TrainingStageConfig, validation_of
from megatron_s2d.config.validation import KlRule, PlateauRule
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.label_ledger import LabelLedger
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.errors import UserError
from megatron_s2d.workflow.stage_checks import check_graded, check_length


def check_validation(
    config: WorkflowConfig, name: str, specs: Mapping[str, ModelSpec], prompts: Mapping[str, PromptTable]
) -> None:
    """Raise ``UserError`` if stage ``name`` could not be validated as it asks for. prompts: by entry of ``data``."""
    stage = config.stages[name]
    validation = validation_of(stage)
    if validation is None:
        return
    where = f"stages.{name}.validation"
    for curve, entry in validation.data.items():
        check_graded(prompts[entry], f"{where}.data.{curve}: '{entry}'")
        sampling = validation.sampling or config.evaluation.sampling
        check_length(config, where, name, specs, prompts[entry][: validation.num_prompts], sampling)
    for index, rule in enumerate(validation.until):
        if isinstance(rule, KlRule) and not _has_teacher(stage):
            raise UserError(
                f"{where}.until.{index}: the rule kl needs a teacher, and a stage of type {stage.type} has none; use "
                "plateau or pass_rate"
            )
    layout = config.parallel
    in_process = isinstance(stage, SftConfig | ForwardKlConfig)
    if in_process and (layout.context_parallel_size > 1 or layout.virtual_pipeline_model_parallel_size > 1):
        raise UserError(
            f"{where}: stages of type {stage.type} are validated with the in-process engine, which supports neither "
            "context parallelism nor virtual pipeline stages: remove the validation, or change `parallel`"
        )


def _has_teacher(stage: object) -> bool:
    has_advantage = isinstance(stage, GrpoConfig) and stage.teacher_advantage is not None
    return has_advantage or isinstance(stage, OpdConfig | ForwardKlConfig)


def validation_warnings(config: WorkflowConfig, stages: Sequence[str], ledger: LabelLedger) -> Iterator[str]:
    """Yield validation on prompts that were trained on, equal samples, and rules that can never end the stage."""
    for name in stages:
        stage = config.stages[name]
        validation = validation_of(stage)
        if validation is None or not isinstance(stage, TrainingStageConfig):
            continue
        where = f"stages.{name}.validation"
        for curve, entry in validation.data.items():
            for trained, count in ledger.trained_before(name, entry).items():
                yield (
                    f"{where}.data.{curve}: the stage {trained} trains on the labels of {count} of its prompts: the "
                    "curve shows what was learned, not what is new; name a split that no stage trains on"
                )
        own = validation.sampling  # of that of the evaluation another line says it
        if validation.samples_per_prompt > 1 and own is not None and own.temperature == 0:
            yield (
                f"{where}: temperature 0 makes all {validation.samples_per_prompt} samples of a problem equal; set "
                "samples_per_prompt to 1"
            )
        if validation.interval_steps >= stage.steps and (validation.until or validation.best is not None):
            yield (
                f"{where}.interval_steps: {validation.interval_steps} with {stage.steps} steps validates after the "
                "last step only: there is nothing to choose, and no rule can end the stage earlier"
            )
        for index, rule in enumerate(validation.until):
            first = 0 if validation.before_training else 1
            needed = (rule.patience + first) * validation.interval_steps if isinstance(rule, PlateauRule) else 0
            if max(needed, rule.after_step) >= stage.steps > validation.interval_steps:
                yield f"{where}.until.{index}: the rule cannot end the stage before its last step ({stage.steps})"
