"""Checks how teachers and references read the prompts of each stage, before a run (docs/teachers.md). No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_s2d.config.model_spec import ModelSpec
from megatron_s2d.config.needed_stages import StageView, stage_views
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.model_tokenizers import ModelTokenizers
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.prompts import fitting_prompts
from megatron_s2d.data.teacher_views import fitting_in_views, in_view, views_of_entry
from megatron_s2d.errors import UserError


def check_views(
    config: WorkflowConfig,
    tokenizers: ModelTokenizers,
    specs: Mapping[str, ModelSpec],
    prompts: Mapping[str, Mapping[str, PromptTable]],
) -> list[str]:
    """Return notices for the user; raise ``UserError`` for a view that cannot be rendered or is too long.

    prompts: stage -> entry -> the prompts as the stage renders them for its student.
    """
    notices: list[str] = []
    for name in prompts:
        views = stage_views(config, name)
        changed = len(notices)
        for entry in config.stages[name].entries if views else ():
            read = fitting_prompts(config, name, entry, prompts[name][entry])
            notices += _check_entry(config, tokenizers, specs, name, entry, read)
        if getattr(config.stages[name], "teaches_itself", False):
            for text in notices[changed:]:
                if "no effect" in text:
                    raise UserError(f"{text}, and the student would agree with itself; change the view")
        _check_domains(config, name, views)
        if views:
            _check_batch(config, name, tokenizers, prompts[name])
    return notices


def _check_entry(
    config: WorkflowConfig,
    tokenizers: ModelTokenizers,
    specs: Mapping[str, ModelSpec],
    name: str,
    entry: str,
    read: PromptTable,
) -> list[str]:
    fitting = fitting_in_views(config, name, entry, read, tokenizers)
    notices = []
    if len(fitting) < len(read):
        notices.append(
            f"stages.{name}: {len(read) - len(fitting)} prompts of '{entry}' are longer than max_prompt_length of a "
            "teacher's view and are left out"
        )
    for of in views_of_entry(config, name, entry):
        table = in_view(config, name, of, entry, fitting, tokenizers)
        if np.array_equal(table.keys, fitting.keys):
            notices.append(
                f"stages.{name}.{of.key}: renders all prompts of '{entry}' as the student reads them: no effect"
            )
        _check_length(config, specs, name, of, table)
    return notices


def _check_length(
    config: WorkflowConfig, specs: Mapping[str, ModelSpec], name: str, of: StageView, table: PromptTable
) -> None:
    if of.model is None:  # its server says how many positions it has, when the stage begins
        return
    response, limit = config.stages[name].sampling.max_response_length, specs[of.model].max_position_embeddings
    longest = table.longest_beyond(limit - response)
    if longest is not None:
        raise UserError(
            f"stages.{name}.{of.key}: prompt {longest.id} has {len(longest.token_ids)} tokens in this view and with "
            f"sampling.max_response_length {response} exceeds the {limit} positions of model '{of.model}': set "
            f"{of.key}.max_prompt_length to leave such prompts out, or shorten the view or the responses"
        )


def _check_domains(config: WorkflowConfig, name: str, views: Sequence[StageView]) -> None:
    """Refuse a view of a domain that no prompt has."""
    stage = config.stages[name]
    for relation in ("teacher", "reference"):
        given = getattr(stage, f"{relation}_view", None)
        if not isinstance(given, Mapping):
            continue
        domains = {config.data[entry.partition("/")[0]].domain for entry in stage.entries}
        unknown = sorted(set(given) - domains)
        if unknown:
            raise UserError(
                f"stages.{name}.{relation}_view: '{unknown[0]}' is neither a setting of a view nor a domain of the "
                f"stage's prompts ({', '.join(sorted(domains))})"
            )


def _check_batch(
    config: WorkflowConfig, name: str, tokenizers: ModelTokenizers, prompts: Mapping[str, PromptTable]
) -> None:
    stage = config.stages[name]
    size = getattr(stage, "train_batch_size", None)
    if size is None:
        return
    read = {entry: fitting_prompts(config, name, entry, prompts[entry]) for entry in stage.entries}
    count = sum(len(fitting_in_views(config, name, entry, table, tokenizers)) for entry, table in read.items())
    if size > count:
        raise UserError(
            f"stages.{name}.train_batch_size: {size} prompts a step, but {count} prompts are within "
            "max_prompt_length of its views: lower it, or increase the limit"
        )
