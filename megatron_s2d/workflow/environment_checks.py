"""Checks the environments of a workflow's data before it runs: templates, sandboxes, classes of the user. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_s2d.config.forward_kl import TeacherCacheConfig
from megatron_s2d.config.grpo import GrpoConfig
from megatron_s2d.config.needed_stages import evaluated_stages, prompt_model
from megatron_s2d.config.opd import OpdConfig
from megatron_s2d.config.stage import validated_entries
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.model_tokenizers import ModelTokenizers
from megatron_s2d.data.tokenizer import stop_token_ids
from megatron_s2d.errors import UserError
from megatron_s2d.rollout.environments.manager import EnvironmentManager
from megatron_s2d.verify import RewardManager


def check_environments(config: WorkflowConfig, tokenizers: ModelTokenizers, stages: Sequence[str]) -> None:
    """Raise ``UserError`` for an environment that cannot work with the model that meets it."""
    seen = set()
    for where, entry, stage_name, is_graded in _uses(config, stages):
        settings = config.data[entry.partition("/")[0]].resolved_environment
        model = prompt_model(config, stage_name)
        if settings is None or (entry, model, is_graded) in seen:
            continue
        seen.add((entry, model, is_graded))
        tokenizer = tokenizers.of_model(model)
        stop_ids = stop_token_ids(tokenizer, config.models[model].path)
        with RewardManager() as grader:
            manager = EnvironmentManager(tokenizer, config.template_date, stop_ids, grader if is_graded else None)
            try:
                manager.check(settings)
            except UserError as error:
                raise UserError(f"{where}: data '{entry}': {error}") from None
            finally:
                manager.close()


def _uses(config: WorkflowConfig, stages: Sequence[str]) -> Iterator[tuple[str, str, str, bool]]:
    """Yield (where, entry of `data`, stage that samples, whether responses are graded)."""
    for name in stages:
        stage = config.stages[name]
        if isinstance(stage, GrpoConfig | OpdConfig | TeacherCacheConfig):
            for entry in stage.entries:
                yield f"stages.{name}", entry, name, stage.grades
        for entry in validated_entries(stage):
            yield f"stages.{name}.validation", entry, name, True
    for name in evaluated_stages(config):
        for entry in config.evaluation.entries:
            yield f"evaluation of {name}", entry, name, True
    for index, check in enumerate(config.pass_rate_checks):
        yield f"pass_rate_checks.{index}", check.prompts, check.stage, True
