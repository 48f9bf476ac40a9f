"""The prompts of a stage as its teachers and references read them. No torch here.

A view is one more rendering of the same rows, so that a prompt and its view have the same row and id.
"""

from __future__ import annotations

import numpy as np

from megatron_s2d.config.needed_stages import StageView, stage_views
from megatron_s2d.config.workflow import WorkflowConfig
from megatron_s2d.data.model_tokenizers import ModelTokenizers
from megatron_s2d.data.prompt_table import PromptTable
from megatron_s2d.data.prompts import load_prompts
from megatron_s2d.errors import UserError


def in_view(
    config: WorkflowConfig,
    stage_name: str,
    of: StageView,
    entry: str,
    prompts: PromptTable,
    tokenizers: ModelTokenizers,
) -> PromptTable:
    """Return ``prompts`` of ``entry`` as a teacher reads them, in the same order and with the same ids."""
    name = entry.partition("/")[0]
    where = f"stages.{stage_name}.{of.key}: data.{name}"
    tokenizer = tokenizers.load(of.renderer)
    if of.view.enable_thinking and tokenizer.chat_template is None:
        raise UserError(f"{where}: enable_thinking needs a chat template, and {of.renderer.tokenizer} has none")
    try:
        rendered = load_prompts(
            config.data[name],
            tokenizer,
            max_prompt_length=None,
            date=config.template_date,
            cache_dir=config.data_cache_dir,
            view=of.view,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return rendered.prompts.select(np.asarray(prompts.rows))


def views_of_entry(config: WorkflowConfig, stage_name: str, entry: str) -> list[StageView]:
    """Return the views in which problems of ``entry`` are read."""
    domain = config.data[entry.partition("/")[0]].domain
    return [view for view in stage_views(config, stage_name) if view.domain in (None, domain)]


def fitting_in_views(
    config: WorkflowConfig, stage_name: str, entry: str, prompts: PromptTable, tokenizers: ModelTokenizers
) -> PromptTable:
    """Return those ``prompts`` of ``entry`` that are within ``max_prompt_length`` of all views of the stage.

    Raises ``UserError`` if none is.
    """
    for of in views_of_entry(config, stage_name, entry):
        limit = of.view.max_prompt_length
        if limit is None:
            continue
        fits = np.ones(len(prompts), dtype=bool)
        fits[in_view(config, stage_name, of, entry, prompts, tokenizers).longer_than(limit)[0]] = False
        if not fits.any():
            raise UserError(
                f"stages.{stage_name}.{of.key}.max_prompt_length: {limit}: all prompts of '{entry}' are longer in "
                "this view; increase it"
            )
        prompts = prompts.select(fits)
    return prompts
